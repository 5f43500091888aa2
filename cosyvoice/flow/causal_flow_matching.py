"""Conditional flow matching from a noise that is always the same, which a stream can solve piece by piece."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from cosyvoice.flow.flow_matching import ConditionalCFM
from cosyvoice.runtime.device import free_memory
from cosyvoice.runtime.errors import InputError
from matcha.models.components.flow_matching import cosine_time_grid

NOISE_SEED = 0
MOST_FRAMES = 15_000  # 300 s at 50 frames a second


class SolverPast:
    """What a CausalConditionalCFM keeps of a stream: the estimator's past at each of the solver's steps.

    Its size grows by the keys and values of every frame, at every step, with and without conditions: at the sizes of
    CosyVoice2-0.5B and ten steps 4.6 MB a frame in float32, 2.3 in float16, 1.2 in int8.
    """

    def __init__(self, decoder: "CausalConditionalCFM", n_timesteps: int, kept_type: torch.dtype) -> None:
        """kept_type: that of keys and values."""
        estimator = decoder.estimator
        self.device = next(estimator.parameters()).device
        self.estimate_next = decoder.spread(estimator.step, self.device)
        self.steps = [estimator.new_past(kept_type) for _ in range(n_timesteps)]
        items = 2 if decoder.is_guided else 1  # with and without conditions
        self.frame_bytes = items * n_timesteps * estimator.kept_bytes(kept_type)

    @property
    def length(self) -> int:
        """How many frames are kept."""
        return self.steps[0].length

    def keep(self, final: int) -> Callable[..., Tensor]:
        """Return an estimator for one call of the solver, of whose frames `final` will be kept.

        Raises InputError where the device has too little memory for them.
        """
        self.check_room(final)
        steps = iter(self.steps)

        def estimate(*inputs: Tensor | None) -> Tensor:
            past = next(steps)
            past.final = final
            velocity = self.estimate_next(*inputs, past)
            past.advance()
            return velocity

        return estimate

    def check_room(self, frames: int) -> None:
        """Raise InputError unless the device has memory for so many more frames."""
        needed, free = frames * self.frame_bytes, free_memory(self.device)
        if free is not None and needed > free:
            raise InputError(
                f"a stream of {self.length + frames} mel frames, those of the prompt included, needs "
                f"{needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free; give a shorter text or prompt, or do "
                "not stream"
            )


class CausalConditionalCFM(ConditionalCFM):
    """Mel spectrograms from fixed noise along a velocity field that is causal (CosyVoice 2, Du et al. 2024, 2.4).

    The same frame always starts at the same noise, so nothing is drawn in inference, and a longer sequence repeats the
    frames of a shorter one where attention goes by chunks.
    """

    @torch.inference_mode()
    def forward(
        self,
        mu: Tensor,
        mask: Tensor,
        n_timesteps: int,
        temperature: float = 1.0,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        streaming: bool = False,
    ) -> tuple[Tensor, None]:
        """Return the mel (1, M, T) in float32, and None where ConditionalCFM has a cache.

        Speaks one utterance; the arguments are those of ConditionalCFM. streaming: attend by chunks. Raises InputError
        for more than 15000 frames.
        """
        z = noise_of(mu, 0) * temperature
        estimator = self.spread(partial(self.estimator, streaming=streaming), mu.device)
        return self.solve_euler(z, cosine_time_grid(n_timesteps, mu.device), mu, mask, spks, cond, estimator), None

    def new_past(self, n_timesteps: int, kept_type: torch.dtype) -> SolverPast:
        """Return the past of a stream that has not begun, for `step`. kept_type: of keys and values."""
        return SolverPast(self, n_timesteps, kept_type)

    @torch.inference_mode()
    def step(self, mu: Tensor, spks: Tensor | None, cond: Tensor | None, past: SolverPast, final: int) -> Tensor:
        """Return the next N frames (1, M, N) of a stream in float32, as `forward` by chunks does within the whole.

        mu and cond (1, M, N). past: the frames before, which end where a chunk does. final: how many of the N are kept
        in it, a number of whole chunks. Raises InputError for more than 15000 frames in all, and for want of memory.
        """
        z = noise_of(mu, past.length)
        t_span = cosine_time_grid(len(past.steps), mu.device)
        return self.solve_euler(z, t_span, mu, torch.ones_like(mu[:, :1]), spks, cond, past.keep(final))


def noise_of(frames: Tensor, first: int) -> Tensor:
    """Return the float32 noise (1, M, N) that frames (1, M, N) start at, the first of them being frame `first`.

    Raises InputError for frames beyond the noise's end.
    """
    end = first + frames.shape[2]
    check_frames(end)
    return _fixed_noise(frames.shape[1])[:, :, first:end].to(frames.device)


def check_frames(frames: int) -> None:
    """Raise InputError for more mel frames, those of the prompt included, than there is noise for."""
    if frames > MOST_FRAMES:
        raise InputError(
            f"prompt and speech are {frames} mel frames, and the flow has noise for {MOST_FRAMES} only; "
            "split the text, or give a shorter prompt"
        )


@lru_cache(maxsize=1)
def _fixed_noise(mel_bins: int) -> Tensor:
    """(1, mel_bins, MOST_FRAMES): always the same numbers, from a generator of their own."""
    with torch.inference_mode(False):
        return torch.randn(1, mel_bins, MOST_FRAMES, generator=torch.Generator().manual_seed(NOISE_SEED))
