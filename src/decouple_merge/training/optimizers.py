"""The optimisers; the one adapter to bitsandbytes."""

from typing import Any

import torch

from ..config import Training


def make_optimizer(groups: list[dict[str, Any]], settings: Training) -> torch.optim.Optimizer:
    """Make the optimiser that the settings name.

    Args:
        groups: of parameters, as torch's optimisers take them.
    """
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
        "eps": settings.eps,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **arguments, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **arguments)
