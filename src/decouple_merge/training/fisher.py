"""Fisher information: how much the loss of an expert depends on each of its parameters."""

from collections.abc import Iterable

import torch

from ..data.batches import Batch
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..merging.arithmetic import Tensors, cast
from ..merging.keys import check_same_keys
from ..models.base import Base
from ..seeds import generator
from .gradient import NoisyBatch, dtype_of, frozen_copy, loss_and_gradients, noisy_batch, with_leaves


def fisher_information(
    base: Base,
    expert: Tensors,
    own: TimestepRange,
    batches: Iterable[Batch],
    seed: int,
    device: torch.device,
) -> Tensors:
    """Estimate the diagonal empirical Fisher information of an expert on its own timesteps.

    F = mean of (∂ℓ/∂θ_i)² over samples, ℓ = ‖target - f_θi(x_t, t)‖² of one sample: what Matena and Raffel 2022 weigh
    by, with the data's target in the place of one drawn from the model (the empirical Fisher, Kunstner et al. 2019).
    Gradients are squared sample by sample: the square of a batch's mean gradient is another quantity. Noise and
    timesteps of batch b depend only on (seed, b).

    Returns:
        Float32 tensors >= 0 with the expert's keys and shapes, as ``rules.fisher`` takes them; 0 where the loss
        doesn't depend on a tensor.

    Raises:
        UserError: the expert doesn't have the base's keys and shapes, or there are no images.
    """
    check_same_keys(base.network.state_dict(), expert, "the expert")
    network = frozen_copy(base, [expert], device)
    tensors, leaves = with_leaves(cast({k: v.to(device) for k, v in expert.items()}, dtype_of(base)))
    sums = [torch.zeros_like(leaf) for leaf in leaves.values()]
    num_samples, scale = 0, torch.ones(1)
    for index, images in enumerate(batches):
        batch = noisy_batch(base, images, own, generator(seed, "fisher", index))
        for i in torch.arange(len(batch.t)).split(1):
            one = NoisyBatch(batch.x_t[i], batch.t[i], batch.target[i], {k: v[i] for k, v in batch.condition.items()})
            _, gradients = loss_and_gradients(base, network, tensors, leaves, one, scale, device)
            torch._foreach_addcmul_(sums, gradients, gradients)
        num_samples += len(images)
    if num_samples == 0:
        raise UserError("found no images, expected at least one batch: the information is a mean over samples")
    means = {key: total / num_samples for key, total in zip(leaves, sums, strict=True)}
    return {k: means[k].float().cpu() if k in means else torch.zeros(v.shape) for k, v in expert.items()}
