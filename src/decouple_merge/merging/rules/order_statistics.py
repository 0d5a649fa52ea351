"""Order statistics of large tensors: exact, and without sorting them."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .sums import CHUNK, chunk_size, task_vector

# Entries that are sorted to know about where a rank lies.
SAMPLE = 1 << 14
# Half a bracket's width, in entries of the sample: three and a half standard deviations of a rank at most.
MARGIN = 224


def order_statistics(values: Callable[..., Tensor], tensors: Sequence[Tensor], ranks: Sequence[int]) -> list[float]:
    """Find the numbers of some ranks among those that a function makes of tensors, entry by entry.

    A sample says between which two values a rank lies. One pass counts what is below, and keeps what is between. Where
    the sample was wrong, all are searched.

    Args:
        values: of flat chunks, one of each tensor, to a number for each entry. NaN counts as the largest.
        tensors: of one shape.
        ranks: in [1, n]; 1 is the smallest.
    """
    flat = [t.reshape(-1) for t in tensors]
    num = len(flat[0])
    if num <= 4 * SAMPLE:
        whole = values(*flat)
        return [whole.kthvalue(k).values.item() for k in ranks]
    sample = values(*(t[:: num // SAMPLE] for t in flat)).sort().values
    brackets = [_bracket(sample, k / num) for k in ranks]
    num_below, between = [0] * len(ranks), [list[Tensor]() for _ in ranks]
    for chunks in zip(*(t.split(chunk_size(flat[0], CHUNK)) for t in flat), strict=True):
        numbers = values(*chunks)
        for i, (low, high) in enumerate(brackets):
            num_below[i] += int(torch.count_nonzero(numbers < low))
            between[i].append(numbers[(numbers >= low) & (numbers <= high)])
    found = [_chosen(torch.cat(kept), k - below) for kept, k, below in zip(between, ranks, num_below, strict=True)]
    return [
        values(*flat).kthvalue(k).values.item() if value is None else value
        for value, k in zip(found, ranks, strict=True)
    ]


def _bracket(ordered: Tensor, share: float) -> tuple[float, float]:
    """Pick two values of a sample between which a share of all values very likely ends."""
    place = int(share * len(ordered))
    low = -math.inf if place < MARGIN else ordered[place - MARGIN].item()
    high = math.inf if place + MARGIN >= len(ordered) else ordered[place + MARGIN].item()
    return low, high


def _chosen(kept: Tensor, rank: int) -> float | None:
    return kept.kthvalue(rank).values.item() if 1 <= rank <= len(kept) else None


def magnitude(base: Tensor, expert: Tensor) -> Tensor:
    """Compute |θ_i - θ|."""
    return task_vector(base, expert).abs_()


def magnitudes_between(base: Tensor, expert: Tensor, num_small: int, num_large: int) -> tuple[float, float]:
    """Find which sizes of entries of θ_i - θ stay when so many of the smallest and of the largest are dropped.

    Others as large as the last that stays do so, too.
    """
    num = expert.numel()
    if num_small + num_large >= num:
        return math.inf, math.inf
    ranks = [num_small + 1] * (num_small > 0) + [num - num_large] * (num_large > 0)
    found = iter(order_statistics(magnitude, [base, expert], ranks) if ranks else [])
    return next(found) if num_small > 0 else 0.0, next(found) if num_large > 0 else math.inf


def num_kept(tensor: Tensor, density: float) -> int:
    """Count what ``density`` keeps: ⌈density·n⌉."""
    return min(math.ceil(density * tensor.numel()), tensor.numel())
