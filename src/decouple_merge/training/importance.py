"""How much the loss on a range depends on each weight, as structured pruning asks."""

from collections.abc import Iterable

import torch

from ..data.batches import Batch
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..merging.arithmetic import Tensors
from ..models.base import Base
from ..seeds import generator
from .gradient import frozen_copy, loss_and_gradients, noisy_batch, with_leaves


def taylor_products(
    base: Base, own: TimestepRange, batches: Iterable[Batch], seed: int, device: torch.device
) -> Tensors:
    """Compute g·θ of the base's weights, g the gradient of the mean denoising loss on a range.

    Minus g·θ is to first order what the loss changes by when a weight is set to zero (Molchanov et al. 2017). Noise and
    timesteps of batch b depend only on (seed, b).

    Returns:
        Float64 tensors with the network's keys and shapes, on the CPU.

    Raises:
        UserError: there are no images.
    """
    network = frozen_copy(base, [], device)
    tensors, leaves = with_leaves(dict(network.state_dict()))
    sums, num, scale = [torch.zeros_like(leaf) for leaf in leaves.values()], 0, torch.ones(1)
    for index, images in enumerate(batches):
        batch = noisy_batch(base, images, own, generator(seed, "importance", index))
        _, gradients = loss_and_gradients(base, network, tensors, leaves, batch, scale, device)
        torch._foreach_add_(sums, gradients)
        num += 1
    if num == 0:
        raise UserError("found no images, expected at least one batch: importance is a mean over samples")
    pairs = zip(leaves.items(), sums, strict=True)
    return {key: (leaf.detach().double() * total.double() / num).cpu() for (key, leaf), total in pairs}
