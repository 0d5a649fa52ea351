"""Gradients of the denoising loss: learn merging weights with them, and weigh parameters by their squares."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from ..data.batches import Batch, model_input
from ..diffusion.losses import add_noise, per_sample_mse, prediction_target
from ..diffusion.timesteps import TimestepRange, draw_timesteps
from ..merging.arithmetic import Stacked, Tensors, cast, cut_blocks
from ..merging.keys import check_same_keys, has_trunk
from ..models.base import Base, cast_inputs, predict
from ..models.projection import attach_projections
from ..seeds import generator


@dataclass(frozen=True)
class NoisyBatch:
    """A batch to denoise: noisy images, their timesteps, what the network should say of them, and its other inputs."""

    x_t: Float[Tensor, "batch c h w"]
    t: Int[Tensor, " batch"]
    target: Float[Tensor, "batch c h w"]
    condition: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightRecord:
    """A step of learning the weights.

    Attributes:
        step: 1 after the first.
        loss: of the step's batch, at the weights before it.
        weights: after it, a row for each pattern, a number for each expert.
    """

    step: int
    loss: float
    weights: list[list[float]]


def noisy_batch(base: Base, images: Batch, own: TimestepRange, draws: torch.Generator) -> NoisyBatch:
    """Add noise to images or latents at antithetic uniform timesteps of a range; on the CPU, in the network's dtype."""
    x0, condition = model_input(images, draws)
    x0, condition = x0.to(_dtype(base)), cast_inputs(condition, _dtype(base))
    t = draw_timesteps(len(x0), own, base.num_train_timesteps, 0.0, draws, antithetic=True)
    noise = torch.randn(x0.shape, generator=draws).to(x0)
    x_t = add_noise(x0, noise, t, base.alphas_cumprod)
    return NoisyBatch(x_t, t, prediction_target(x0, noise, t, base.alphas_cumprod, base.prediction_type), condition)


def layer_patterns(keys: Iterable[str]) -> list[str]:
    """List one pattern for each layer of a network, for ``group_keys``; inner layers come before those around them."""
    patterns = dict.fromkeys(f"{key.rpartition('.')[0]}.*" if "." in key else "*" for key in keys)
    # A stable sort: layers of equal depth stay in the network's order.
    return sorted(patterns, key=lambda pattern: -pattern.count("."))


class DenoisingLoss:
    """The denoising loss of a merged model as a function of the merging weights, with its gradient.

    L(w) = mean of λ_t·‖target - f_θ(w)(x_t, t)‖² over a batch, with θ(w) = θ + Σ w_i·τ_i (DeMe, Eq. 8), τ_i = θ_i - θ.
    By the chain rule ∂L/∂w_i = ⟨∇L(θ(w)), τ_i⟩: one backward pass of one network, whatever N, and N inner products.
    With several patterns each has its own weights, and the products are over its keys alone.

    Args:
        patterns: of keys, as ``down_blocks.*``; the first that matches counts. ``layer_patterns`` has one a layer.
        timestep_weights: λ >= 0, [T]; 1 where not given. An ε-model's loss is largest at the cleanest timesteps, which
            then decide; the inverse of the base's loss on each range lets every range count alike.
        stacks: base and experts in float32, one for each pattern, where they are in memory already.

    Raises:
        ValueError: an expert doesn't have the base's keys and shapes, the patterns don't fit the keys, or the timestep
            weights are negative or not one for each timestep.
    """

    def __init__(
        self,
        base: Base,
        experts: list[Tensors],
        device: torch.device,
        patterns: Sequence[str] = ("*",),
        timestep_weights: Float[Tensor, " T"] | None = None,
        stacks: list[Stacked] | None = None,
    ) -> None:
        num = base.num_train_timesteps
        self.timestep_weights = torch.ones(num) if timestep_weights is None else timestep_weights
        if len(self.timestep_weights) != num or not bool((self.timestep_weights >= 0).all()):
            raise ValueError(
                f"found {len(self.timestep_weights)} timestep weights, the least {self.timestep_weights.min():g}; "
                f"expected {num}, one for each timestep, none below 0"
            )
        start = base.network.state_dict()
        for index, expert in enumerate(experts):
            check_same_keys(start, expert, f"expert {index}")
        self.base, self.num_experts, self.device = base, len(experts), device
        cut = cut_blocks(start, experts, patterns)
        self.stacks = stacks or [Stacked(*block, device, _dtype(base)) for block in cut]
        self.network = _network(base, experts, device)

    def merge(self, weights: Float[Tensor, "patterns experts"]) -> Tensors:
        """Merge the experts; the next call overwrites the tensors.

        Raises:
            ValueError: there are not as many rows as patterns and columns as experts.
        """
        expected = (len(self.stacks), self.num_experts)
        if weights.shape != expected:
            raise ValueError(
                f"weights are {tuple(weights.shape)}, expected {expected}: a row for each pattern, a column for each "
                "expert"
            )
        merged: Tensors = {}
        for stack, row in zip(self.stacks, weights.tolist(), strict=True):
            merged |= stack.merge(row)
        return merged

    def __call__(
        self, weights: Float[Tensor, "patterns experts"], batch: NoisyBatch
    ) -> tuple[float, Float[Tensor, "patterns experts"]]:
        """Compute the loss on a batch, and its gradient in the weights, float64 on the CPU."""
        tensors, leaves = _with_leaves(self.merge(weights))
        scale = self.timestep_weights[batch.t]
        loss, found = _loss_and_gradients(self.network, tensors, leaves, batch, scale, self.device)
        gradients = dict(zip(leaves, found, strict=True))
        return loss, torch.stack([s.inner_products(gradients) for s in self.stacks])


def learn_weights(
    loss: DenoisingLoss,
    batches: Iterator[Batch],
    start: Float[Tensor, "patterns experts"],
    num_steps: int,
    seed: int,
    bounds: tuple[float, float] = (-0.2, 2.5),
    learning_rate: float = 0.05,
) -> Iterator[WeightRecord]:
    """Learn merging weights by Adam (Kingma & Ba 2015) on the denoising loss over all timesteps; yields every step.

    The rate falls linearly to 0, so that the noise of the last batches hardly moves the result. Weights are clamped to
    the bounds after each step. Noise and timesteps of step s depend only on (seed, s).

    Args:
        batches: training images; one is taken for each step.

    Raises:
        ValueError: a start weight is out of bounds, the batches end too early, or the loss is no longer finite.
    """
    low, high = bounds
    if not bool(((start >= low) & (start <= high)).all()):
        raise ValueError(f"start weights are {start.tolist()}, expected all within the bounds {low} to {high}")
    everything = TimestepRange(0, loss.base.num_train_timesteps)
    weights = start.detach().double().clone()
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    for step in range(num_steps):
        images = next(batches, None)
        if images is None:
            raise ValueError(f"the batches ended after {step}, expected one for each of {num_steps} steps")
        batch = noisy_batch(loss.base, images, everything, generator(seed, "merging weights", step))
        value, weights.grad = loss(weights, batch)
        if not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} at step {step} with weights {weights.tolist()}; narrow the bounds, or check the "
                "experts for NaN and infinity"
            )
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
        optimizer.step()
        weights.clamp_(low, high)
        yield WeightRecord(step + 1, value, weights.tolist())


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
        ValueError: the expert doesn't have the base's keys and shapes, or there are no images.
    """
    check_same_keys(base.network.state_dict(), expert, "the expert")
    network = _network(base, [expert], device)
    tensors, leaves = _with_leaves(cast({k: v.to(device) for k, v in expert.items()}, _dtype(base)))
    sums = [torch.zeros_like(leaf) for leaf in leaves.values()]
    num_samples, scale = 0, torch.ones(1)
    for index, images in enumerate(batches):
        batch = noisy_batch(base, images, own, generator(seed, "fisher", index))
        for i in torch.arange(len(batch.t)).split(1):
            one = NoisyBatch(batch.x_t[i], batch.t[i], batch.target[i], {k: v[i] for k, v in batch.condition.items()})
            _, gradients = _loss_and_gradients(network, tensors, leaves, one, scale, device)
            torch._foreach_addcmul_(sums, gradients, gradients)
        num_samples += len(images)
    if num_samples == 0:
        raise ValueError("found no images, expected at least one batch: the information is a mean over samples")
    means = {key: total / num_samples for key, total in zip(leaves, sums, strict=True)}
    return {k: means[k].float().cpu() if k in means else torch.zeros(v.shape) for k, v in expert.items()}


def _dtype(base: Base) -> torch.dtype:
    return next(base.network.parameters()).dtype


def _network(base: Base, experts: list[Tensors], device: torch.device) -> nn.Module:
    """Copy the base's network for calls with other tensors, with trunk projections where an expert has some."""
    network = copy.deepcopy(base.network).requires_grad_(False).eval()
    attach_projections(network, "trunk" if any(map(has_trunk, experts)) else "none")
    return network.to(device)


def _with_leaves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Make the floating tensors leaves of a graph; returns all tensors, and the leaves alone."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items() if v.is_floating_point()}
    return tensors | leaves, leaves


@torch.enable_grad()
def _loss_and_gradients(
    network: nn.Module, tensors: Tensors, leaves: Tensors, batch: NoisyBatch, scale: Tensor, device: torch.device
) -> tuple[float, tuple[Tensor, ...]]:
    x_t, t, target = batch.x_t.to(device), batch.t.to(device), batch.target.to(device)
    condition = {name: value.to(device) for name, value in batch.condition.items()}
    output = predict(lambda *args, **kwargs: functional_call(network, tensors, args, kwargs), x_t, t, **condition)
    loss = (scale.to(device) * per_sample_mse(output, target)).mean()
    return loss.item(), torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
