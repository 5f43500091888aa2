"""Time of one decoding step of the language model in each precision, early and late in a sentence.

    python bench/decode.py

It uses random weights in the sizes of CosyVoice-300M and CosyVoice2; `--model-dir` measures your own model. A step
reads each weight once, whatever its position; only the cached keys, values and positions grow. The machine's read speed
is measured before each step, and all precisions and positions take turns, so that other load affects all alike. `of
limit` is the time in which the machine reads the weights of blocks and head, divided by the time at the first position.
The errors compare log-probabilities along a sentence generated in float32 and fed token by token. Each row is also
printed as a line of JSON.

On CUDA a graph is captured when it is first needed, and again when a sequence outgrows the captured ones. This shows in
the largest time, not in the median.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import (
    BYTES_PER_FLOAT32,
    READ_BYTES,
    add_device,
    add_measuring,
    add_models,
    add_precisions,
    build,
    positive,
    precisions,
    sources,
    step_weights,
    timed,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cosyvoice.llm.speech_token_lm import SpeechTokenLM

SIZES = ("300m", "cosyvoice2")  # the time of a small model's step is not that of reading its weights
BYTES_PER_WEIGHT = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
WARM_UP = 2  # rounds that are not counted


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    import torch

    from utils import pick_device

    device = pick_device(args.device).type
    torch.set_num_threads(args.threads)
    for name, source in sources(args).items():
        torch.manual_seed(args.seed)
        with torch.inference_mode():
            measure(name, source, args, device)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = (50, 500, 1000)
    add_models(parser, SIZES)
    add_precisions(parser, ("float32", "float16", "int8"))
    parser.add_argument("--tokens", type=positive, nargs="+", default=places, metavar="N",
                        help="positions compared (default: 50 500 1000)")  # fmt: skip
    parser.add_argument("--compared", type=positive, default=60, metavar="N",
                        help="tokens of the sentence for the error (default: 60)")  # fmt: skip
    add_device(parser)
    add_measuring(parser, 20, "steps timed at each position")
    return parser.parse_args(argv)


def measure(model_name: str, source: Path, args: argparse.Namespace, device: str) -> None:
    """Print a row for each precision of one model."""
    plain = build(source, "llm").to(device)
    weights = step_weights(plain)
    prefix, tokens = sentence(plain, args.compared)
    models = {name: prepared(plain, name) for name in precisions(args)}
    seconds, read_seconds = time_steps(models, args.tokens, args.repeats, device)
    bytes_per_second = READ_BYTES / statistics.median(read_seconds)
    reading = f"reading at {bytes_per_second / 1e9:.1f} GB/s"
    print(f"{model_name}: {device}, {args.threads} threads, {weights:,} weights a step, {reading}")
    place = {"model": model_name, "device": device, "threads": args.threads}
    expected = log_probabilities(plain, prefix, tokens)
    for name, model in models.items():
        limit = weights * BYTES_PER_WEIGHT[name] / bytes_per_second
        errors = compare(log_probabilities(model, prefix, tokens), expected)
        show({"precision": name, **place, **figures(seconds[name], limit), **errors})


def prepared(plain: "SpeechTokenLM", precision: str) -> "SpeechTokenLM":
    """Return a copy that decodes in this precision and shares no tensor."""
    model = copy.deepcopy(plain)
    model.prepare_decoding(precision)
    return model


def sentence(llm: "SpeechTokenLM", count: int) -> "tuple[Tensor, list[int]]":
    """Return a random prefix (1, L, C) and the tokens that the model samples after it."""
    import torch

    from cosyvoice.utils.frames import SPEAKER_DIMENSIONS

    device = llm.llm_embedding.weight.device
    text = torch.randint(0, llm.text_embedding.num_embeddings, (1, 20)).to(device)
    none, speaker = text[:, :0], torch.randn(1, SPEAKER_DIMENSIONS).to(device)
    length, zero = torch.tensor([[text.size(1)], [0]], device=device)
    ratio = count / text.size(1)  # the least tokens and the most
    tokens = llm.inference(text, length, none, zero, none, zero, speaker, 25, ratio, ratio)
    return llm.inference_prefix(text, none, none, speaker), list(tokens)


def log_probabilities(llm: "SpeechTokenLM", prefix: "Tensor", tokens: list[int]) -> "Tensor":
    """Return the log-probabilities (N + 1, V) after the prefix and after each of the N tokens."""
    import torch

    steps = llm.following(prefix.to(llm.llm_embedding.weight.dtype), len(tokens))
    return torch.stack([next(steps).cpu(), *(steps.send(token).cpu() for token in tokens)])


def compare(found: "Tensor", expected: "Tensor") -> dict[str, float]:
    agreeing = (found.argmax(dim=1) == expected.argmax(dim=1)).float().mean()
    return {"top1_agreement": agreeing.item(), "mean_log_p_error": (found - expected).abs().mean().item()}


def time_steps(
    models: "dict[str, SpeechTokenLM]", places: Sequence[int], repeats: int, device: str
) -> tuple[dict[str, dict[int, list[float]]], list[float]]:
    """Return the seconds of single steps by precision and cached frames, and of reading `READ_BYTES`, in turns."""
    import torch

    memory, reads = torch.ones(READ_BYTES // BYTES_PER_FLOAT32, device=device), []
    sequences = {}
    for name, model in models.items():
        for place in places:
            weight = model.speech_embedding.weight
            prefix = torch.randn(1, place, weight.size(1)).to(weight)
            sequences[name, place] = model.following(prefix, WARM_UP + repeats)
            next(sequences[name, place])
    seconds: dict[str, dict[int, list[float]]] = {name: {place: [] for place in places} for name in models}
    for repeat in range(WARM_UP + repeats):
        for (name, place), steps in sequences.items():
            read = timed(memory.sum, device)
            step = timed(lambda: steps.send(0), device)  # noqa: B023
            if repeat >= WARM_UP:
                reads.append(read)
                seconds[name][place].append(step)
    return seconds, reads


def figures(seconds: dict[int, list[float]], limit: float) -> dict[str, Any]:
    """Return median, minimum and maximum milliseconds by position, and the share of the limit at the first one."""
    milliseconds = {
        place: [round(1e3 * value, 2) for value in (statistics.median(taken), min(taken), max(taken))]
        for place, taken in seconds.items()
    }
    medians = [statistics.median(taken) for taken in seconds.values()]
    first, last = medians[0], medians[-1]
    return {"ms": milliseconds, "last_over_first": last / first, "limit_ms": 1e3 * limit, "of_limit": limit / first}


def show(row: dict[str, Any]) -> None:
    places = "  ".join(f"@{place} {a:5.1f} ({b:.1f} to {c:.1f})" for place, (a, b, c) in row["ms"].items())
    print(
        f"{row['precision']:8} ms {places}  x{row['last_over_first']:.2f}  of limit {row['of_limit']:.0%}"
        f"  top-1 {row['top1_agreement']:.1%}  |dlog p| {row['mean_log_p_error']:.1e}"
    )
    print(json.dumps({"bench": "decode", **row}))


if __name__ == "__main__":
    from cosyvoice.runtime.command import run

    run(main)
