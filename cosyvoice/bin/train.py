"""Train one part of the model, from scratch or from a checkpoint: stage 5 of the recipe.

    torchrun --nproc_per_node=4 cosyvoice/bin/train.py --config conf/cosyvoice.yaml --model llm \\
        --train_data data/train.data.list --cv_data data/dev.data.list --model_dir exp/llm --tensorboard_dir tensorboard

Without torchrun it runs as one process. `--resume auto` continues a run that was stopped, with the same numbers.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # as a file, it finds the suite only so
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from cosyvoice.runtime.startup import stop_silently

    stop_silently()

from cosyvoice.bin.sample_options import add_sample_options, check_sample_options, recipe_sampler
from cosyvoice.runtime.command import check_least, run
from cosyvoice.runtime.errors import InputError

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import nn

    from cosyvoice.bin.recipe_models import RecipeModel
    from cosyvoice.bin.sampling import OpenJudge
    from cosyvoice.dataset.loader import EpochLoader

MODELS = ("llm", "flow", "hifigan")
TEXT_MODEL = "qwen_pretrain_path"  # entry of the YAML, and the option that replaces its value
FREE_TO_CHANGE = ("max_epoch", "log_interval", "save_per_step")  # of train_conf, in a run that is resumed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is trained")
    what.add_argument("--model", choices=MODELS, required=True)
    what.add_argument("--config", type=Path, required=True, help="the recipe's YAML")
    what.add_argument("--train_data", type=Path, required=True, help="list of parquet files")
    what.add_argument("--cv_data", type=Path, required=True, help="list of held-out parquet files")
    what.add_argument("--checkpoint", type=Path, help="weights to start from (default: random ones)")
    what.add_argument("--qwen_pretrain_path", type=Path, help="folder CosyVoice-BlankEN, which CosyVoice2 needs")
    what.add_argument("--resume", choices=("auto",), help="continue from last.ckpt in --model_dir, where there is one")
    what.add_argument("--max_epoch", type=int, help="epochs in all (default: train_conf)")
    what.add_argument("--total_steps", type=int, help="steps of the cosine schedule (default: train_conf)")
    what.add_argument("--seed", type=int, default=1986, help="seed of all random draws (default: %(default)s)")
    pairs = parser.add_argument_group("preferences")
    pairs.add_argument("--dpo", action="store_true", help="make recorded speech likelier than rejected; llm only")
    pairs.add_argument("--ref_model", type=Path, help="weights of the frozen llm to compare with, where --dpo starts")
    where = parser.add_argument_group("results")
    where.add_argument("--model_dir", type=Path, required=True, help="checkpoints")
    where.add_argument("--tensorboard_dir", type=Path, default=Path("tensorboard"), help="default: %(default)s")
    how = parser.add_argument_group("how")
    how.add_argument("--train_engine", choices=("torch_ddp", "deepspeed"), default="torch_ddp")
    how.add_argument("--ddp.dist_backend", dest="dist_backend", choices=("nccl", "gloo"), default="nccl")
    how.add_argument("--num_workers", type=int, default=0, help="preparing batches (default: %(default)s)")
    how.add_argument("--prefetch", type=int, default=100, help="batches a worker is ahead (default: %(default)s)")
    how.add_argument("--pin_memory", action="store_true", help="faster copies to the GPU")
    how.add_argument("--timeout", type=int, help="seconds; changes nothing: all processes end an epoch together here")
    how.add_argument("--use_amp", action="store_true", help="half precision where that is faster; not for hifigan")
    how.add_argument("--deepspeed_config", type=Path, default=Path("conf/ds_stage2.json"))
    how.add_argument(
        "--deepspeed.save_states", choices=("model_only", "model+optimizer"), help="either keeps weights alone"
    )
    add_sample_options(parser)
    args = parser.parse_args(argv)
    check_sample_options(args)
    for option, least in {"max_epoch": 1, "total_steps": 1, "seed": 0, "num_workers": 0, "prefetch": 1}.items():
        if getattr(args, option) is not None:
            check_least(f"--{option}", getattr(args, option), least)
    return args


def main(argv: Sequence[str] | None = None, open_judge: "OpenJudge | None" = None) -> int:
    """Train. open_judge: what judges the samples, if anything does."""
    args = parse(argv)
    check_engine(args)
    check_preferences(args)
    from cosyvoice.utils.file_utils import alone_in

    args.model_dir.mkdir(parents=True, exist_ok=True)
    leads = os.environ.get("RANK", "0") == "0"  # of several processes, which share the folder, one holds the lock
    with alone_in(args.model_dir, "train.py") if leads else nullcontext():
        return train(args, open_judge)


def train(args: argparse.Namespace, open_judge: "OpenJudge | None" = None) -> int:
    """Train the network from its beginning, or from where an earlier run was. Returns the exit code."""
    from cosyvoice.bin.quiet_trainer import fit_quietly
    from cosyvoice.bin.recipe_checkpoints import LAST, RecipeCheckpoints
    from cosyvoice.bin.recipe_checks import Pipeline, check_numbers, naming

    recipe = read_recipe(args)
    train_conf = own_or_common(args, recipe, "train_conf")
    steps = own_or_common(args, recipe, "data_pipeline")
    with naming(args.config):
        check_numbers(train_conf)
        train_conf = with_total_steps(train_conf, args.total_steps)
        pipeline = Pipeline.of(steps)
        pipeline.check(args.model, *rates(args, recipe))
    last = args.model_dir / LAST
    resumable = args.train_engine == "torch_ddp"
    resumed = resumable and args.resume is not None and last.exists()
    if not resumed:
        refuse_used_folder(args.model_dir)
    model = build_model(args, recipe, train_conf)
    with naming(args.config):
        pipeline.check_model(args.model, model.part)
    check_fits(args, model)
    train_loader, cv_loader = build_loaders(args, steps)
    state = identity(args, train_conf, steps, train_loader)
    if resumed:
        continue_from(last, state, model, train_loader, epochs(args, train_conf))
    callbacks = [RecipeCheckpoints(args.model_dir, train_conf.get("save_per_step", -1), resumable, state)]
    if args.sample_every:
        callbacks.append(recipe_sampler(args, model.part, open_judge))
    trainer = build_trainer(args, train_conf, callbacks)
    fit_quietly(trainer, model, train_loader, cv_loader, last if resumed else None)
    return 0


def read_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """Return the entries of the recipe's YAML, not built yet, with the text model that the options name."""
    from cosyvoice.model_folder.model_yaml import parse_model_yaml

    entries = parse_model_yaml(args.config)
    if args.qwen_pretrain_path is None:
        return entries
    if entries.get(TEXT_MODEL) is None:
        raise InputError(f"{args.config} has no entry {TEXT_MODEL}. Leave --{TEXT_MODEL} out")
    return entries | {TEXT_MODEL: str(args.qwen_pretrain_path)}


def own_or_common(args: argparse.Namespace, recipe: dict[str, Any], name: str) -> Any:
    """The YAML's entry NAME_MODEL where it has one, else `name` or, for the vocoder, NAME_gan."""
    own, common = f"{name}_{args.model}", f"{name}_gan" if args.model == "hifigan" else name
    return built(args, recipe, own, {own: None}) or built(args, recipe, common)


def with_total_steps(train_conf: dict[str, Any], total_steps: int | None) -> dict[str, Any]:
    """Return the settings with a schedule of `total_steps`, if given. Raises InputError if the schedule has no end."""
    if total_steps is None:
        return train_conf
    if train_conf.get("scheduler") != "cosine":
        raise InputError(f"--total_steps is for scheduler: cosine, not {train_conf.get('scheduler')}. Leave it out")
    conf = train_conf.get("scheduler_conf", {})
    if not isinstance(conf, Mapping):
        raise InputError(f"scheduler_conf of train_conf is {conf!r}. Give settings by name, such as warmup_steps")
    return {**train_conf, "scheduler_conf": {**conf, "total_steps": total_steps}}


def built(args: argparse.Namespace, recipe: dict[str, Any], name: str, defaults: dict[str, Any] | None = None) -> Any:
    """Return an entry of the recipe, built anew."""
    from cosyvoice.model_folder.model_yaml import build_entries

    return build_entries(args.config, recipe, (name,), defaults)[name]


def rates(args: argparse.Namespace, recipe: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return sample_rate and token_frame_rate of the YAML in Hz, each None if it is not there."""
    names = ("sample_rate", "token_frame_rate")
    return tuple(built(args, recipe, name, {name: None}) for name in names)


def identity(
    args: argparse.Namespace, train_conf: dict[str, Any], steps: list[Any], loader: "EpochLoader"
) -> dict[str, Any]:
    """What a run must keep when it is resumed: the optimiser's and the schedule's state bring their settings along."""
    from cosyvoice.model_folder.fingerprints import fingerprint_weights
    from cosyvoice.model_folder.model_yaml import spelled

    reference = {"ref_model": fingerprint_weights(args.ref_model)} if args.dpo else {}
    settings = {name: value for name, value in train_conf.items() if name not in FREE_TO_CHANGE}
    return {
        "model": args.model,
        "seed": args.seed,
        "processes": world_size(),
        "num_workers": args.num_workers,
        **settings,
        **reference,
        "data_pipeline": hashlib.sha256(str(spelled(steps)).encode()).hexdigest(),
        "train_data": loader.dataset.fingerprint(),
    }


def check_engine(args: argparse.Namespace) -> None:
    """Raises InputError where the engine cannot work, before anything heavy starts."""
    if args.train_engine == "torch_ddp":
        return
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise InputError("deepspeed is not installed: pip install deepspeed, or --train_engine torch_ddp")
    if args.model == "hifigan":
        raise InputError("deepspeed cannot train two optimisers: use --train_engine torch_ddp for hifigan")
    if not args.deepspeed_config.is_file():
        raise InputError(f"{args.deepspeed_config} does not exist; give --deepspeed_config")
    from cosyvoice.runtime import device

    if problem := device.cuda_problem():
        raise InputError(f"deepspeed trains on GPUs, and {problem}; use --train_engine torch_ddp")


def check_preferences(args: argparse.Namespace) -> None:
    """Raises InputError where --dpo cannot work, or --ref_model has no use."""
    if args.dpo and args.model != "llm":
        raise InputError(f"--dpo teaches the llm alone. Train the {args.model} without it")
    if args.dpo and args.ref_model is None:
        raise InputError("--dpo compares with a frozen llm. Give its weights with --ref_model")
    if args.ref_model is not None and not args.dpo:
        raise InputError("--ref_model belongs to --dpo. Give both, or neither")


def world_size() -> int:
    """Processes in all: torchrun says so."""
    return int(os.environ.get("WORLD_SIZE", 1))


def refuse_used_folder(model_dir: Path) -> None:
    """Checkpoints of two runs in one folder would be averaged."""
    if found := sorted(model_dir.glob("epoch_*")):
        remedy = "give another --model_dir (--resume auto continues one of torch_ddp that has its last.ckpt)"
        raise InputError(f"{found[0]} is of an earlier run; {remedy}")


# Building


def build_model(args: argparse.Namespace, recipe: dict[str, Any], train_conf: dict[str, Any]) -> "RecipeModel":
    from cosyvoice.bin.preference_model import PreferenceModel
    from cosyvoice.bin.recipe_models import SpeechModel, VocoderModel
    from cosyvoice.bin.text_model import start_from_text_model
    from cosyvoice.runtime.command import seed_all

    seed_all(args.seed)
    with_more = f"{args.model}_training"  # the part with what only its training needs, where a recipe has that
    part = built(args, recipe, with_more, {with_more: None}) or built(args, recipe, args.model)
    start = args.checkpoint or args.ref_model
    if start is not None:
        load_weights(part, start)
    elif args.model == "llm" and args.qwen_pretrain_path is not None:
        start_from_text_model(part, args.qwen_pretrain_path)
    if args.dpo:
        reference = built(args, recipe, args.model)
        load_weights(reference, args.ref_model)
        return PreferenceModel(part, reference, train_conf, args.seed)
    kind = VocoderModel if args.model == "hifigan" else SpeechModel
    return kind(part, train_conf, args.seed)


def check_fits(args: argparse.Namespace, model: "RecipeModel") -> None:
    """Raises InputError where the weights alone need more memory to be trained than there is."""
    from cosyvoice.bin.memory import check_memory
    from cosyvoice.runtime.device import fastest_device

    if args.train_engine == "deepspeed":  # shares the optimiser out
        return
    device = fastest_device()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_memory(model.part, args.model, device, precision(args, device.type) != "32-true", processes)


def load_weights(part: "nn.Module", path: Path) -> None:
    """A vocoder's generator may come without its discriminators, which then start anew."""
    from cosyvoice.model_folder.weights import load_strict, read_state_dict

    state = read_state_dict(path)
    if hasattr(part, "discriminator"):
        judges = {name: tensor for name, tensor in state.items() if name.startswith("discriminator.")}
        if judges:
            load_strict(part.discriminator, {k.partition(".")[2]: v for k, v in judges.items()}, str(path))
        else:
            print(f"{path} holds no discriminator: it starts from random weights", file=sys.stderr)
        part, state = part.generator, {name: state[name] for name in state.keys() - judges.keys()}
    load_strict(part, state, str(path))


def build_loaders(args: argparse.Namespace, steps: list[Any]) -> "tuple[EpochLoader, EpochLoader]":
    from cosyvoice.dataset.dataset import Dataset
    from cosyvoice.dataset.loader import EpochLoader
    from cosyvoice.runtime.device import cuda_problem

    options = {"gan": args.model == "hifigan", "dpo": args.dpo, "seed": args.seed}
    train = Dataset(args.train_data, steps, **options)
    held_out = Dataset(args.cv_data, steps, "dev", shuffle=False, partition=False, **options)
    pinned = args.pin_memory and not cuda_problem()
    loaders = [EpochLoader(data, args.num_workers, args.prefetch, pinned) for data in (train, held_out)]
    return loaders[0], loaders[1]


def epochs(args: argparse.Namespace, train_conf: dict[str, Any]) -> int:
    return args.max_epoch or train_conf["max_epoch"]


def continue_from(
    last: Path, state: dict[str, Any], model: "RecipeModel", loader: "EpochLoader", wanted: int
) -> None:
    from cosyvoice.bin.recipe_checkpoints import read_progress

    loader.epoch, loader.skip = read_progress(last, state, model)
    if loader.epoch > wanted:
        raise InputError(f"{last} has done {loader.epoch} epochs, not {wanted}; give another --model_dir to train anew")
    print(f"continuing {last} ({loader.epoch} epochs done)", file=sys.stderr)


def build_trainer(
    args: argparse.Namespace, train_conf: dict[str, Any], callbacks: "list[pl.Callback]"
) -> "pl.Trainer":
    from pytorch_lightning.loggers import TensorBoardLogger

    from cosyvoice.bin.quiet_trainer import quiet_trainer
    from cosyvoice.bin.recipe_checkpoints import CheckpointWriter
    from cosyvoice.runtime.device import fastest_device

    device = fastest_device().type
    if world_size() > 1 and args.dist_backend == "nccl" and device != "cuda":
        raise InputError("nccl connects GPUs, and there is none; use --ddp.dist_backend gloo")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    automatic = args.model != "hifigan"
    return quiet_trainer(
        device,
        callbacks,
        devices=local,
        num_nodes=world_size() // local,
        strategy=strategy(args),
        precision=precision(args, device),
        max_epochs=epochs(args, train_conf),
        # otherwise the model clips its gradients
        gradient_clip_val=train_conf["grad_clip"] if args.train_engine == "deepspeed" else None,
        accumulate_grad_batches=train_conf.get("accum_grad", 1) if automatic else 1,
        log_every_n_steps=train_conf.get("log_interval", 100),
        plugins=CheckpointWriter() if args.train_engine == "torch_ddp" else None,
        logger=TensorBoardLogger(args.tensorboard_dir, name="", version=""),
        inference_mode=False,  # mel filters that validation makes are kept, and training differentiates through them
        use_distributed_sampler=False,
    )


def strategy(args: argparse.Namespace) -> Any:
    """One process needs none; the vocoder's two sides leave each other's weights without gradients."""
    if args.train_engine == "deepspeed":
        from pytorch_lightning.strategies import DeepSpeedStrategy

        return DeepSpeedStrategy(config=str(args.deepspeed_config))
    if world_size() == 1:
        return "auto"
    from pytorch_lightning.strategies import DDPStrategy

    unused = args.model == "hifigan"
    return DDPStrategy(process_group_backend=args.dist_backend, find_unused_parameters=unused)


def precision(args: argparse.Namespace, device: str) -> str:
    """The vocoder's Fourier transforms have no half precision, and most CPUs gain nothing from it."""
    import torch

    from cosyvoice.runtime.device import cpu_has_bfloat16

    if not args.use_amp or args.model == "hifigan":
        return "32-true"
    if device == "cpu":
        return "bf16-mixed" if cpu_has_bfloat16() else "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


if __name__ == "__main__":
    run(main)
