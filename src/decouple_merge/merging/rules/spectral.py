"""Rules on the singular values of task matrices. A tensor of more than two dimensions counts as [out, all others]."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .rule import Context
from .sums import task_vector

Factors = tuple[Tensor, Tensor, Tensor]


def iso_c(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Tensor:
    """Iso-C: make the spectrum of the summed task matrices flat (Marczak et al. 2025, section 4).

    θ + λ·s·U·Vᵀ with Σ w_i·τ_i = U·S·Vᵀ and s the mean of S, over the singular values that aren't 0 but for rounding:
    a sum of LoRAs has no other directions. Vectors are averaged, Σ w_i·τ_i / N.
    """
    if base.ndim < 2:
        return context.settings.scale * _mean(base, experts, weights)
    u, s, vh = _decompose(_sum(base, experts, weights))
    return (context.settings.scale * s.mean().nan_to_num() * (u @ vh)).view(base.shape)


def leading_factors(base: Tensor, experts: Sequence[Tensor], context: Context, place: int) -> Factors | None:
    """Compute the first ⌊r/N⌋ singular vectors and values of a task matrix; vectors have none."""
    if base.ndim < 2:
        return None
    num = max(1, min(len(base), base[0].numel()) // len(experts))
    u, s, vh = _decompose(task_vector(base, experts[place]))
    return u[:, :num].clone(), s[:num].clone(), vh[:num].clone()


def num_leading(shape: Sequence[int], num_experts: int) -> int:
    """Count the numbers of ``leading_factors`` of all experts, of a tensor's shape."""
    if len(shape) < 2:
        return 0
    rows, columns = shape[0], math.prod(shape[1:])
    return num_experts * max(1, min(rows, columns) // num_experts) * (rows + columns + 1)


def tsv_m(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Tensor:
    """TSV-M: keep 1/N of each task matrix's singular directions, and make them orthogonal (Gargiulo et al. 2025).

    θ + λ·P(U)·S·P(V)ᵀ, where U, S, V hold the first ⌊r/N⌋ singular vectors and w_i times the values of each τ_i, side
    by side, r = min(out, in), and P(X) = X·(XᵀX)^-½ is the nearest matrix with orthogonal columns. Directions whose
    value is 0 don't count, as those of an expert with weight 0. Vectors are averaged, Σ w_i·τ_i / N.
    """
    if base.ndim < 2:
        return context.settings.scale * _mean(base, experts, weights)
    kept = [(u, s * w, vh) for (u, s, vh), w in zip(context.statistics, weights, strict=True) if w]
    if not kept or not sum(len(s) for _, s, _ in kept):
        return torch.zeros_like(task_vector(base, base))
    lefts, values, rights = zip(*kept, strict=True)
    left, right = _polar(torch.cat(lefts, dim=1)), _polar(torch.cat(rights).T).T
    return (context.settings.scale * (left * torch.cat(values)) @ right).view(base.shape)


def _decompose(matrix: Tensor) -> Factors:
    """Decompose a tensor into the singular directions whose values aren't 0 but for rounding."""
    flat = matrix.reshape(len(matrix), -1)
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    num = int((s > max(flat.shape) * torch.finfo(s.dtype).eps * s.max()).sum()) if s.numel() else 0
    return u[:, :num], s[:num], vh[:num]


def _polar(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def _sum(base: Tensor, experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(task_vector(base, base))
    for expert, weight in zip(experts, weights, strict=True):
        total.add_(task_vector(base, expert), alpha=weight)
    return total


def _mean(base: Tensor, experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return _sum(base, experts, weights) / len(experts)
