"""The training losses of DeMe (Eq. 5) for ε-, x0- and v-prediction."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def _per_sample(coefficient: Float[Tensor, " batch"], like: Tensor) -> Tensor:
    return coefficient.reshape(-1, *[1] * (like.dim() - 1)).to(like)


def add_noise(
    x0: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    t: Int[Tensor, " batch"],
    alphas_cumprod: Float[Tensor, " T"],
) -> Float[Tensor, "batch ..."]:
    """Compute x_t = √ᾱ_t·x0 + √(1 - ᾱ_t)·ε (DDPM, Eq. 4)."""
    alpha_bar = alphas_cumprod[t]
    return _per_sample(alpha_bar.sqrt(), x0) * x0 + _per_sample((1 - alpha_bar).sqrt(), x0) * noise


def prediction_target(
    x0: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    t: Int[Tensor, " batch"],
    alphas_cumprod: Float[Tensor, " T"],
    prediction_type: str,
) -> Float[Tensor, "batch ..."]:
    """Say what the network should output: ε, x0, or v = √ᾱ_t·ε - √(1 - ᾱ_t)·x0 (Salimans & Ho 2022, appendix D).

    Raises:
        ValueError: the prediction type is none of ``PREDICTION_TYPES``.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        alpha_bar = alphas_cumprod[t]
        return _per_sample(alpha_bar.sqrt(), x0) * noise - _per_sample((1 - alpha_bar).sqrt(), x0) * x0
    raise ValueError(f"prediction type is {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}")


def per_sample_mse(a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Compute the squared error of each sample, averaged over its elements, in float32, or float64 where one is."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(wide) - b.to(wide)).square().flatten(1).mean(1)


def finetune_loss(
    output: Float[Tensor, "batch ..."],
    target: Float[Tensor, "batch ..."],
    teacher_output: Float[Tensor, "batch ..."] | None,
    consistency_weight: float = 1.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute L = ‖target - f_θi‖² + λ·‖f_θ - f_θi‖² (DeMe, Eq. 5), both terms on the same x_t and t.

    The pointwise optimum is (target + λ·f_θ)/(1 + λ). Without a teacher the second term is zero.

    Returns:
        (L, first term, second term without λ), float32 scalars.
    """
    denoising = per_sample_mse(output, target).mean()
    if teacher_output is None:
        return denoising, denoising, torch.zeros_like(denoising)
    consistency = per_sample_mse(output, teacher_output).mean()
    return denoising + consistency_weight * consistency, denoising, consistency
