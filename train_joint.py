"""Train LoRA adapters in CosyVoice's LLM (rhythm, style) and Flow (timbre) on one speaker's prepared clips.

    python train_joint.py --mode joint

Watch it with `tensorboard --logdir output/joint_logs`. At the end the best weights are merged and ready to speak.
"""

if __name__ == "__main__":  # before the imports, which take a while
    from cosyvoice.runtime.startup import stop_silently

    stop_silently()

import argparse
import hashlib
import math
import re
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import JOINT_TRAINING_CONFIG, MODES, PASSES_ON_GPU, SEED, find_model_dir, settings_for, with_changes
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.command import EXIT_INTERRUPTED, check_least, run
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.frontend_utils import has_words
from utils import add_device, add_folders, add_seed, check_writable, limit_threads, pick_device, quoted, repeated

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Sampler

    from dataset import Clip
    from llm_flow_model import JointModel
    from training.workers import Place
    from voices.run import Run
    from voices.run_state import Origin


# What a resumed run may do otherwise: when it ends, and what a step costs in memory.
MAY_CHANGE = (
    "max_epochs",
    "llm_loss_threshold",
    "flow_loss_threshold",
    "early_stopping_patience",
    "max_feat_len",
    "recompute",
    "precision",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is trained")
    what.add_argument("--mode", choices=tuple(MODES), help="parts to train (default: config.py, joint)")
    start = what.add_mutually_exclusive_group()
    start.add_argument("--resume", metavar="CKPT|auto", help="continue a run exactly; auto: the mode's last checkpoint")
    start.add_argument("--init", type=Path, metavar="CKPT", help="start the adapters it shares from a run of any mode")
    how = parser.add_argument_group("settings (default: config.py)")
    how.add_argument("--epochs", type=int, help="most epochs")
    how.add_argument("--batch-size", type=int, help="clips a batch")
    how.add_argument("--memory", type=memory_size, metavar="8GB", help="put as many clips of a step in one pass as fit")
    how.add_argument("--lr", type=float, help="highest learning rate")
    how.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="any other setting")
    heard = how.add_mutually_exclusive_group()
    heard.add_argument("--listen", metavar="TEXT", help="each epoch speaks it: in TensorBoard, and a wav in its folder")
    heard.add_argument("--listen-file", type=Path, metavar="FILE", help="the same with each line of a UTF-8 file")
    add_folders(parser, "model", "data", "output")
    add_device(parser)
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="GPUs that share a step (default: 1)")
    add_seed(parser)
    args = parser.parse_args(argv)
    check_least("--devices", args.devices)
    return args


def memory_size(text: str) -> int:
    """The type of `--memory`: bytes of `8GB` or `6000MB`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|MB)", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no size like 8GB or 6000MB")
    return int(float(found[1]) * {"GB": 10**9, "MB": 10**6}[found[2].upper()])


def changes(args: argparse.Namespace) -> list[str]:
    """The settings given on the command line, as KEY=VALUE; an option of its own wins over --set."""
    short = {"training_mode": args.mode, "max_epochs": args.epochs, "batch_size": args.batch_size}
    short["learning_rate"] = args.lr
    return args.set + [f"{key}={value}" for key, value in short.items() if value is not None]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    check_listen(args)
    folder = find_model_dir(args.model_dir)
    config = with_changes(settings_for(folder), changes(args))
    check_writable(args.output_dir, folder.path)
    from cosyvoice.utils.file_utils import alone_in
    from training.devices import check_devices
    from training.workers import with_workers

    check_devices(args.devices, args.device)
    work = partial(train, args, folder, config)
    with alone_in(args.output_dir, "train_joint.py"), with_workers(args.devices, work) as place:
        return train(args, folder, config, place)


def check_listen(args: argparse.Namespace) -> None:
    """Raises InputError where there is nothing to speak."""
    if args.listen is not None and not has_words(args.listen):
        raise InputError(f"--listen has nothing to speak: {args.listen!r}; give it words or numbers")
    if args.listen_file is not None:
        listened_texts(args)


def listened_texts(args: argparse.Namespace) -> dict[int, str]:
    """Return what each epoch speaks, by the number of its line; nothing where that is not asked for."""
    if args.listen is None and args.listen_file is None:
        return {}
    from voices.lines import read_lines

    return {line.number: line.text for line in read_lines(args.listen, args.listen_file, Path("listen.wav"))}


def train(args: argparse.Namespace, folder: ModelFolder, config: dict[str, Any], place: "Place") -> int:
    """Train, or continue, and say what came out of it. Returns the exit code.

    place: which of several processes this one is. They share the training; the first one does the rest.
    """
    device = pick_device(args.device).type
    limit_threads(folder, args.devices)
    from dataset import load_clips, speaker_name
    from training.checkpoints import Interrupted
    from training.devices import passes_a_device
    from training.listening import joint_sampler
    from training.trainer import fit
    from voices.run import base_fingerprints, last_checkpoint, read_run
    from voices.run_state import Origin

    clips = load_clips(args.data_dir, folder)
    origin = Origin(
        mode=config["training_mode"],
        run=uuid.uuid4().hex,
        base=base_fingerprints(folder),
        data=data_fingerprint(clips),
        speaker=speaker_name(clips),
    )
    resumed = find_resumed(args, origin, folder)
    if resumed:
        config = with_changes(resumed.config, changes(args))
        check_kept(resumed, config, args)
        origin, args.seed = replace(origin, run=resumed.state.origin.run), resumed.state.seed
    is_over = resumed is not None and finished(resumed, config)
    if not is_over:
        if device == "cuda" and not resumed and not sets_passes(args, folder):
            config |= PASSES_ON_GPU
            chosen = ", ".join(f"{key}={value}" for key, value in PASSES_ON_GPU.items())
            print(f"on a GPU: {chosen}; --batch-size 1 computes clip by clip, in less memory")
        model, loaders = build(args, config, folder, clips, origin, device, place)
        passes_a_device(model.config, args.devices, resumed is not None)  # or one line says why not
        if resumed:
            loaders[0].batch_sampler.sampler.skip = resumed.state.batches_done * resumed.config["batch_size"]
        describe(model, loaders, device, args.devices)
        try:
            sampler = None
            if texts := listened_texts(args):
                from tools.sample_judge import open_sample_judge

                sampler = joint_sampler(model, loaders, texts, args.data_dir, folder, device, open_sample_judge)
            fit(model, loaders, args.output_dir, device, resumed, sampler, place)
        except Interrupted as stop:
            print(f"{stop}; go on with: python train_joint.py {options_to_go_on(args, origin.mode)}")
            return EXIT_INTERRUPTED
    if place.rank:
        return 0
    if is_over:
        trained = replace(resumed, state=replace(resumed.state, config=config))
    else:
        trained = read_run(last_checkpoint(args.output_dir, origin.mode))
    conclude(trained, args.output_dir, folder)
    options = repeated(args, "model", "output") + both_files(trained, args.output_dir)
    print(f'next: python inference_joint.py{options} --text "..."')
    return 0


# Continuing


def options_to_go_on(args: argparse.Namespace, mode: str) -> str:
    """The options that take up an interrupted run of the mode."""
    options = f"--mode {mode} --resume auto{repeated(args, 'model', 'data', 'output')}"
    options += f" --devices {args.devices}" if args.devices > 1 else ""
    options += f" --listen {quoted(args.listen)}" if args.listen else ""
    return options + (f" --listen-file {quoted(args.listen_file)}" if args.listen_file else "")


def find_resumed(args: argparse.Namespace, origin: "Origin", folder: ModelFolder) -> "Run | None":
    """The run to continue, if one is asked for; `auto` without a checkpoint starts anew.

    Raises InputError unless mode, base model and data are those of that run, and the folder holds no other one.
    """
    from voices.run import last_checkpoint, read_run

    last = last_checkpoint(args.output_dir, origin.mode)
    if args.resume is None:
        if last.is_file():
            print(f"the end of the first epoch will replace {last} and its epochs (--resume auto continues that run)")
        return None
    if args.resume == "auto" and not last.is_file():
        print(f"there is no {last} yet: starting from the beginning")
        return None
    run = read_run(last if args.resume == "auto" else Path(args.resume))
    if run.mode != origin.mode:
        raise InputError(f"{run.path} is a run of --mode {run.mode}, not {origin.mode}; give that, or use --init")
    run.check_base(folder)
    if run.state.origin.data != origin.data:
        raise InputError(f"the data has changed since {run.path}; use --init {quoted(run.path)} instead of --resume")
    if run.path.resolve() != last.resolve() and last.is_file():
        check_replaced(last, run)
        print(f"the end of this epoch will replace {last} and the epochs from there on")
    print(f"continuing {run.path} ({run.state.epochs} epochs done)")
    return run


def check_replaced(last: Path, run: "Run") -> None:
    """Raises InputError where the last checkpoint of the folder is not of the run that shall go on there."""
    from voices.run import read_run

    try:
        same = read_run(last).state.origin.run == run.state.origin.run
    except InputError:  # a damaged one is no loss
        return
    if not same:
        raise InputError(f"{last} is of another run than {run.path}; give another --output-dir, or move it away")


def check_kept(run: "Run", config: dict[str, Any], args: argparse.Namespace) -> None:
    """Raises InputError for other values of settings that the run's place and weights follow from."""
    changed = [name for name in config if name not in MAY_CHANGE and config[name] != run.config[name]]
    if changed:
        raise InputError(f"--resume keeps the {' and '.join(changed)} of {run.path}; leave that as it was")
    if args.memory:
        raise InputError(f"--resume keeps the batch_size of {run.path}; leave --memory out")
    if args.seed not in (SEED, run.state.seed):
        raise InputError(f"--resume keeps the seed {run.state.seed} of {run.path}; leave --seed out")


def finished(run: "Run", config: dict[str, Any]) -> bool:
    """Whether nothing is left to train; says why."""
    stopped = [part.stopped for part in run.state.progress.values()]
    if all(stopped):
        print("every part had already stopped; --init starts a new run from its weights")
        return True
    if run.state.epochs >= config["max_epochs"]:
        print(f"{run.state.epochs} epochs are done already; more --epochs go on")
        return True
    return False


def data_fingerprint(clips: "Sequence[Clip]") -> str:
    """SHA-256 of what training reads, apart from the mel, which follows from the same recordings."""
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(f"{clip.utt}\n{clip.speaker}\n".encode())
        for tensor in (clip.text_token, clip.speech_token, clip.embedding):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


# Starting


def build(
    args: argparse.Namespace,
    config: dict[str, Any],
    folder: ModelFolder,
    clips: "list[Clip]",
    origin: "Origin",
    device: str,
    place: "Place",
) -> "tuple[JointModel, tuple[DataLoader, DataLoader | None]]":
    """The model with new adapters (or those of `--init`), and the loaders of training and held-out clips."""
    from torch.utils.data import DataLoader, SequentialSampler

    from cosyvoice.model_folder.weights import load_part
    from cosyvoice.runtime.command import seed_all
    from dataset import (
        DealtBatches,
        EpochOrder,
        check_vocabularies,
        collate,
        find_places,
        slowest_pace,
        speaker_embedding,
        split_clips,
    )
    from llm_flow_model import JointModel

    train, held_out = split_clips(clips, config["validation_ratio"], args.seed)
    seed_all(args.seed)
    parts = {part: load_part(folder, part) for part in MODES[config["training_mode"]]}
    for part in parts.values():
        check_vocabularies(clips, part)
        find_places(clips, part)
    origin = replace(origin, pace=slowest_pace(train))
    model = JointModel(parts, config, args.seed, speaker_embedding(train), origin)
    if args.init:
        start_from(args.init, model, folder)
    if args.memory:
        fill_memory(model, clips, args.memory, device, args.devices)

    def loader(own: "list[Clip]", order: "Sampler[int]") -> DataLoader:
        batches = DealtBatches(order, model.config["batch_size"], place.rank, place.devices)
        return DataLoader(own, batch_sampler=batches, collate_fn=collate)

    train_loader = loader(train, EpochOrder(len(train), args.seed))
    return model, (train_loader, loader(held_out, SequentialSampler(held_out)) if held_out else None)


def sets_passes(args: argparse.Namespace, folder: ModelFolder) -> bool:
    """Return whether the user or the base model says how many clips a pass and passes a step there are."""
    given = {change.partition("=")[0].strip() for change in changes(args)}
    own = settings_for(folder)
    differs = any(own[key] != JOINT_TRAINING_CONFIG[key] for key in PASSES_ON_GPU)
    return bool(args.memory or given & PASSES_ON_GPU.keys() or differs)


def fill_memory(model: "JointModel", clips: "list[Clip]", memory: int, device: str, devices: int) -> None:
    """Give the model's settings as many clips a pass as fit; a step has as many as before."""
    from training.memory import clips_a_pass

    config = model.config
    size = clips_a_pass(model, clips, memory, device, devices)
    if not size:
        size = 1
        print("even one clip at a time may need more; --set recompute=True and a smaller max_feat_len need less")
    passes = config["batch_size"] * config["accumulate_grad_batches"] // size
    config |= {"batch_size": size, "accumulate_grad_batches": passes}
    print(f"{memory / 1e9:g} GB: batch_size={size}, accumulate_grad_batches={passes}")


def start_from(checkpoint: Path, model: "JointModel", folder: ModelFolder) -> None:
    """Copy the adapters that a checkpoint of any mode shares with the model; of a run's last, the best epoch's."""
    from lora import load_adapters, rescaled
    from voices.run import last_checkpoint, read_run, scale_of

    run = read_run(checkpoint)
    shared = [part for part in run.parts if part in model.parts]
    if not shared:
        raise InputError(f"{checkpoint} (--mode {run.mode}) shares no part with this mode; leave --init out")
    run.check_base(folder)
    is_last = checkpoint.name == last_checkpoint(checkpoint.parent, run.mode).name
    for part in shared:
        change = run.scale(part) / scale_of(model.config[f"{part}_lora"])  # 1, unless lora_alpha is another now
        progress = run.state.progress[part]
        chosen = is_last and progress.best  # there is no best one where the first epoch was interrupted
        load_adapters(model.parts[part], rescaled(chosen or run.adapters[part], change))
        print(f"{part}: starting from {checkpoint}" + (f", epoch {progress.best_epoch}" if chosen else ""))


def describe(model: "JointModel", loaders: "tuple[DataLoader, DataLoader | None]", device: str, devices: int) -> None:
    """Say what will be trained."""
    import torch

    from llm_flow_model import trainable_share
    from training.precision import compute_precision

    for name, part in model.parts.items():
        count, share = trainable_share(part)
        print(f"{name}: training {count:,} adapter parameters, {share:.2%} of all")
    train, held_out = (len(loader.dataset) if loader else 0 for loader in loaders)
    where = device if devices == 1 else f"{devices} x {device}"
    print(f"{train} clips to train on, {held_out} held out; {where}, {compute_precision(model.config, device)}")
    clips, epochs = model.config["accumulate_grad_batches"] * model.config["batch_size"], model.config["max_epochs"]
    steps = math.ceil(train / clips)
    print(
        f"{steps * epochs} optimiser steps planned, {steps} in each of {epochs} epochs, at most "
        f"{min(train, clips)} clips a step"
    )
    if device == "cuda" and (count := torch.cuda.device_count()) > devices:
        print(f"using {devices} of {count} GPUs; --devices takes more, and CUDA_VISIBLE_DEVICES chooses which")
    if not held_out:
        print("no clip is held out (fewer than 8, or validation_ratio 0): training losses choose the best weights")


# Ending


def conclude(run: "Run", output_dir: Path, folder: ModelFolder) -> None:
    """Say why training ended, and merge the best weights."""
    from voices.merge import merge_run, merged_path

    for part in run.parts:
        progress = run.state.progress[part]
        why = progress.stopped or f"max_epochs ({run.config['max_epochs']}) reached"
        print(f"{part} stopped: {why}; best loss {progress.best_loss:.3f} in epoch {progress.best_epoch}")
    targets = {part: merged_path(output_dir, part, run.mode) for part in run.parts}
    for path in merge_run(run, folder, output_dir, targets, use_best=True):
        print(f"wrote {path}")


def both_files(run: "Run", output_dir: Path) -> str:
    """Options that name a merged file for each part, where an earlier run trained the one that this run left alone."""
    from voices.merge import merged_path
    from voices.sidecar import read_sidecar, sidecars

    own = {part: merged_path(output_dir, part, run.mode) for part in run.parts}
    for voice in map(read_sidecar, sidecars(output_dir)):
        earlier = {part: file for part, file in voice.files.items() if part not in own}
        if earlier and voice.base == run.state.origin.base:
            files = own | earlier
            return "".join(f" --{part} {quoted(files[part])}" for part in MODES["joint"])
    return ""


if __name__ == "__main__":
    run(main)
