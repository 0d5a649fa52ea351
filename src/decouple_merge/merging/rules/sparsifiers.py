"""Which entries of a task vector stay, and how much they count: trimming, outliers, chance, chance by rank."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import hardshrink

from ...errors import UserError
from .order_statistics import magnitudes_between, num_kept
from .rule import Context, Settings

# Of a flat chunk of τ_i to what is left of it, which may be the same memory. It gets every chunk once, in order.
Keeper = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sparsifier:
    """A way to drop entries of a task vector.

    Attributes:
        keeper: makes the function for an expert, from the context and its place.
        measure: what ``keeper`` finds in ``Context.statistics``, as ``Rule.measure``.
        by_rows: whether the function needs whole rows.
        rescales: whether it divides what stays, and so rounds it.
    """

    keeper: Callable[[Context, int], Keeper]
    measure: Callable[[Tensor, Sequence[Tensor], Context, int], Any] | None = None
    by_rows: bool = False
    rescales: bool = False


def row_length(tensor: Tensor) -> int:
    """Say how many entries belong to one output of a layer; a vector is one row."""
    return tensor[0].numel() if tensor.ndim > 1 and len(tensor) else tensor.numel()


def _density(context: Context, place: int) -> float:
    density = context.settings.density
    return float(density) if isinstance(density, int | float) else float(density[place])


def _kept_by_trimming(base: Tensor, experts: Sequence[Tensor], context: Context, place: int) -> tuple[float, float]:
    num = num_kept(base, _density(context, place))
    return magnitudes_between(base, experts[place], base.numel() - num, 0)


def _kept_but_outliers(base: Tensor, experts: Sequence[Tensor], context: Context, place: int) -> tuple[float, float]:
    num_dropped = base.numel() - num_kept(base, _density(context, place))
    num_large = min(int(context.settings.gamma * base.numel()), num_dropped)
    return magnitudes_between(base, experts[place], num_dropped - num_large, num_large)


def _within(context: Context, place: int) -> Keeper:
    low, high = context.statistics[place]

    def keep(vector: Tensor) -> Tensor:
        kept = vector if low == 0 else hardshrink(vector, _next_below(low, vector.dtype))
        # Equal numbers cancel, others are 0 in one of the two.
        return kept if high == math.inf else kept - hardshrink(vector, max(high, 0.0))

    return keep


def _next_below(number: float, dtype: torch.dtype) -> float:
    return torch.nextafter(torch.tensor(number, dtype=dtype), torch.zeros((), dtype=dtype)).item()


def _by_chance(context: Context, place: int) -> Keeper:
    density, draws = _density(context, place), torch.Generator().manual_seed(context.seeds[place])
    if density == 1:
        return lambda vector: vector
    return lambda vector: vector.mul_(_uniform(vector, draws).lt_(density)).div_(density)


def _uniform(vector: Tensor, draws: torch.Generator) -> Tensor:
    # Drawn on the CPU in float32: masks are the same on every device and in every dtype.
    return torch.rand(vector.shape, generator=draws).to(vector)


def chances_within(weights: Sequence[float], settings: Settings) -> None:
    """Require that what ``della`` keeps entries by are chances, or that it keeps all."""
    epsilon = settings.epsilon
    for density in settings.densities(len(weights)):
        if density != 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise UserError(
                f"density is {density:g} and epsilon {epsilon:g}, expected both their sum and their difference within "
                "0 and 1: they are chances"
            )


def _by_rank(context: Context, place: int) -> Keeper:
    density, epsilon = _density(context, place), context.settings.epsilon
    draws = torch.Generator().manual_seed(context.seeds[place])
    if density == 1:
        return lambda vector: vector
    length = context.statistics[place]

    def keep(vector: Tensor) -> Tensor:
        order = _order(vector.view(-1, length).abs())
        ranks = torch.arange(length, device=vector.device, dtype=vector.dtype)
        by_rank = density + epsilon * (2 * ranks / max(1, length - 1) - 1) if length > 1 else ranks + density
        chance = torch.empty_like(order, dtype=by_rank.dtype).scatter_(1, order, by_rank.expand(order.shape)).view(-1)
        return vector.mul_(_uniform(vector, draws) < chance).div_(chance)

    return keep


def _order(sizes: Float[Tensor, "rows n"]) -> Int64[Tensor, "rows n"]:
    """Order the entries of each row, none below 0, from the smallest on, and of equal ones from the first on."""
    if sizes.device.type != "cpu" or sizes.dtype != torch.float32:
        return sizes.argsort(dim=1, stable=True)
    # The bits of such a number rise with it, and its place below them tells equal ones apart. NumPy sorts whole numbers
    # in a sixth of the time.
    keys = (sizes.view(torch.int32).long() << 32) | torch.arange(sizes.shape[1])
    keys.numpy().sort(axis=1)
    return keys & 0xFFFFFFFF


# The ⌈density·n⌉ largest stay.
TRIM = Sparsifier(_within, _kept_by_trimming)
# As many, but for the largest of all.
OUTLIERS = Sparsifier(_within, _kept_but_outliers)
# Each stays with the chance ``density``, and is divided by it.
DROP = Sparsifier(_by_chance, rescales=True)
# The same with chances from density - ε to density + ε, by the rank in its row.
DROP_BY_RANK = Sparsifier(_by_rank, lambda base, *_: row_length(base), by_rows=True, rescales=True)
