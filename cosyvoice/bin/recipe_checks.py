"""Checks a recipe's settings before training starts: each by itself, and those that must agree with each other."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cosyvoice.dataset import processor
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.frames import MEL_BINS, Rates

if TYPE_CHECKING:
    from cosyvoice.flow.token_flow import TokenFlow
    from cosyvoice.hifigan.hifigan import HiFiGan

# Pairs of a step and another one that must come before it, since the step reads what that one adds.
EARLIER = (
    ("tokenize", "parquet_opener"),
    ("parse_embedding", "parquet_opener"),
    ("read_places", "tokenize"),
    ("filter", "tokenize"),
    ("resample", "filter"),
    ("truncate", "filter"),
    ("equalize", "filter"),
    ("compute_fbank", "filter"),
    ("compute_whisper_fbank", "filter"),
    ("compute_f0", "filter"),
    ("batch", "filter"),
    ("batch", "parse_embedding"),
)
EARLIER_FOR = {
    "llm": (),
    "flow": (("batch", "compute_fbank"),),
    "hifigan": (
        ("compute_fbank", "truncate"),
        ("compute_f0", "truncate"),
        ("batch", "compute_fbank"),
        ("batch", "compute_f0"),
    ),
}
ENDS = ["batch", "padding"]  # every other step works on single recordings
RATES = (("resample", "resample_rate"), ("equalize", "sample_rate"), ("compute_f0", "sample_rate"))
MANY_TOKENS = 1000  # so many that rounding hides no difference
TRIAL_SECONDS = 0.5  # of the silence that the mel function is tried on, where no step cuts windows
# What functions raise where a value contradicts another one.
CONTRADICTIONS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError)


@contextmanager
def naming(config: Path) -> Iterator[None]:
    """Put the name of the YAML before the message of an InputError inside the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{config}: {error}") from None


def check_numbers(train_conf: Any) -> None:
    """Raise InputError unless the numbers that the trainer divides or counts by are there and above zero."""
    if not isinstance(train_conf, Mapping):
        raise InputError(f"train_conf is {train_conf!r}. Give settings by name, such as max_epoch")
    for name, default in {"max_epoch": None, "grad_clip": None, "accum_grad": 1, "log_interval": 1}.items():
        value = train_conf.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise InputError(f"{name} of train_conf is {value}. Give a number above 0")


@dataclass(frozen=True)
class Pipeline:
    """The settings of a data_pipeline, which must fit each other and the model that is trained."""

    steps: Mapping[str, Mapping[str, Any]]  # settings of each step by its name, in their order, defaults included
    feat_extractor: Callable[[Tensor], Tensor] | None  # None if no step computes a mel
    mel: Mapping[str, Any]  # settings of feat_extractor

    @classmethod
    def of(cls, built: Any) -> "Pipeline":
        """Read built steps. Raises InputError if they are something else, or if a setting is missing."""
        if not isinstance(built, list) or not all(map(is_step, built)):
            raise InputError("data_pipeline is not a list of steps. List functions of cosyvoice.dataset.processor")
        steps = {step.func.__name__: settings_of(step, []) for step in built}
        if "tokenize" in steps:
            settings_of(steps["tokenize"]["get_tokenizer"])
        if "compute_fbank" not in steps:
            return cls(steps, None, {})
        feat_extractor = steps["compute_fbank"]["feat_extractor"]
        mel = settings_of(feat_extractor, None)
        if not mel.keys() >= {"hop_size", "sampling_rate"}:
            raise InputError("feat_extractor has no hop_size or no sampling_rate. Name matcha's mel_spectrogram there")
        return cls(steps, feat_extractor, mel)

    def check(self, model: str, sample_rate: int | None, token_rate: int | None) -> None:
        """Raise InputError if the steps do not fit each other, or the task of training llm, flow or hifigan.

        sample_rate, token_rate: the YAML's sample_rate and token_frame_rate in Hz, or None if it has no such entry.
        """
        self.check_order(model)
        self.check_sample_rates({"sample_rate": sample_rate})
        if self.feat_extractor is None:
            return
        if "compute_f0" in self.steps:
            hop = self.steps["compute_f0"]["hop_size"]
            check_equal("hops", {"hop_size of feat_extractor": self.mel["hop_size"], "hop_size of compute_f0": hop})
        self.check_mel()
        if token_rate is not None:
            self.check_tokens(token_rate)

    def check_model(self, model: str, part: nn.Module) -> None:
        """Raise InputError if the steps do not fit the built llm, flow or hifigan."""
        if model == "flow":
            self.check_flow(part)
        elif model == "hifigan":
            self.check_vocoder(part)

    def check_order(self, model: str) -> None:
        """Raise InputError if a step is missing, or comes too late."""
        names = list(self.steps)
        if names[-2:] != ENDS:
            raise InputError(f"data_pipeline of {model} does not end in batch and padding. Put these two last")
        for name, earlier in (*EARLIER, *EARLIER_FOR[model]):
            if name in names and earlier not in names[: names.index(name)]:
                raise InputError(f"data_pipeline of {model} has no {earlier} before {name}. Put it there")

    def check_sample_rates(self, others: Mapping[str, int | None]) -> None:
        """Raise InputError if two sample rates differ. others: those outside the steps by name, None if unknown."""
        rates = {f"{setting} of {step}": self.steps[step][setting] for step, setting in RATES if step in self.steps}
        if self.mel:
            rates["sampling_rate of feat_extractor"] = self.mel["sampling_rate"]
        check_equal("sample rates", rates | others)

    def check_mel(self) -> None:
        """Raise InputError unless feat_extractor makes a frame of MEL_BINS of every hop_size samples."""
        hop = self.mel["hop_size"]
        samples = max(1, int(TRIAL_SECONDS * self.mel["sampling_rate"]) // hop) * hop
        if "truncate" in self.steps:
            samples = self.steps["truncate"]["truncate_length"]
            if samples % hop:
                problem = f"truncate_length {samples} is not a multiple of {hop}, the hop_size of feat_extractor"
                raise InputError(f"{problem}. Give {max(1, round(samples / hop)) * hop}, for example")
        with trial(f"feat_extractor cannot transform {samples} samples", "n_fft and win_size"):
            mel = self.feat_extractor(torch.zeros(1, samples))  # (1, M, T)
        _, bins, frames = mel.shape
        if (bins, frames) != (MEL_BINS, samples // hop):
            made, wanted = f"{bins} bins and {frames} frames", f"{MEL_BINS} and {samples // hop}"
            problem = f"feat_extractor makes {made} from {samples} samples, not {wanted}"
            raise InputError(f"{problem}. Copy the entry from the model's download")
        if not mel.isfinite().all():
            raise InputError("feat_extractor makes a mel that holds no numbers. Correct its fmin and fmax")

    def check_tokens(self, token_rate: int) -> None:
        """Raise InputError if num_frames is not the samples of a speech token. token_rate: in Hz."""
        for step in ("compute_fbank", "compute_whisper_fbank"):
            given = self.steps.get(step, {}).get("num_frames")
            if given is None:
                continue
            if given != (samples := self.rates(token_rate).samples_per_token):
                problem = f"num_frames of {step} is {given}, and a speech token has {samples} samples"
                raise InputError(f"{problem} at {token_rate} tokens a second. Give {samples}, or leave it out")

    def check_flow(self, flow: "TokenFlow") -> None:
        """Raise InputError if tokens last longer or shorter in the flow than in the data."""
        self.check_tokens(flow.input_frame_rate)
        found = self.rates(flow.input_frame_rate).mel_frames(MANY_TOKENS)
        if found != (made := flow.mel_frames(MANY_TOKENS)):
            problem = f"the flow makes {made} mel frames of {MANY_TOKENS} speech tokens, and feat_extractor {found}"
            raise InputError(f"{problem}. Correct its hop_size, or token_mel_ratio and input_frame_rate of the flow")

    def check_vocoder(self, vocoder: "HiFiGan") -> None:
        """Raise InputError if the vocoder makes sound of another rate or length, or its losses do not fit a window."""
        hop = self.mel["hop_size"]
        if hop != (made := vocoder.generator.samples_per_frame):
            problem = f"the vocoder makes {made} samples of a mel frame, and hop_size of feat_extractor is {hop}"
            raise InputError(f"{problem}. Correct hop_size, or upsample_rates and hop_len of the vocoder")
        rates = {"sampling_rate of the vocoder": vocoder.generator.sampling_rate}
        if vocoder.spectral_loss is not None:
            rates["sampling_rate of spectral_loss"] = vocoder.spectral_loss.sampling_rate
        for number, transform in enumerate(vocoder.mel_spec_transform, start=1):
            rates[f"sampling_rate of mel_spec_transform {number}"] = settings_of(transform, None).get("sampling_rate")
        self.check_sample_rates(rates)
        samples = self.steps["truncate"]["truncate_length"]
        silence, unvoiced = torch.zeros(1, samples), torch.zeros(1, samples // hop)  # (1, samples), (1, T)
        remedy = "the sizes of the discriminators and spectral losses"
        with trial(f"hifigan cannot compare windows of {samples} samples", remedy), torch.no_grad():
            loss = vocoder.generator_losses(silence, unvoiced, silence, unvoiced)["loss"]
        if not loss.isfinite():
            raise InputError("a loss of hifigan is no number. Correct fmin and fmax of its mel_spec_transform")

    def rates(self, token_rate: int) -> Rates:
        return Rates(self.mel["sampling_rate"], self.mel["hop_size"], token_rate)


def is_step(value: Any) -> bool:
    return isinstance(value, partial) and value.func.__module__ == processor.__name__


def settings_of(function: Callable[..., Any], *values: Any) -> dict[str, Any]:
    """Return the arguments of a function that is called with `values`. Raises InputError if one is missing."""
    if not isinstance(function, partial):
        return {}
    try:
        bound = inspect.signature(function.func).bind(*values, *function.args, **function.keywords)
    except TypeError as error:
        raise InputError(f"{function.func.__name__}: {error}. Give it in the YAML") from None
    bound.apply_defaults()
    return bound.arguments


def check_equal(what: str, values: Mapping[str, int | None]) -> None:
    """Raise InputError if two of the values differ; None stands for one that is not known."""
    known = {name: value for name, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} is {value}" for name, value in known.items())
        raise InputError(f"the {what} differ: {listed}. Give all of them the same")


@contextmanager
def trial(problem: str, sizes: str) -> Iterator[None]:
    """Turn what the block raises into an InputError that begins with `problem`. sizes: those that may be wrong."""
    try:
        yield
    except CONTRADICTIONS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{problem} ({reason}). Correct {sizes}, or give a larger truncate_length") from None
