"""Optimisers and schedules by the names of a recipe's `train_conf`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.scheduler import ConstantLR, CosineLR, NoamHoldAnnealing, WarmupLR

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


SCHEDULERS = {
    "warmuplr": WarmupLR,
    "constantlr": ConstantLR,
    "NoamHoldAnnealing": NoamHoldAnnealing,
    "cosine": CosineLR,
}


def build(
    parameters: Iterable[nn.Parameter], train_conf: dict[str, Any], suffix: str = ""
) -> tuple[Optimizer, LRScheduler]:
    """Of the keys `optim`, `optim_conf`, `scheduler`, `scheduler_conf`, each followed by `suffix`.

    Raises InputError for a name or a keyword that is not known.
    """
    make_optimizer = choose(OPTIMIZERS, f"optim{suffix}", train_conf)
    make_scheduler = choose(SCHEDULERS, f"scheduler{suffix}", train_conf)
    try:
        optimizer = make_optimizer(parameters, **train_conf.get(f"optim_conf{suffix}", {}))
        return optimizer, make_scheduler(optimizer, **train_conf.get(f"scheduler_conf{suffix}", {}))
    except TypeError as error:
        raise InputError(f"train_conf: {error}; look at optim_conf and scheduler_conf") from None


def choose(known: dict[str, Any], key: str, train_conf: dict[str, Any]) -> Any:
    name = train_conf.get(key)
    if name not in known:
        raise InputError(f"train_conf: {key} {name!r} is not implemented; use one of {', '.join(known)}")
    return known[name]
