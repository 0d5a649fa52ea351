"""SCE, which keeps the entries that the experts differ in."""

import torch
from torch import Tensor

from .elections import elected_signs, sum_agreeing
from .order_statistics import order_statistics
from .rule import Context
from .sums import SMALL_CHUNK, Pointwise, chunk_size, task_vector, wide_dtype


def sce(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Pointwise:
    """SCE: select, calculate, erase (Wan et al. 2024).

    Of v_i = w_i·τ_i the entries stay in which the experts differ most: ``density``, the least of the experts', of those
    whose variance isn't 0. Expert i counts c_i = Σ v_i² over what stays. The merge is θ + λ·Σ_A c_i·v_i / Σ_A c_i, with
    A those whose sign is that of Σ v_i; where that is 0, as in ``ties``, θ.
    """
    num, kept = len(experts), _most_differing(base, experts, weights, min(context.settings.densities(len(experts))))
    energies = [0.0] * num
    size = chunk_size(base.reshape(-1), SMALL_CHUNK)
    for start, *others in zip(*(t.reshape(-1).split(size) for t in (base, *experts, *kept)), strict=True):
        vectors = _vectors(start, others[:num], weights, others[num:])
        energies = [e + float(v.dot(v)) for e, v in zip(energies, vectors, strict=True)]
    # Where nothing stays, it doesn't matter.
    counts = [e / (sum(energies) or 1.0) for e in energies]

    def change(start: Tensor, others: list[Tensor]) -> Tensor:
        vectors = _vectors(start, others[:num], weights, others[num:])
        elected = elected_signs(vectors, [1.0] * num)
        total, count = sum_agreeing(vectors, elected, counts, counts)
        return total.mul_(elected).mul_(context.settings.scale).div_(count)

    return Pointwise(change, beside=kept)


def _vectors(start: Tensor, others: list[Tensor], weights: list[float], kept: list[Tensor]) -> list[Tensor]:
    vectors = [task_vector(start, o).mul_(w) for o, w in zip(others, weights, strict=True)]
    return [v.mul_(mask) for v in vectors for mask in kept] if kept else vectors


def _most_differing(base: Tensor, experts: list[Tensor], weights: list[float], density: float) -> list[Tensor]:
    """Mark the ⌊density·n⌋ entries of the largest variance of the n whose variance isn't 0, as a mask; none for all."""
    if density == 1:
        return []
    variance = torch.empty(base.numel(), dtype=wide_dtype(base), device=base.device)
    size = chunk_size(variance, SMALL_CHUNK)
    for out, start, *others in zip(*(t.reshape(-1).split(size) for t in (variance, base, *experts)), strict=True):
        vectors = _vectors(start, others, weights, [])
        mean = sum(vectors, torch.zeros_like(out)).div_(len(vectors))
        out.zero_()
        for vector in vectors:
            vector.sub_(mean)
            out.addcmul_(vector, vector)
    num_kept = int(density * int(torch.count_nonzero(variance)))
    if num_kept == 0:
        return [torch.zeros_like(variance, dtype=torch.bool)]
    [floor] = order_statistics(lambda values: values, [variance], [len(variance) - num_kept + 1])
    return [variance >= floor]
