"""The precision of a training: what its network computes in, and the scale that keeps small fp16 gradients."""

from contextlib import AbstractContextManager, nullcontext

import torch

from ..config import Precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Have operations that bear it compute in 16 bits; weights, gradients and losses stay float32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Make what scales the loss of an fp16 training; for other precisions it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
