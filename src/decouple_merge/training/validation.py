"""The validation loss, by range."""

import torch
from torch import nn

from ..data.batches import Batch, model_input
from ..diffusion.losses import per_sample_mse
from ..diffusion.timesteps import TimestepRange
from ..models.base import Base
from ..models.network import predict
from ..seeds import generator

# Images at once, where there is memory for them.
MAX_VALIDATED = 128


@torch.no_grad()
def validation_losses(
    network: nn.Module,
    images: Batch,
    base: Base,
    ranges: tuple[TimestepRange, ...],
    device: torch.device,
    batch_size: int,
) -> list[float]:
    """Compute the denoising loss on each range, always on the same noise and on evenly spread timesteps.

    Args:
        images: held-out images, or their latents with captions.

    Returns:
        The mean squared error in the units of the network's output, one number for each range.
    """
    x0, condition = model_input(images, generator("validation latents"))
    noise = torch.randn(x0.shape, generator=generator("validation noise"))
    losses = []
    for own in ranges:
        t = base.process.spread(own, len(x0))
        x_t, target = base.process.mix(x0, noise, t), base.process.target(x0, noise, t)
        total = 0.0
        for batch in torch.arange(len(x0)).split(batch_size):
            other = {name: value[batch].to(device) for name, value in condition.items()}
            output = predict(base, network, x_t[batch].to(device), t[batch].to(device), **other)
            total += float(per_sample_mse(output, target[batch].to(device)).cpu().double().sum())
        losses.append(total / len(x0))
    return losses
