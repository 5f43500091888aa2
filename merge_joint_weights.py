"""Merge trained adapters into the base weights: LLM and Flow then speak alone, and in upstream CosyVoice too.

    python merge_joint_weights.py                                       # the best weights of the newest run
    python merge_joint_weights.py --ckpt output/joint_joint_last.ckpt   # a checkpoint's own weights
    python merge_joint_weights.py --scale 0.5                           # half of what training changed
"""

if __name__ == "__main__":  # before the imports, which take a while
    from cosyvoice.runtime.startup import stop_silently

    stop_silently()

import argparse
from collections.abc import Sequence
from pathlib import Path

from config import find_model_dir
from cosyvoice.runtime.command import run
from cosyvoice.runtime.errors import InputError
from utils import add_folders, check_writable

MAX_SCALE = 2.0

def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, help="checkpoint to merge as it is (default: best of newest run)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--llm-only", action="store_true", help="merge the LLM only")
    which.add_argument("--flow-only", action="store_true", help="merge the Flow only")
    parser.add_argument("--llm-output", type=Path, help="merged LLM (default: <output-dir>/llm_merged_<mode>.pt)")
    parser.add_argument("--flow-output", type=Path, help="merged Flow (default: <output-dir>/flow_merged_<mode>.pt)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of what training changed (default: 1)")
    add_folders(parser, "model", "output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if not 0 < args.scale <= MAX_SCALE:
        raise InputError(f"--scale {args.scale:g}: give a number above 0 and at most {MAX_SCALE:g}")
    folder = find_model_dir(args.model_dir)
    from voices.merge import merge_run, merged_path
    from voices.run import newest_run, read_run

    trained = read_run(args.ckpt or newest_run(args.output_dir))
    wanted = {"llm": not args.flow_only, "flow": not args.llm_only}
    given = {"llm": args.llm_output, "flow": args.flow_output}
    targets = {
        part: given[part] or merged_path(args.output_dir, part, trained.mode) for part in trained.parts if wanted[part]
    }
    if not targets:
        raise InputError(f"{trained.path} was trained with --mode {trained.mode}: it holds nothing for that part")
    if unused := [part for part, path in given.items() if path and part not in targets]:
        raise InputError(f"--{unused[0]}-output is given, but the {unused[0]} is not merged; leave it out")
    check_writable(args.output_dir, folder.path)
    check_targets(targets, trained.path, args.output_dir, folder.path)
    for path in merge_run(trained, folder, args.output_dir, targets, args.ckpt is None, args.scale):
        print(f"wrote {path}")
    return 0


def check_targets(targets: dict[str, Path], checkpoint: Path, output_dir: Path, model_dir: Path) -> None:
    """Raises InputError, before anything is written, unless every file can be written and replaces nothing else."""
    from voices.sidecar import sidecars

    taken = {checkpoint, output_dir / "spk2info.pt", *sidecars(output_dir)}
    for part, target in targets.items():
        if target.resolve() in {path.resolve() for path in taken}:
            raise InputError(f"--{part}-output {target} would replace another file of the voice; give another name")
        check_writable(target.parent, model_dir)
        taken.add(target)


if __name__ == "__main__":
    run(main)
