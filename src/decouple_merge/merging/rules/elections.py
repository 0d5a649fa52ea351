"""Rules that sum what sparsifiers leave of the task vectors, with or without an election of signs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UserError
from .rule import Context, Settings
from .sparsifiers import DROP, DROP_BY_RANK, OUTLIERS, TRIM, Sparsifier, row_length
from .sums import Answer, Pointwise, exact_dtype, task_vector, wide_dtype

# A sum of votes that is smaller than this share of their sizes is 0 but for rounding: weights such as 0.1 + 0.2 and
# 0.3 meet in the 54th bit, and float32 task vectors carry no more than 24.
TIE = 2.0**-40
# The same of task vectors that were divided by a chance, and so rounded to 24 bits.
ROUNDED_TIE = 2.0**-22
# Below this share a sum of float32 may be 0 but for rounding, and is summed again in float64.
DOUBT = 2.0**-16


def add(
    base: Tensor, experts: list[Tensor], weights: list[float], context: Context, sparsifier: Sparsifier
) -> Pointwise:
    """Sum what is left of the task vectors: θ + λ·Σ w_i·τ̂_i, divided as ``Settings.normalize`` says."""
    keepers, factor = [sparsifier.keeper(context, i) for i in range(len(experts))], _factor(weights, context)

    def change(start: Tensor, others: list[Tensor]) -> Tensor:
        total = torch.zeros_like(start, dtype=wide_dtype(start))
        for keep, other, weight in zip(keepers, others, weights, strict=True):
            total.add_(keep(task_vector(start, other)), alpha=weight * factor)
        return total

    return Pointwise(change, row_length(base) if sparsifier.by_rows else 1)


def _factor(weights: list[float], context: Context) -> float:
    """Say what a sum of all experts is multiplied by."""
    total, size = math.fsum(weights), math.fsum(map(abs, weights))
    # Weights such as 0.1, 0.2 and -0.3 add up to a rounding.
    divisors = {"none": 1.0, "count": float(len(weights)), "weights": total if abs(total) > ROUNDED_TIE * size else 1.0}
    return context.settings.scale / divisors[context.settings.normalize or "none"]


def elect(
    base: Tensor, experts: list[Tensor], weights: list[float], context: Context, sparsifier: Sparsifier
) -> Pointwise:
    """Elect a sign for each entry, and average what is left of the task vectors that have it.

    θ + λ·mean of w_i·τ̂_i over A with γ = sgn(Σ w_i·τ̂_i), or of their signs' sum where ``vote`` is ``count``, and
    A = {i : sgn(w_i·τ̂_i) = γ}, entry by entry. The mean is a sum divided by the number of A, by their weights' sum or
    not at all, as ``normalize`` says.

    Where the votes cancel, nobody is elected and the entry stays θ: γ = 0 where |Σ w_i·τ̂_i| ≤ 2⁻⁴⁰·Σ |w_i·τ̂_i|, summed
    in float64; 2⁻²² of what a sparsifier has rescaled.
    """
    keepers, normalize = [sparsifier.keeper(context, i) for i in range(len(experts))], context.settings.normalize
    by_sum, tie = context.settings.vote == "sum", ROUNDED_TIE if sparsifier.rescales else TIE
    counts = [abs(w) if normalize == "weights" else math.copysign(1.0, w) for w in weights]

    def change(start: Tensor, others: list[Tensor]) -> Tensor:
        vectors = [keep(task_vector(start, other)) for keep, other in zip(keepers, others, strict=True)]
        elected = elected_signs(vectors, weights, tie) if by_sum else _majority(vectors, weights)
        total, count = sum_agreeing(vectors, elected, weights, counts)
        return total.mul_(elected).mul_(context.settings.scale).div_(1.0 if normalize == "none" else count)

    return Pointwise(change, row_length(base) if sparsifier.by_rows else 1)


def elected_signs(vectors: list[Tensor], weights: list[float], tie: float = TIE) -> Tensor:
    """Compute sgn Σ w_i·v_i, entry by entry; 0 where it is 0 but for rounding, at most ``tie`` times its parts."""
    total, size = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total.add_(vector, alpha=weight)
        size.add_(vector.abs(), alpha=abs(weight))
    signs = total.sign()
    doubtful = ((total.abs_() <= size * DOUBT) & (size > 0)).nonzero().flatten()
    if len(doubtful):
        votes = [v[doubtful].to(exact_dtype(v)) * w for v, w in zip(vectors, weights, strict=True)]
        exact = sum(votes, torch.zeros_like(votes[0]))
        sizes = sum((v.abs() for v in votes), torch.zeros_like(exact))
        signs[doubtful] = torch.where(exact.abs() > tie * sizes, exact.sign(), 0.0).to(signs)
    return signs


def _majority(vectors: list[Tensor], weights: list[float]) -> Tensor:
    """Compute sgn Σ sgn(w_i·v_i), entry by entry."""
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total.add_(vector.sign(), alpha=float(weight > 0) - float(weight < 0))
    return total.sign_()


def sum_agreeing(
    vectors: list[Tensor], elected: Tensor, weights: list[float], counts: list[float]
) -> tuple[Tensor, Tensor]:
    """Sum w_i·v_i over the experts whose w_i·v_i has the elected sign, and count them; overwrites the vectors.

    Args:
        counts: what an expert counts, times the sign of its weight.

    Returns:
        Σ_A w_i·v_i·γ, and what it is divided by, 1 where there is nobody or the counts cancel but for rounding.
    """
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    counted = [math.copysign(1.0, w) * c for w, c in zip(weights, counts, strict=True)]
    size = torch.zeros_like(elected) if min(counted) < 0 < max(counted) else None
    for vector, weight, each in zip(vectors, weights, counts, strict=True):
        if weight != 0:
            # w·v·γ > 0 where the expert agrees, of which the sign of w is left for the sum.
            vector.mul_(elected)
            agreeing = vector.clamp_(min=0) if weight > 0 else vector.clamp_(max=0)
            total.add_(agreeing, alpha=weight)
            count.add_(agreeing.sign_(), alpha=each)
            if size is not None:
                size.add_(agreeing.abs_(), alpha=abs(each))
    nobody = count == 0 if size is None else count.abs() <= ROUNDED_TIE * size
    return total, count.masked_fill_(nobody, 1)


def ties(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Pointwise:
    """TIES: trim, elect a sign, average those who agree (Yadav et al. 2023, algorithm 1).

    τ̂_i has the ``density`` largest entries of τ_i; equal weights λ are the paper's. The paper trims over the whole task
    vector, this over each tensor, since no more than a tensor is ever in memory.
    """
    return elect(base, experts, weights, context, TRIM)


def breadcrumbs(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Pointwise:
    """Sum task vectors without their outliers and small entries (Davari and Belilovsky 2024, section 3).

    Of each tensor's ⌈density·n⌉ entries stay: the largest but for the ``gamma``·n largest of all, or for fewer where
    the density leaves no room.
    """
    return add(base, experts, weights, context, OUTLIERS)


def breadcrumbs_ties(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Pointwise:
    """``breadcrumbs``' choice of entries in the place of TIES' trimming."""
    return elect(base, experts, weights, context, OUTLIERS)


def dare(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Answer:
    """DARE: drop entries of τ_i at random, rescale the others, θ + Σ w_i·m_i·τ_i / density (Yu et al. 2024, Eq. 3)."""
    if set(context.settings.densities(len(experts))) == {1.0}:
        # Nothing is dropped. A weight of 1 then gives the expert to the bit, which θ + (θ_i - θ) doesn't.
        factor = _factor(weights, context)
        return [1.0 - factor * math.fsum(weights), *(factor * w for w in weights)]
    return add(base, experts, weights, context, DROP)


def dare_ties(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Pointwise:
    """DARE's drop and rescale in the place of TIES' trimming (Yu et al. 2024, section 3.2)."""
    return elect(base, experts, weights, context, DROP)


def della(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Pointwise:
    """DELLA: drop at random by rank, rescale, elect, average those who agree (Deep et al. 2024, section 3).

    An entry of rank r among the L of its row, the smallest first, stays with p = density - ε + 2ε·r / (L - 1), and is
    divided by p.

    Raises:
        UserError: density ± ε are no chances.
    """
    return elect(base, experts, weights, context, DROP_BY_RANK)


def della_linear(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Pointwise:
    """``della`` without the election: θ + λ·Σ w_i·τ̂_i."""
    return add(base, experts, weights, context, DROP_BY_RANK)


def emr(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Pointwise:
    """Elect one vector: the sign of Σ w_i·τ_i, and the largest size with that sign (EMR; Huang et al. 2024).

    θ + λ·w_k·τ_k with k the expert whose w_i·τ_i is the largest with the elected sign γ, entry by entry. Its
    masks and scales for each expert are ``merging.masks``'.
    """

    def change(start: Tensor, others: list[Tensor]) -> Tensor:
        vectors = [task_vector(start, o) for o in others]
        elected, largest = elected_signs(vectors, weights), torch.zeros_like(vectors[0])
        for vector, weight in zip(vectors, weights, strict=True):
            torch.maximum(largest, vector.mul_(elected).mul_(weight), out=largest)
        return largest.mul_(elected).mul_(context.settings.scale)

    return Pointwise(change)


def enough_tasks(weights: Sequence[float], settings: Settings) -> None:
    """Require that ``consensus`` can keep anything of so many experts."""
    num, most = len(weights), len(weights) if settings.max_tasks is None else min(settings.max_tasks, len(weights))
    if settings.min_tasks > most:
        asked = "" if settings.max_tasks is None else f" and max_tasks {settings.max_tasks}"
        raise UserError(
            f"min_tasks is {settings.min_tasks}{asked} with {num} experts, so that nothing is kept; expected at most "
            f"{most}"
        )


def consensus(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Pointwise:
    """Consensus by TALL masks: keep the entries that several experts need (Wang et al. 2024).

    θ + Σ w_i·τ_i where ``min_tasks`` to ``max_tasks`` masks are set, else θ. That of expert i is
    |v_i| > λ·|Σ_j v_j - v_i| with v_i = w_i·τ_i and λ = ``threshold``. With both 1, what one expert alone needs stays.
    """
    settings, num, factor = context.settings, len(experts), _factor(weights, context)
    most = num if settings.max_tasks is None else settings.max_tasks

    def change(start: Tensor, others: list[Tensor]) -> Tensor:
        vectors = [task_vector(start, o).mul_(w) for o, w in zip(others, weights, strict=True)]
        total = sum(vectors, torch.zeros_like(vectors[0]))
        needed = torch.zeros_like(total, dtype=torch.int16)
        for vector in vectors:
            needed += (total - vector).abs_().mul_(settings.threshold) < vector.abs_()
        return total.mul_((needed >= settings.min_tasks) & (needed <= most)).mul_(factor)

    return Pointwise(change)
