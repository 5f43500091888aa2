"""How much memory training takes at least."""

import torch
from torch import nn

from cosyvoice.runtime.device import total_memory
from cosyvoice.runtime.errors import InputError

TRAINED_BYTES = 16  # a parameter, its gradient and the optimiser's two averages, in float32
HALF_BYTES = 2  # a copy of a weight for half precision, kept until the gradients are there
PROCESS_BYTES = 500_000_000  # libraries, and on a GPU their workspaces


def check_memory(part: nn.Module, name: str, device: torch.device, in_half: bool, processes: int) -> None:
    """Raise InputError where not even the weights of a part can train on the device, before a single batch.

    in_half: whether training computes in half precision. processes: how many share a CPU's memory.
    """
    weights = sum(parameter.numel() for parameter in part.parameters())
    needed = weights * (TRAINED_BYTES + HALF_BYTES * in_half) + PROCESS_BYTES
    there = total_memory(device)
    if device.type == "cpu":
        there /= processes
    if needed > there:
        what = f"training all {weights / 1e6:.0f} million weights of the {name} takes more than {needed / 1e9:.1f} GB"
        place = "this computer" if device.type == "cpu" else "the GPU"
        remedy = "python prepare_joint_data.py --input-dir FOLDER, then python train_joint.py --mode joint"
        raise InputError(
            f"{what} (weights, gradients, the optimiser's averages), and {place} has {there / 1e9:.1f} GB. "
            f"Train LoRA adapters instead: {remedy}"
        )
