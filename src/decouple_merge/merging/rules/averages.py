"""Rules whose coefficients are numbers, or that average the experts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UserError
from .rule import Context, Settings
from .sums import Coefficients, Pointwise, gram, wide_dtype

# Iterations of the geometric median and of the mean on a sphere, and what is as good as 0 to them.
MAX_ITERATIONS, TOLERANCE = 1000, 1e-12


def linear(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """Task arithmetic, θ + Σ w_i·τ_i (DeMe, Eq. 8; Ilharco et al. 2023)."""
    return [1.0 - math.fsum(weights), *weights]


def fisher(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Pointwise:
    """Fisher-weighted average, Σ w_i·F_i·θ_i / Σ w_i·F_i (Matena and Raffel 2022, Eq. 3); θ where all F are 0.

    Raises:
        UserError: there are not as many Fisher tensors as experts.
    """
    if len(context.fishers) != len(experts):
        raise UserError(f"{context.key}: {len(context.fishers)} Fisher tensors for {len(experts)} experts")

    def coefficients(start: Tensor, others: list[Tensor]) -> Coefficients:
        fishers = others[len(experts) :]
        shares = [w * f.to(wide_dtype(start)) for w, f in zip(weights, fishers, strict=True)]
        total = sum(shares, torch.zeros_like(shares[0]))
        averaged: Coefficients = [torch.where(total > 0, s / total.where(total > 0, 1.0), 0.0) for s in shares]
        return [(total <= 0).to(total), *averaged]

    return Pointwise(coefficients, beside=context.fishers)


def one_or_two(weights: Sequence[float], settings: Settings) -> None:
    """Require what ``slerp`` takes: one expert, or two whose weights have a sum or are both 0."""
    if len(weights) > 2 or (len(weights) == 2 and any(weights) and math.fsum(weights) == 0):
        raise UserError(
            f"slerp has {len(weights)} experts with weights {list(weights)}, expected one, or two with a sum; karcher "
            "takes more"
        )


def slerp(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """Spherical interpolation of two (Shoemake 1985): sin((1 - t)Ω)/sin Ω and sin(tΩ)/sin Ω, Ω the angle between them.

    One expert: from the base to it, t = w. Two: from the first to the second, t = w_2 / (w_1 + w_2), the base unused.
    Nearly parallel tensors are interpolated linearly. ``karcher`` takes more.
    """
    pair = [base, experts[0]] if len(experts) == 1 else experts
    t = weights[0] if len(experts) == 1 else weights[1] / sum(weights)
    products = gram(pair)
    norms = math.sqrt(products[0, 0] * products[1, 1])
    angle = math.acos(max(-1.0, min(1.0, float(products[0, 1]) / norms))) if norms else 0.0
    sine = math.sin(angle)
    ends: Coefficients = [1 - t, t] if sine < 1e-6 else [math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine]
    return ends if len(experts) == 1 else [0.0, *ends]


def karcher(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """Karcher mean of the directions on the unit sphere, times the mean norm: SLERP of any number.

    The point x of the sphere where Σ α_i·log_x(θ_i / ‖θ_i‖) = 0, α = w / Σ w, found by steps along that sum (Karcher
    1977), times Σ α_i·‖θ_i‖. Tensors of norm 0 have no direction.
    """
    total = math.fsum(weights)
    shares = torch.tensor(weights, dtype=torch.float64) / total
    products = gram(experts)
    norms = products.diagonal().sqrt()
    chosen = ((norms > 0) & (shares > 0)).nonzero().flatten()
    if len(chosen) == 0:
        return [0.0, *shares.tolist()]
    cosines = products[chosen][:, chosen] / norms[chosen].outer(norms[chosen])
    point = _mean_direction(cosines, shares[chosen]) if len(chosen) > 1 else torch.ones(1, dtype=torch.float64)
    found = torch.zeros_like(shares)
    found[chosen] = point * ((shares @ norms) / norms[chosen])
    return [0.0, *found.tolist()]


def _mean_direction(cosines: Tensor, shares: Tensor) -> Tensor:
    """Find the mean of unit vectors on their sphere, as coefficients of them; all is known from their cosines."""

    def unit(point: Tensor) -> Tensor:
        length = (point @ cosines @ point).clamp(min=0).sqrt()
        return point / length if length > TOLERANCE else torch.eye(len(point), dtype=point.dtype)[0]

    point = unit(shares)
    for _ in range(MAX_ITERATIONS):
        along = (cosines @ point).clamp(-1, 1)
        angles = along.acos()
        sines = angles.sin()
        pull = shares * torch.where(sines > TOLERANCE, angles / sines.clamp(min=TOLERANCE), 1.0)
        step = pull - (pull @ along) * point
        length = (step @ cosines @ step).clamp(min=0).sqrt()
        point = unit(length.cos() * point + torch.sinc(length / math.pi) * step)
        # Cosines near 1 leave half of a float64's digits to a length.
        if length < 1e-7:
            break
    return point


def geometric_median(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """Geometric median, argmin_x Σ w_i·‖x - θ_i‖, by Weiszfeld's iteration (1937).

    It lies among the experts, as Σ a_i·θ_i, so that all is known from the inner products of the task vectors.
    """
    total = math.fsum(weights)
    shares, products = [w / total for w in weights], gram(experts, base)
    apart = (products.diagonal()[:, None] + products.diagonal() - 2 * products).clamp(min=0).sqrt()
    # Rounding leaves half of a float64's digits to a distance.
    together = apart <= 1e-7 * apart.max()
    weight = torch.tensor(shares, dtype=torch.float64)
    for k in range(len(experts)):
        # An expert is the median where the others together don't pull more than its own weight (Kuhn 1973).
        pulls = torch.where(together[k], 0.0, weight / apart[k].where(~together[k], 1.0))
        moves = products - products[k] - products[:, k : k + 1] + products[k, k]
        own = float(weight[together[k]].sum())
        # Two of equal weight pull equally: all between them are medians, and their mean is the one that rounding of
        # a tensor doesn't choose.
        if float(pulls @ moves @ pulls) <= own**2 * (1 - 1e-9 * (own < 1)):
            return [0.0, *(float(i == k) for i in range(len(experts)))]
    return [0.0, *_weiszfeld(products, shares)]


def _weiszfeld(products: Tensor, shares: list[float]) -> list[float]:
    """Iterate to the geometric median, as coefficients of points whose inner products are known."""
    rows, places, point = products.tolist(), range(len(shares)), shares
    for _ in range(MAX_ITERATIONS):
        along = [math.fsum(a * x for a, x in zip(row, point, strict=True)) for row in rows]
        square = math.fsum(a * x for a, x in zip(along, point, strict=True))
        distances = [math.sqrt(max(0.0, square - 2 * along[i] + rows[i][i])) for i in places]
        pulls = [share / d if d > 0 else math.inf for share, d in zip(shares, distances, strict=True)]
        if math.inf in pulls:
            break
        last, point = point, [pull / math.fsum(pulls) for pull in pulls]
        if max(abs(a - b) for a, b in zip(point, last, strict=True)) <= TOLERANCE:
            break
    return point


def model_stock(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
    """Model Stock: as far from the base to the experts' mean as their angles say (Jang et al. 2024, Eq. 5).

    θ + t·Σ w_i·τ_i / N with t = N·c / (1 + (N - 1)·c), c the mean cosine between two task vectors; weights of 1 are the
    paper's. One expert is as it is, t = 1, and t = 0 where its denominator is 0.
    """
    num = len(experts)
    products = gram(experts, base)
    norms = products.diagonal().sqrt()
    cosines = (products / norms.outer(norms).clamp(min=1e-300)).clamp(-1, 1)
    cosine = float((cosines.sum() - cosines.diagonal().sum()) / max(1, num * (num - 1)))
    denominator = 1 + (num - 1) * cosine
    ratio = 1.0 if num == 1 else 0.0 if abs(denominator) < 1e-6 else num * cosine / denominator
    shares = [w * ratio / num for w in weights]
    return [1.0 - math.fsum(shares), *shares]
