"""Merging weights learned by the gradient of the denoising loss."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.batches import Batch
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..merging.arithmetic import Model, Tensors, inner_products
from ..merging.keys import check_same_keys
from ..merging.merger import Merger
from ..models.base import Base
from ..models.network import blank_network
from ..seeds import generator
from ..training.gradient import NoisyBatch, dtype_of, loss_and_gradients, noisy_batch, with_leaves


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
        timestep_weights: λ >= 0, [T], of a flow's timesteps rounded down; 1 where not given. An ε-model's loss is
            largest at the cleanest timesteps, which then decide; the inverse of the base's loss on each range lets
            every range count alike.

    Raises:
        UserError: an expert doesn't have the base's keys and shapes, the patterns don't fit the keys, or the timestep
            weights are negative or not one for each timestep.
    """

    def __init__(
        self,
        base: Base,
        experts: Sequence[Model],
        device: torch.device,
        patterns: Sequence[str] = ("*",),
        timestep_weights: Float[Tensor, " T"] | None = None,
    ) -> None:
        num = base.num_train_timesteps
        self.timestep_weights = torch.ones(num) if timestep_weights is None else timestep_weights
        if len(self.timestep_weights) != num or not bool((self.timestep_weights >= 0).all()):
            raise UserError(
                f"found {len(self.timestep_weights)} timestep weights, the least {self.timestep_weights.min():g}; "
                f"expected {num}, one for each timestep, none below 0"
            )
        start = base.network.state_dict()
        for index, expert in enumerate(experts):
            check_same_keys(start, expert, f"expert {index}")
        self.base, self.experts, self.num_experts, self.device = base, experts, len(experts), device
        self.merger = Merger(start, experts, patterns=patterns, dtype=dtype_of(base), device=device)
        # Its weights are those of each merge.
        self.network = blank_network(base, dtype_of(base), device, self.merger.has_trunk, without_memory=True)
        self.merged: Tensors = {}

    def merge(self, weights: Float[Tensor, "patterns experts"]) -> Tensors:
        """Merge the experts; the next call overwrites the tensors.

        Raises:
            UserError: there are not as many rows as patterns and columns as experts.
        """
        expected = (len(self.merger.patterns), self.num_experts)
        if weights.shape != expected:
            raise UserError(
                f"weights are {tuple(weights.shape)}, expected {expected}: a row for each pattern, a column for each "
                "expert"
            )
        self.merged = self.merger.merge(weights.flatten().tolist(), self.merged)
        return self.merged

    def __call__(
        self, weights: Float[Tensor, "patterns experts"], batch: NoisyBatch
    ) -> tuple[float, Float[Tensor, "patterns experts"]]:
        """Compute the loss on a batch, and its gradient in the weights, float64 on the CPU."""
        tensors, leaves = with_leaves(self.merge(weights))
        scale = self.timestep_weights[batch.t.long()]
        loss, found = loss_and_gradients(self.base, self.network, tensors, leaves, batch, scale, self.device)
        gradients = dict(zip(leaves, found, strict=True))
        start = self.base.network.state_dict()
        return loss, torch.stack(
            [
                inner_products(start, self.experts, gradients, [k for k in keys if k in gradients], self.device)
                for keys in self.merger.keys
            ]
        )


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
        UserError: a start weight is out of bounds, the batches end too early, or the loss is no longer finite.
    """
    low, high = bounds
    if not bool(((start >= low) & (start <= high)).all()):
        raise UserError(f"start weights are {start.tolist()}, expected all within the bounds {low} to {high}")
    everything = TimestepRange(0, loss.base.num_train_timesteps)
    weights = start.detach().double().clone()
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    for step in range(num_steps):
        images = next(batches, None)
        if images is None:
            raise UserError(f"the batches ended after {step}, expected one for each of {num_steps} steps")
        batch = noisy_batch(loss.base, images, everything, generator(seed, "merging weights", step))
        value, weights.grad = loss(weights, batch)
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {step} with weights {weights.tolist()}; narrow the bounds, or check the "
                "experts for NaN and infinity"
            )
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
        optimizer.step()
        weights.clamp_(low, high)
        yield WeightRecord(step + 1, value, weights.tolist())
