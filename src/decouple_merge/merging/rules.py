"""Merge rules: what each version of a tensor contributes to the merged one; pure functions.

Every rule answers with one coefficient for the base and one for each expert, a number or a tensor of the parameter's
shape, and ``combine`` sums: θ_merged = c_0·θ + Σ c_i·θ_i. Task arithmetic on task vectors τ_i = θ_i - θ is that sum
with c_0 = 1 - Σ c_i, a form that is exact where a coefficient is 1 and the others are 0, whatever the magnitudes.
``merge_tensor`` does both, on experts in the order of ``summing_order``, so that the order they are given in is none of
a merge's business, bit for bit.

A rule of your own is a function of the same arguments, added to ``RULES`` under a name.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from ..errors import UserError
from .order import summing_order

Coefficients = list[float | Tensor]

# Elements whose sum stays in a core's cache while the tensors pass through it. A sum of a whole tensor would also spend
# most of its time on the system's clearing of fresh memory.
CHUNK = 1 << 18
# A sum of votes that is smaller than this share of their magnitudes is 0 but for rounding: weights such as 0.1 + 0.2
# and 0.3 meet in the 54th bit, and float32 task vectors carry no more than 24.
TIE = 2.0**-40


@dataclass(frozen=True)
class Context:
    """What a rule may need besides the tensors.

    Attributes:
        key: the parameter's name.
        density: share of a task vector that TIES and DARE keep, in (0, 1].
        seeds: one for each expert, of DARE's mask; they go with the expert, not with its place.
        fishers: diagonal Fisher information of each expert, of the parameter's shape, >= 0.
    """

    key: str = ""
    density: float = 1.0
    seeds: Sequence[int] = ()
    fishers: Sequence[Tensor] = ()


Rule = Callable[[Tensor, list[Tensor], list[float], Context], Coefficients]


def merge_tensor(rule: Rule, base: Tensor, experts: list[Tensor], weights: Sequence[float], context: Context) -> Tensor:
    """Merge one tensor by a rule, in float32, or float64 where the base is; experts may come in any order."""
    order = summing_order(experts, weights, context.seeds, context.fishers)
    ordered = replace(
        context,
        seeds=[context.seeds[i] for i in order if context.seeds],
        fishers=[context.fishers[i] for i in order if context.fishers],
    )
    sorted_experts = [experts[i] for i in order]
    coefficients = rule(base, sorted_experts, [float(weights[i]) for i in order], ordered)
    return combine([base, *sorted_experts], coefficients)


def combine(tensors: list[Tensor], coefficients: Coefficients) -> Tensor:
    """Sum c_k·θ_k in float32, or float64 where the tensors are; a coefficient of 0 leaves its tensor out.

    Args:
        tensors: the base, then the experts, of one shape.
    """
    out = torch.empty(tensors[0].shape, dtype=_wide(tensors[0]), device=tensors[0].device)
    flat: Coefficients = [c.reshape(-1) if isinstance(c, Tensor) else c for c in coefficients]
    combine_into(out.view(-1), [t.reshape(-1) for t in tensors], flat)
    return out


def combine_into(out: Tensor, tensors: Sequence[Tensor], coefficients: Coefficients) -> None:
    """Do what ``combine`` does with flat tensors, into memory that is there."""
    wide = _wide(tensors[0])
    terms = [(c, t) for c, t in zip(coefficients, tensors, strict=True) if isinstance(c, Tensor) or c != 0]
    if not terms:
        out.zero_()
        return
    size = chunk_size(out)
    pieces = [zip(c.split(size) if isinstance(c, Tensor) else repeat(c), t.split(size)) for c, t in terms]  # noqa: B905
    for target, (c, first), *others in zip(out.split(size), *pieces, strict=True):
        total = target if out.dtype == wide else torch.empty_like(target, dtype=wide)
        torch.mul(first.to(wide), c, out=total)
        for c, piece in others:
            if isinstance(c, Tensor):
                total.addcmul_(c, piece.to(wide))
            else:
                total.add_(piece.to(wide), alpha=c)
        if total is not target:
            target.copy_(total)


def chunk_size(flat: Tensor) -> int:
    """Say how many elements to sum at once: a device other than the CPU is best kept busy with all of them."""
    return CHUNK if flat.device.type == "cpu" else max(1, len(flat))


def linear(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """Task arithmetic, θ + Σ w_i·τ_i (DeMe, Eq. 8; Ilharco et al. 2023)."""
    return [1.0 - math.fsum(weights), *weights]


def ties(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """TIES: trim, elect a sign, average those who agree (Yadav et al. 2023, algorithm 1).

    θ + mean of w_i·τ̂_i over A, with τ̂_i the ``density`` largest entries of τ_i, γ = sgn(Σ w_i·τ̂_i) and
    A = {i : sgn(w_i·τ̂_i) = γ}, entry by entry; equal weights λ are the paper's. The paper trims over the whole task
    vector, this over each tensor, since no more than a tensor is ever in memory.

    Where the votes cancel, nobody is elected and the entry stays θ: γ = 0 where |Σ w_i·τ̂_i| ≤ 2⁻⁴⁰·Σ |w_i·τ̂_i|, summed
    in float64.
    """
    floors = [trim_floor(vector, context.density) for vector in _task_vectors(base, experts)]
    return ties_above(base, experts, weights, floors)


def trim_floor(task_vector: Tensor, density: float) -> float:
    """Find how large an entry must be to stay: as the last of the ``density`` largest; others as large stay, too."""
    num_kept = math.ceil(density * task_vector.numel())
    if num_kept >= task_vector.numel():
        return 0.0
    return task_vector.abs().flatten().kthvalue(task_vector.numel() - num_kept + 1).values.item()


def ties_above(base: Tensor, experts: list[Tensor], weights: list[float], floors: list[float]) -> Coefficients:
    """Do TIES' election on tensors, or on any part of them, whose floors are known."""
    wide, exact = _wide(base), _exact(base)

    def votes() -> Iterator[Tensor]:
        for expert, weight, floor in zip(experts, weights, floors, strict=True):
            stays = (expert.to(wide) - base.to(wide)).abs() >= floor
            yield torch.where(stays, weight * (expert.to(exact) - base.to(exact)), 0.0)

    return _elected(votes(), weights, wide)


def dare(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """DARE: drop entries of τ_i at random, rescale the others, θ + Σ w_i·m_i·τ_i / density (Yu et al. 2024, Eq. 3)."""
    masks = [_mask(base, seed, context) for seed in context.seeds]
    shares: Coefficients = [m * (w / context.density) for m, w in zip(masks, weights, strict=True)]
    return [1.0 - sum(shares), *shares]


def dare_ties(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """DARE's drop and rescale in the place of TIES' trimming (Yu et al. 2024, section 3.2)."""
    exact = _exact(base)

    def votes() -> Iterator[Tensor]:
        for expert, weight, seed in zip(experts, weights, context.seeds, strict=True):
            yield _mask(base, seed, context) * (weight * (expert.to(exact) - base.to(exact)))

    return _elected(votes(), [w / context.density for w in weights], _wide(base))


def fisher(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """Fisher-weighted average, Σ w_i·F_i·θ_i / Σ w_i·F_i (Matena and Raffel 2022, Eq. 3); θ where all F are 0.

    Raises:
        UserError: there are not as many Fisher tensors as experts, or a weight is negative.
    """
    if len(context.fishers) != len(experts):
        raise UserError(f"{context.key}: {len(context.fishers)} Fisher tensors for {len(experts)} experts")
    if min(weights) < 0:
        raise UserError(f"Fisher weights are {weights}, expected none below 0: the merge is an average")
    shares = [w * f.to(_wide(base)) for w, f in zip(weights, context.fishers, strict=True)]
    total = sum(shares, torch.zeros_like(base, dtype=_wide(base)))
    averaged: Coefficients = [torch.where(total > 0, s / total.where(total > 0, 1.0), 0.0) for s in shares]
    return [(total <= 0).to(_wide(base)), *averaged]


def slerp(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """Spherical interpolation of two (Shoemake 1985): sin((1 - t)Ω)/sin Ω and sin(tΩ)/sin Ω, Ω the angle between them.

    One expert: from the base to it, t = w. Two: from the first to the second, t = w_2 / (w_1 + w_2), the base unused.
    Nearly parallel tensors are interpolated linearly.

    Raises:
        UserError: there are more than two experts, or the weights of two add up to 0.
    """
    if len(experts) > 2 or (len(experts) == 2 and sum(weights) == 0):
        raise UserError(f"slerp has {len(experts)} experts with weights {weights}, expected one, or two with a sum")
    a, b = (base, experts[0]) if len(experts) == 1 else experts
    t = weights[0] if len(experts) == 1 else weights[1] / sum(weights)
    a, b = a.double().flatten(), b.double().flatten()
    norms = float(a.norm() * b.norm())
    angle = math.acos(max(-1.0, min(1.0, float(a @ b) / norms))) if norms else 0.0
    sine = math.sin(angle)
    pair: Coefficients = [1 - t, t] if sine < 1e-6 else [math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine]
    return pair if len(experts) == 1 else [0.0, *pair]


RULES: dict[str, Rule] = {
    "linear": linear,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "fisher": fisher,
    "slerp": slerp,
}


def check_method(name: str) -> None:
    """Require that a rule of this name is in ``RULES``.

    Raises:
        UserError: there is none.
    """
    if name not in RULES:
        raise UserError(f"method: expected one of {', '.join(RULES)}, found {name!r}")


def check_weights(weights: Sequence[float], num_experts: int) -> None:
    """Require a finite weight for each expert.

    Raises:
        UserError: there are more or fewer, or one is NaN or infinite.
    """
    if len(weights) != num_experts:
        raise UserError(f"{len(weights)} weights for {num_experts} experts, expected one each")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"weights are {list(weights)}, expected finite numbers")


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _exact(tensor: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _task_vectors(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    return [e.to(_wide(base)) - base.to(_wide(base)) for e in experts]


def _mask(base: Tensor, seed: int, context: Context) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return (torch.rand(base.shape, generator=draws) < context.density).to(_wide(base))


def _elected(votes: Iterable[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Coefficients:
    """Coefficients of the mean of scale_i·τ_i over the experts whose vote w_i·τ̂_i has the sign of the sum of votes."""
    total, magnitude, signs = torch.zeros(()), torch.zeros(()), list[Tensor]()
    for vote in votes:
        total, magnitude = total.to(vote) + vote, magnitude.to(vote) + vote.abs()
        signs.append(vote.sign().to(torch.int8))
    elected = torch.where(total.abs() > TIE * magnitude, total.sign(), 0.0).to(torch.int8)
    agree = [((sign == elected) & (sign != 0)).to(dtype) for sign in signs]
    count = sum(agree, torch.zeros_like(agree[0])).clamp(min=1)
    shares: Coefficients = [a * scale / count for a, scale in zip(agree, scales, strict=True)]
    return [1.0 - sum(shares), *shares]
