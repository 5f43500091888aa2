"""Share of each operation in the time of decoding, flow, vocoder and training.

    python bench/operations.py

It uses random weights in the sizes of CosyVoice-300M, CosyVoice-mini and CosyVoice2; `--model-dir` profiles your own
model. A share is an operation's own time divided by the time of all operations, on one CPU thread, since with several
the waiting would count as work. Each row is also printed as a line of JSON.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import Machine, add_models, add_precisions, measure_machine, precisions, sources, words
from synthesis import Speaker
from train_steps import TEXT_TOKENS, gradients, joint_model, random_clip

if TYPE_CHECKING:
    from cosyvoice.llm.speech_token_lm import SpeechTokenLM

STEPS_BEFORE, STEPS = 50, 20  # of decoding: not profiled, profiled
LEAST_SHARE = 0.02  # smaller shares are not shown
TRAINED = ("llm_only", "flow_only")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # without it the profiler reports an error if there is no GPU
    machine = measure_machine(args)
    import torch

    for name, source in sources(args).items():
        for precision in precisions(args):
            with torch.inference_mode():
                profile_speaking(machine, name, precision, source)
        for mode in TRAINED:
            clip = random_clip(source, 1)
            work = partial(gradients, joint_model(source, mode, args.seed), [clip])
            show_shares({"model": name, "what": f"training {mode}"}, work)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from utils import add_seed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    add_precisions(parser)
    add_seed(parser)
    parser.set_defaults(device="cpu", threads=1)
    return parser.parse_args(argv)


def profile_speaking(machine: Machine, name: str, precision: str, source: Path) -> None:
    """Profile decoding steps, and the flow and vocoder for speech as long as a training clip."""
    speaker = Speaker(machine, name, precision, source, repeats=1)
    tokens = speaker.speech_tokens(TEXT_TOKENS)
    parts = {
        "decoding": decoding(speaker.model.llm),
        "flow": partial(speaker.flow_mel, speaker.model, tokens),
        "vocoder": partial(speaker.vocode, tokens),
    }
    for what, work in parts.items():
        show_shares({"model": name, "what": what, "precision": precision}, work)


def decoding(llm: "SpeechTokenLM") -> Callable[[], None]:
    """Return a function that decodes `STEPS` more tokens of a sentence."""
    import torch

    following = llm.following(torch.randn(1, STEPS_BEFORE, llm.speech_embedding.embedding_dim), 2 * STEPS)
    next(following)

    def steps() -> None:
        for _ in range(STEPS):
            following.send(0)

    return steps


def show_shares(labels: dict[str, Any], work: Callable[[], Any]) -> None:
    """Run the work twice, first to warm up, and print each operation's share of the second run's time."""
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        work()
    times = {operation.key: operation.self_cpu_time_total for operation in profiled.key_averages()}
    whole = sum(times.values())
    largest = sorted(times, key=times.__getitem__, reverse=True)
    shares = {name: round(times[name] / whole, 3) for name in largest if times[name] >= LEAST_SHARE * whole}
    columns = [f"{words(name.rpartition(':')[2].strip('_'))} {share:.0%}" for name, share in shares.items()]
    print(f"{'  '.join(labels.values()):40}", *columns, sep="  ")
    print(json.dumps({"bench": "operations", **labels, "shares": shares}), flush=True)


if __name__ == "__main__":
    from cosyvoice.runtime.command import run

    run(main)
