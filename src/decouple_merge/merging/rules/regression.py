"""RegMean: the layer whose outputs are nearest to those of every expert on the inputs that it sees."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UserError
from .rule import Context
from .sums import Coefficients, exact_dtype, task_vector, wide_dtype

# What the diagonal gets, of its mean: inputs that no expert saw say nothing, and leave the mean of the experts.
RIDGE = 1e-6


def num_bytes(shape: Sequence[int]) -> int:
    """Count the bytes of what is solved for a layer: four matrices of its inputs in float64."""
    return 4 * 8 * math.prod(shape[1:]) ** 2 if len(shape) > 1 else 0


def regmean(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients | Tensor:
    """RegMean: least squares over the inputs of every expert (Jin et al. 2023, Eq. 2).

    argmin_W Σ w_i·E‖(W - θ_i)·x‖² over the inputs x of expert i, which is θ + λ·(Σ w_i·τ_i·G_i)·(Σ w_i·G_i)⁻¹ with
    G_i = E[x·xᵀ]. Off-diagonal entries of G_i are multiplied by α = ``off_diagonal``, and 10⁻⁶ of the mean diagonal is
    added to the diagonals. A convolution is a matrix [out, in · height · width] on unfolded inputs. Tensors without
    G_i are averaged, θ + λ·Σ w_i·τ_i / Σ w_i.

    Raises:
        UserError: there are not as many G_i as experts, or they aren't of the layer's inputs.
    """
    total, scale = math.fsum(weights), context.settings.scale
    if not context.grams:
        shares = [w * scale / total for w in weights]
        return [1.0 - math.fsum(shares), *shares]
    num = base[0].numel()
    if len(context.grams) != len(experts) or any(g.shape != (num, num) for g in context.grams):
        found = ", ".join(str(list(g.shape)) for g in context.grams)
        raise UserError(f"{context.key}: inner products of shape {found}, expected [{num}, {num}] for each expert")
    exact, alpha = exact_dtype(base), context.settings.off_diagonal
    trace = sum(w * float(g.diagonal().sum()) for w, g in zip(weights, context.grams, strict=True)) / total
    ridge = RIDGE * trace / num or 1.0
    left = torch.zeros(num, num, dtype=exact, device=base.device)
    right = torch.zeros(len(base), num, dtype=exact, device=base.device)
    for expert, gram, weight in zip(experts, context.grams, weights, strict=True):
        shrunk = gram.to(left) * alpha
        shrunk.diagonal().copy_(gram.diagonal().to(left) + ridge)
        left.add_(shrunk, alpha=weight)
        right.addmm_(task_vector(base, expert).reshape(len(base), num).to(left), shrunk, alpha=weight)
    solved = torch.cholesky_solve(right.T, torch.linalg.cholesky(left)).T
    return (scale * solved).to(wide_dtype(base)).reshape(base.shape)
