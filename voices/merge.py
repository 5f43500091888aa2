"""Adapters merged into the base weights, and what makes a voice of them."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cosyvoice.cli.frontend import read_spk2info
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import read_state_dict
from cosyvoice.utils.file_utils import alone_in, atomic_write, save_tensors
from lora import merged
from voices.run import Run
from voices.sidecar import write_sidecar


def merged_path(output_dir: Path, part: str, mode: str) -> Path:
    return output_dir / f"{part}_merged_{mode}.pt"


def merge_run(
    run: Run, folder: ModelFolder, output_dir: Path, targets: dict[str, Path], use_best: bool, scale: float = 1.0
) -> list[Path]:
    """Merge the parts named in `targets` into those files, and write speaker vector and sidecar.

    `use_best` takes every part's best epoch, otherwise the weights as the checkpoint holds them. scale: the share of
    what the adapters change. Returns the files.
    """
    run.check_base(folder)
    with alone_in(output_dir, "merge_joint_weights.py"):
        speakers, epochs = stored_speakers(output_dir, folder), {}
        with ExitStack() as renaming:  # all at the end, so that a stopped merge mixes no old part with a new one
            for part, target in targets.items():
                base = read_state_dict(folder.weights(part))
                adapters = run.best(part) if use_best else run.adapters[part]
                weights = merged(base, adapters, scale * run.scale(part))
                save_tensors(weights, renaming.enter_context(atomic_write(target)))
                progress = run.state.progress[part]
                epochs[part] = progress.best_epoch if use_best else len(progress.history)
        speaker = write_speaker(run, speakers, output_dir)
        return [*targets.values(), speaker, write_sidecar(run, targets, epochs, scale, output_dir)]


def stored_speakers(output_dir: Path, folder: ModelFolder) -> dict[str, Any]:
    """What `spk2info.pt` of the base model and that of the output folder hold; of one name, the latter's."""
    return read_spk2info(folder.stored_speakers) | read_spk2info(output_dir / "spk2info.pt")


def write_speaker(run: Run, known: dict[str, Any], output_dir: Path) -> Path:
    """Write `spk2info.pt`: the voice, beside the speakers already known."""
    target = output_dir / "spk2info.pt"
    voice = {"embedding": run.embedding.float()}
    save_tensors(known | {run.state.origin.speaker: voice}, target)
    return target
