"""The choice between CPU and GPU."""

import math
import os
import re
import sys
from pathlib import Path

import torch

MEMORY_FILE = Path("/proc/meminfo")  # of Linux


def fastest_device() -> torch.device:
    """Return a GPU if one can compute, else the CPU, and then say why if there is a GPU."""
    problem = cuda_problem()
    if problem and torch.cuda.is_available():
        print(f"{problem}: computing on the CPU", file=sys.stderr)
    return torch.device("cpu" if problem else "cuda")


def cpu_has_bfloat16() -> bool:
    """Return whether this processor has bfloat16 instructions, with which it multiplies several times faster."""
    return torch.cpu._is_avx512_bf16_supported()


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes can still be allocated on the device, or None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if not MEMORY_FILE.is_file():
        return None
    found = re.search(r"^MemAvailable: *(\d+) kB", MEMORY_FILE.read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def total_memory(device: torch.device) -> float:
    """Return the bytes of a GPU or of the computer, infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cuda_problem() -> str:
    """Return why the GPU cannot compute, or an empty string if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    major, minor = torch.cuda.get_device_capability()
    known = [int(number) for number in re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))]
    if known and 10 * major + minor < min(known):
        return f"{torch.cuda.get_device_name()} is older than the cards that this torch computes on"
    return ""
