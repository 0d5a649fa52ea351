"""The training losses of DeMe (Eq. 5)."""

import torch
from jaxtyping import Float
from torch import Tensor


def per_sample_mse(a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Compute the squared error of each sample, averaged over its elements, in float32, or float64 where one is."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(wide) - b.to(wide)).square().flatten(1).mean(1)


def spectral_weights(height: int, width: int, power: float) -> Float[Tensor, "h w"]:
    """Weigh the frequencies of an error by a power of theirs, as Spectral Diffusion weighs its distillation.

    w_k = ρ_k^power / mean, with ρ_k in cycles a pixel; the image's mean has the lowest of the others. The mean weight
    is 1, so that an error that is white counts as it did. Of natural images amplitudes fall about as 1/ρ, so that
    power 1 gives each frequency the same relative error (Yang et al. 2023 weigh by each image's own amplitudes).
    """
    rows, columns = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.fftfreq(width, dtype=torch.float64)
    radius = (rows[:, None] ** 2 + columns**2).sqrt().clamp(min=1 / max(height, width))
    weights = radius**power
    return (weights / weights.mean()).float()


def spectral_mse(
    a: Float[Tensor, "batch ... h w"], b: Float[Tensor, "batch ... h w"], weights: Float[Tensor, "h w"]
) -> Float[Tensor, " batch"]:
    """Compute the squared error of each sample with weights on its frequencies: mean of w_k·|F(a - b)_k|², F unitary.

    With weights of 1 it is ``per_sample_mse``, by Parseval's theorem. Float32, whatever the dtypes.
    """
    spectrum = torch.fft.fft2(a.float() - b.float(), norm="ortho")
    return (weights * (spectrum.real**2 + spectrum.imag**2)).flatten(1).mean(1)


def finetune_losses(
    output: Float[Tensor, "batch ..."],
    target: Float[Tensor, "batch ..."],
    teacher_output: Float[Tensor, "batch ..."] | None,
    consistency_weight: float = 1.0,
    weights: Float[Tensor, " batch"] | None = None,
    spectrum: Float[Tensor, "h w"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Compute L = ‖target - f_θi‖² + λ·‖f_θ - f_θi‖² of each sample (DeMe, Eq. 5), both terms on the same x_t and t.

    The pointwise optimum is (target + λ·f_θ)/(1 + λ). Without a teacher the second term is zero.

    Args:
        weights: of the samples, on both terms, so that the optimum stays where it is; 1 where not given.
        spectrum: of the frequencies of both errors, ``spectral_weights``; 1 where not given.

    Returns:
        (L, first term, second term without λ), float32.
    """

    def error(expected: Tensor) -> Tensor:
        found = per_sample_mse(output, expected) if spectrum is None else spectral_mse(output, expected, spectrum)
        return found if weights is None else weights.to(found) * found

    denoising = error(target)
    if teacher_output is None:
        return denoising, denoising, torch.zeros_like(denoising)
    consistency = error(teacher_output)
    return denoising + consistency_weight * consistency, denoising, consistency
