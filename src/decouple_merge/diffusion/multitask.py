"""Weights of several losses from the inner products of their gradients: NashMTL and PCGrad."""

import torch
from jaxtyping import Float
from torch import Tensor

# Of a weight of NashMTL, for losses whose gradients cancel each other.
CAP = 1e3


def nash_weights(gram: Float[Tensor, "k k"], cap: float = CAP) -> Float[Tensor, " k"]:
    """Solve Gα = 1/α for α > 0: the Nash bargain between k losses (Navon et al. 2022, Eq. 2: NashMTL).

    It is where f(α) = ½αᵀGα - Σ ln α has its minimum. f is strictly convex for the Gram matrix of any gradients, so
    Newton's method with damped steps finds it from anywhere (Boyd & Vandenberghe, section 9.5). Where gradients with
    non-negative factors cancel each other there is none; then, and where a weight would exceed the cap, G + (k/cap²)·I
    is solved, whose solution has αᵀ(G + …)α = k and so |α| <= cap.

    Args:
        gram: G_ij = ⟨g_i, g_j⟩ divided by its Frobenius norm; symmetric, positive semidefinite.

    Returns:
        float64 [k], in (0, cap].
    """
    g, k = gram.double(), len(gram)
    alpha = _minimum(g)
    if not bool(alpha.isfinite().all()) or alpha.max() > cap:
        alpha = _minimum(g + k / cap**2 * torch.eye(k, dtype=g.dtype, device=g.device))
    return alpha


def _minimum(g: Float[Tensor, "k k"], num_steps: int = 100) -> Float[Tensor, " k"]:
    alpha = torch.ones(len(g), dtype=g.dtype, device=g.device)
    for _ in range(num_steps):
        gradient = g @ alpha - 1 / alpha
        hessian = g + torch.diag(alpha**-2)
        step = torch.linalg.solve(hessian, gradient)
        # Newton's decrement: the damped step stays where α > 0, and f is self-concordant.
        decrement = (gradient @ step).clamp(min=0).sqrt()
        alpha = alpha - step / (1 + decrement) if decrement > 0.25 else alpha - step
        # Converged, since the error of the next step is the square of this one's; or there is no minimum.
        if decrement < 1e-9 or alpha.max() > 1e3 * CAP:
            break
    return alpha


def pcgrad_weights(gram: Float[Tensor, "k k"], draws: torch.Generator) -> Float[Tensor, " k"]:
    """Compute the factors a of the sum Σ a_i g_i of gradients without their conflicts (Yu et al. 2020: PCGrad).

    Each gradient loses, for every other one in random order, its projection on that where their inner product is
    negative. What remains is a combination of the gradients, so their inner products are all it takes.

    Args:
        gram: G_ij = ⟨g_i, g_j⟩, of any scale; a gradient of 0 takes no part.

    Returns:
        float64 [k].
    """
    g, k = gram.double().cpu(), len(gram)
    total = torch.zeros(k, dtype=g.dtype)
    for i in range(k):
        factors = torch.zeros(k, dtype=g.dtype)
        factors[i] = 1
        for j in torch.randperm(k, generator=draws).tolist():
            product = factors @ g[:, j]
            if j != i and product < 0 and g[j, j] > 0:
                factors[j] -= product / g[j, j]
        total += factors
    return total
