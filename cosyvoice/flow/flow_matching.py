"""Conditional flow matching: the training loss, and sampling with classifier-free guidance."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from cosyvoice.runtime.draws import generator
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.precision import Convert
from cosyvoice.utils.rates_300m import OVERLAP_TOKENS, mel_frames
from matcha.models.components.flow_matching import cosine_time_grid, integrate_euler, optimal_transport_path

MEDIAN = "median"  # the reg_loss_type of a flow that leads all noise to one mel; see ConditionalCFM.median_errors

_making_workers = threading.Lock()
_half_workers: dict[int, ThreadPoolExecutor] = {}  # by the number of threads

Velocity = Callable[[Tensor, Tensor], Tensor]  # of (B, M, T), at a noisy mel (B, M, T) and a time (B, 1, 1)


@dataclass(frozen=True)
class CFMParams:
    """The `cfm_params` of a model YAML."""

    sigma_min: float  # width of the data end of the path
    solver: str
    t_scheduler: str
    training_cfg_rate: float  # share of training items that lose their conditions
    inference_cfg_rate: float  # guidance strength w: v = (1 + w) v_conditional - w v_unconditional
    reg_loss_type: str  # MEDIAN or, as in all public recipes, a name that means nothing: they compute squares

    @classmethod
    def parse(cls, params: Any) -> "CFMParams":
        """From a mapping (DictConfig, dict) or a namespace; InputError for what is missing or unknown."""
        values = dict(params) if isinstance(params, Mapping) else vars(params)
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise InputError(f"ConditionalCFM: cfm_params must be {sorted(names)}, not {sorted(values)}")
        parsed = cls(**values)
        if parsed.solver != "euler" or parsed.t_scheduler != "cosine":
            raise InputError(
                f"ConditionalCFM: solver {parsed.solver!r} with t_scheduler {parsed.t_scheduler!r} is not "
                "implemented; use 'euler' with 'cosine'"
            )
        return parsed


@dataclass
class TrainingDraw:
    """The random numbers of one training step."""

    t: Tensor  # (B, 1, 1) flow time in [0, 1)
    z: Tensor  # (B, M, T) standard normal noise
    keep: Tensor  # (B,) bool: False where the item's conditions are dropped


class ConditionalCFM(nn.Module):
    """Mel spectrograms from noise along a learned velocity field (Matcha-TTS, Mehta et al. 2024, section 3).

    Guidance: "Classifier-Free Diffusion Guidance" (Ho and Salimans 2022). An unconditional item is one whose
    mu, speaker and condition are all zero.
    """

    def __init__(
        self, in_channels: int, cfm_params: Any, n_spks: int, spk_emb_dim: int, estimator: nn.Module
    ) -> None:
        super().__init__()
        if n_spks != 1:
            raise InputError(f"{type(self).__name__}: n_spks {n_spks} is not implemented; use 1")
        if in_channels + spk_emb_dim != estimator.in_channels:
            raise InputError(
                f"ConditionalCFM: in_channels {in_channels} + spk_emb_dim {spk_emb_dim} must be the "
                f"estimator's in_channels, {estimator.in_channels}"
            )
        self.params = CFMParams.parse(cfm_params)
        self.estimator = estimator

    def compute_loss(
        self,
        x1: Tensor,
        mask: Tensor,
        mu: Tensor,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        times: Tensor | None = None,
        drops_conditions: bool = True,
        **attention: bool,
    ) -> tuple[Tensor, Tensor]:
        """The mean of `errors` over the valid mel cells, and the noisy mel y (B, M, T) that they are taken at.

        x1 (B, M, T) is the mel, mask (B, 1, T) true at frames, mu (B, M, T), spks (B, S), cond (B, M, T). times (B,):
        numbers from 0 to 1 that flow times are made of, instead of random ones. drops_conditions False: every item
        keeps its conditions. attention: what the estimator takes besides.
        """
        draw = self.draw_training(x1)
        if times is not None:
            draw = replace(draw, t=times.to(x1).view(-1, 1, 1))
        if not drops_conditions:
            draw = replace(draw, keep=torch.ones_like(draw.keep))
        mu, spks, cond = (_keep_items(condition, draw.keep) for condition in (mu, spks, cond))

        def velocity(y: Tensor, t: Tensor) -> Tensor:
            return self.estimator(y.to(mu.dtype), mask, mu, t.flatten(), spks, cond, **attention).float()

        errors, y = self.errors(x1, draw, velocity)
        return (errors * mask).sum() / (mask.sum() * x1.shape[1]), y

    def errors(self, x1: Tensor, draw: TrainingDraw, velocity: Velocity) -> tuple[Tensor, Tensor]:
        """Return the squared error of the velocity in every mel cell, padding included, and the noisy mel y.

        x1 (B, M, T) is the mel; both results have its shape. velocity: the estimator's, with the draw's conditions.
        """
        if self.params.reg_loss_type == MEDIAN:
            return self.median_errors(x1, draw, velocity)
        y, u = optimal_transport_path(x1, draw.z, draw.t, self.params.sigma_min)
        return (velocity(y, draw.t) - u).square(), y

    def median_errors(self, x1: Tensor, draw: TrainingDraw, velocity: Velocity) -> tuple[Tensor, Tensor]:
        """Return the absolute error of the mel that the velocity leads to, and y, as `errors` does.

        It teaches to lead all noise to the same mel: the median of those that fit the tokens. On the path from noise to
        a recording, the recording shows through the noise, and a network learns to make up such detail as it sees. A
        small one makes up noise, in which words are lost. So this path ends at the network's own prediction from noise
        alone, of which no recording is seen.
        """
        with torch.no_grad():
            predicted_mel = draw.z + velocity(draw.z, torch.zeros_like(draw.t))
        y, _ = optimal_transport_path(predicted_mel, draw.z, draw.t, self.params.sigma_min)
        return (draw.z + velocity(y, draw.t) - x1).abs(), y

    def draw_training(self, x1: Tensor) -> TrainingDraw:
        """Draws time, noise and guidance dropout, in this order, on the device of x1."""
        batch = x1.shape[0]
        t = torch.rand(batch, 1, 1, device=x1.device)
        z = self.draw_noise(x1)
        keep = torch.rand(batch, device=x1.device) >= self.params.training_cfg_rate
        return TrainingDraw(t, z, keep)

    def draw_noise(self, like: Tensor) -> Tensor:
        """Standard normal noise in float32, of the shape and on the device of `like`.

        Drawn on the CPU: a seed gives the same speech on every device, and a GPU's generator stays out of the way of a
        graph that another thread captures.
        """
        return torch.randn(like.shape, generator=generator()).to(like.device)

    @torch.inference_mode()
    def forward(
        self,
        mu: Tensor,
        mask: Tensor,
        n_timesteps: int,
        temperature: float = 1.0,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        prompt_len: int = 0,
        cache: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A mel (B, M, T) in float32, and the cache for the next chunk of a stream.

        A cache (B, M, C, 2) holds noise and mu of the first prompt_len frames and of the last frames of the
        chunk before. It replaces the first C frames of both: frames that two chunks share start out equal.
        """
        z = self.draw_noise(mu) * temperature
        if cache is not None:
            cached_z, cached_mu = cache.unbind(dim=-1)
            z = torch.cat([cached_z.to(z.dtype), z[:, :, cached_z.shape[2] :]], dim=2)
            mu = torch.cat([cached_mu.to(mu.dtype), mu[:, :, cached_mu.shape[2] :]], dim=2)
        start = torch.stack([z, mu.to(z.dtype)], dim=-1)  # (B, M, T, 2)
        new_cache = torch.cat([start[:, :, :prompt_len], start[:, :, -mel_frames(OVERLAP_TOKENS) :]], dim=2)
        t_span = cosine_time_grid(n_timesteps, mu.device)
        return self.solve_euler(z, t_span, mu, mask, spks, cond), new_cache

    def prepare_inference(self, convert: Convert) -> None:
        """Give the network's linear layers their fastest form, and make the workers while no request needs them."""
        self.estimator.prepare_inference(convert)
        self.spread(self.estimator, next(self.estimator.parameters()).device)

    @property
    def is_guided(self) -> bool:
        """Whether each step asks for the velocity without conditions, too."""
        return self.params.inference_cfg_rate != 0

    def spread(self, estimator: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
        """Return the estimator as it computes fastest: where there is guidance, see `for_halves`."""
        return for_halves(estimator, device) if self.is_guided else estimator

    def solve_euler(
        self,
        x: Tensor,
        t_span: Tensor,
        mu: Tensor,
        mask: Tensor,
        spks: Tensor | None,
        cond: Tensor | None,
        estimator: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Integrates the guided velocity from x (B, M, T) over t_span (N + 1,).

        The state keeps x's dtype while the network computes in mu's: half precision would lose small steps.
        estimator: called in the place of the own one, once a step.
        """
        w = self.params.inference_cfg_rate
        batch = x.shape[0]
        estimator = estimator or self.spread(self.estimator, x.device)

        def own_velocity(x: Tensor, t: Tensor) -> Tensor:
            return estimator(x.to(mu.dtype), mask, mu, t.expand(batch), spks, cond)

        if not self.is_guided:
            return integrate_euler(own_velocity, x, t_span)
        masks = torch.cat([mask, mask])
        all_mu, all_spks, all_cond = (_add_unconditional(condition) for condition in (mu, spks, cond))

        def guided_velocity(x: Tensor, t: Tensor) -> Tensor:
            both = torch.cat([x, x]).to(mu.dtype)  # one call: conditional items first, then unconditional
            velocities = estimator(both, masks, all_mu, t.expand(2 * batch), all_spks, all_cond)
            with_conditions, without = velocities.chunk(2)
            return (1 + w) * with_conditions - w * without

        return integrate_euler(guided_velocity, x, t_span)


def for_halves(estimator: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The estimator, on a CPU as two that each compute half of the items with half of the threads.

    Threads that share an operation wait for each other at its end, thousands of times a sentence. These two wait for
    each other once a step.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return estimator
    pool = half_workers(threads)

    @torch.inference_mode()  # which is a thread's own
    def of_half(*inputs: Tensor | None) -> Tensor:
        return estimator(*inputs)

    def of_both(*inputs: Tensor | None) -> Tensor:
        halves = [(None, None) if both is None else both.chunk(2) for both in inputs]
        return torch.cat(list(pool.map(of_half, *halves)))

    return of_both


def half_workers(threads: int) -> ThreadPoolExecutor:
    """Two workers that each compute with half of so many threads: always the same ones, which all requests share.

    A thread that sets its number of threads sets that of all that start later, so this happens once, under a lock.
    """
    with _making_workers:
        if threads not in _half_workers:
            both_set = threading.Barrier(3)

            def begin() -> None:
                torch.get_num_threads()  # or this thread's first operation would take over the number of all
                torch.set_num_threads(threads // 2)
                both_set.wait()

            pool = ThreadPoolExecutor(2, initializer=begin)
            for _ in range(2):
                pool.submit(int)
            both_set.wait()
            torch.set_num_threads(threads)
            _half_workers[threads] = pool
        return _half_workers[threads]


def _keep_items(condition: Tensor | None, keep: Tensor) -> Tensor | None:
    """The condition (B, ...) with zeros in the items that are not kept."""
    if condition is None:
        return None
    return condition * keep.view(-1, *[1] * (condition.dim() - 1))


def _add_unconditional(condition: Tensor | None) -> Tensor | None:
    """(B, ...) -> (2 B, ...): the condition, then zeros."""
    return None if condition is None else torch.cat([condition, torch.zeros_like(condition)])
