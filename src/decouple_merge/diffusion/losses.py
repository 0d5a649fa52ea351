"""The training losses of DeMe (Eq. 5)."""

import torch
from jaxtyping import Float
from torch import Tensor


def per_sample_mse(a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Compute the squared error of each sample, averaged over its elements, in float32, or float64 where one is."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(wide) - b.to(wide)).square().flatten(1).mean(1)


def finetune_losses(
    output: Float[Tensor, "batch ..."],
    target: Float[Tensor, "batch ..."],
    teacher_output: Float[Tensor, "batch ..."] | None,
    consistency_weight: float = 1.0,
    weights: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Compute L = ‖target - f_θi‖² + λ·‖f_θ - f_θi‖² of each sample (DeMe, Eq. 5), both terms on the same x_t and t.

    The pointwise optimum is (target + λ·f_θ)/(1 + λ). Without a teacher the second term is zero.

    Args:
        weights: of the samples, on both terms, so that the optimum stays where it is; 1 where not given.

    Returns:
        (L, first term, second term without λ), float32.
    """

    def error(expected: Tensor) -> Tensor:
        found = per_sample_mse(output, expected)
        return found if weights is None else weights.to(found) * found

    denoising = error(target)
    if teacher_output is None:
        return denoising, denoising, torch.zeros_like(denoising)
    consistency = error(teacher_output)
    return denoising + consistency_weight * consistency, denoising, consistency
