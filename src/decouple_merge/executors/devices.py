"""Which device work runs on, and what it holds there."""

import os
import resource
import sys

import torch

from ..errors import UserError

# Of ``ru_maxrss``, which macOS gives in bytes.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def default_device() -> torch.device:
    """Pick the accelerator of this machine, or its CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was told, before a time is taken; a CPU has done it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_of(device: torch.device) -> int | None:
    """Count the bytes of a device's memory, all that it has; None where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def check_memory(key: str, value: int, num_bytes_each: int, device: torch.device) -> None:
    """Require that what a setting has in memory at once, counted low, is no more than there is.

    Args:
        key: of the setting, a number of things.
        num_bytes_each: that one of them takes at least.

    Raises:
        UserError: says how much it is and how much there is.
    """
    total = memory_of(device)
    if total is not None and value * num_bytes_each > total:
        raise UserError(
            f"{key} is {value}, which takes {value * num_bytes_each / 1e6:,.2f} MB at least, and this machine's "
            f"{device.type} has {total / 1e6:,.2f} MB: lower it"
        )


def device_name(device: torch.device) -> str:
    """Name a device as this process sees it, a GPU with its number."""
    is_one_of_several = device.type == "cuda" and device.index is None
    return f"cuda:{torch.cuda.current_device()}" if is_one_of_several else str(device)


def peak_bytes(device: torch.device) -> int:
    """Say the most that this process has held so far: tensors on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
