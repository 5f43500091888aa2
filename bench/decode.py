"""Time of one decoding step of the language model at full CosyVoice-300M sizes, early and late in a sentence.

    python bench/decode.py

Random weights, float32. A step reads every weight once, whatever its place; only the cached keys, values and positions
grow. Steps at both places are timed in turns, so that other load on the machine falls on both alike.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CONFIG = ROOT / "examples" / "libritts" / "cosyvoice" / "conf" / "cosyvoice.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs=2, default=(50, 500), help="places compared (default: 50 500)")
    parser.add_argument("--repeats", type=int, default=20, help="steps timed at each place (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seed", type=int, default=1986, help="seed of the weights (default: 1986)")
    args = parser.parse_args(argv)
    import torch

    from cosyvoice.utils.model_yaml import load_model_yaml

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    llm = load_model_yaml(CONFIG, parts=("llm",))["llm"].eval()
    with torch.inference_mode():
        early, late = time_steps(llm, args.tokens, args.repeats)
    print(f"{args.threads} threads, float32, {sum(p.numel() for p in llm.parameters()):,} parameters")
    for place, seconds in zip(args.tokens, (early, late), strict=True):
        spread = f"{min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}"
        print(f"step at token {place}: {statistics.median(seconds) * 1e3:.1f} ms (of {len(seconds)}: {spread})")
    print(f"ratio of the medians: {statistics.median(late) / statistics.median(early):.3f}")
    return 0


def time_steps(llm, places: Sequence[int], repeats: int) -> list[list[float]]:
    """Seconds of single steps with that many frames cached, measured alternately."""
    import torch

    width = llm.speech_embedding.embedding_dim
    caches = [llm.llm.new_cache() for _ in places]
    for place, cache in zip(places, caches, strict=True):
        llm.next_log_probabilities(torch.randn(1, place, width), cache)
    seconds: list[list[float]] = [[] for _ in places]
    for repeat in range(repeats + 2):  # the first two warm up
        for cache, taken in zip(caches, seconds, strict=True):
            lm_input = torch.randn(1, 1, width)
            start = time.perf_counter()
            llm.next_log_probabilities(lm_input, cache)
            if repeat >= 2:
                taken.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    from cosyvoice.utils.command import run

    run(main)
