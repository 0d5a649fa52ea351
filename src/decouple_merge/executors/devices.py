"""Which device work runs on."""

import torch


def default_device() -> torch.device:
    """Pick the accelerator of this machine, or its CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
