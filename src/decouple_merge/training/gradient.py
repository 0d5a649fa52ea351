"""The denoising loss with given weights, on a batch drawn for it, and its gradients in them."""

import copy
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.func import functional_call

from ..data.batches import Batch, model_input
from ..diffusion.losses import per_sample_mse
from ..diffusion.timesteps import TimestepRange
from ..merging.arithmetic import Tensors
from ..merging.keys import has_trunk
from ..models.base import Base
from ..models.network import cast_inputs, predict
from ..models.projection import attach_projections


@dataclass(frozen=True)
class NoisyBatch:
    """A batch to denoise: noisy images, their timesteps, what the network should say of them, and its other inputs."""

    x_t: Float[Tensor, "batch ..."]
    t: Real[Tensor, " batch"]
    target: Float[Tensor, "batch ..."]
    condition: dict[str, Tensor] = field(default_factory=dict)


def noisy_batch(base: Base, images: Batch, own: TimestepRange, draws: torch.Generator) -> NoisyBatch:
    """Add noise to images or latents at antithetic timesteps of a range; on the CPU, in the network's dtype."""
    x0, condition = model_input(images, draws)
    x0, condition = x0.to(dtype_of(base)), cast_inputs(condition, dtype_of(base))
    t = base.process.draw(len(x0), own, 0.0, draws, antithetic=True)
    noise = torch.randn(x0.shape, generator=draws).to(x0)
    return NoisyBatch(base.process.mix(x0, noise, t), t, base.process.target(x0, noise, t), condition)


def dtype_of(base: Base) -> torch.dtype:
    """Say what a base's network computes in."""
    return next(base.network.parameters()).dtype


def frozen_copy(base: Base, experts: list[Tensors], device: torch.device) -> nn.Module:
    """Copy the base's network for calls with other tensors, with trunk projections where an expert has some."""
    network = copy.deepcopy(base.network).requires_grad_(False).eval()
    attach_projections(network, base.family, "trunk" if any(map(has_trunk, experts)) else "none")
    return network.to(device)


def with_leaves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Make the floating tensors leaves of a graph; returns all tensors, and the leaves alone."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items() if v.is_floating_point()}
    return tensors | leaves, leaves


@torch.enable_grad()
def loss_and_gradients(
    base: Base,
    network: nn.Module,
    tensors: Tensors,
    leaves: Tensors,
    batch: NoisyBatch,
    scale: Tensor,
    device: torch.device,
) -> tuple[float, tuple[Tensor, ...]]:
    """Compute the mean of scale·‖target - f(x_t, t)‖², with tensors as the weights of f, and its gradient in leaves."""
    x_t, t, target = batch.x_t.to(device), batch.t.to(device), batch.target.to(device)
    condition = {name: value.to(device) for name, value in batch.condition.items()}
    output = predict(base, lambda *args, **kwargs: functional_call(network, tensors, args, kwargs), x_t, t, **condition)
    loss = (scale.to(device) * per_sample_mse(output, target)).mean()
    return loss.item(), torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
