"""What the section ``sample`` asks of a base, checked before anything is drawn."""

from typing import Any

import torch

from ..config import Sample
from ..diffusion.process import VP
from ..errors import UserError
from ..models.base import Base
from ..models.schedulers import make_scheduler, sampler_of
from .sampler import denoise


def check_sample(base: Base, settings: Sample, num_steps: int | None = None) -> None:
    """Require that the sampler exists, takes so many steps, and can start where they start.

    Args:
        num_steps: where not given, the settings' own number.

    Raises:
        UserError: as said.
    """
    steps = num_steps or settings.num_steps
    scheduler = make_scheduler(base, settings.sampler, steps, settings.timestep_spacing)
    if not _is_defined(base, scheduler, sampler_of(base, settings.sampler)):
        raise UserError(
            f"the base predicts ε and its schedule ends in pure noise (zero terminal SNR), where ε says nothing of the "
            f"image: {sampler_of(base, settings.sampler)} with {steps} steps draws NaN; set sample.sampler to "
            "EulerDiscrete or sample.timestep_spacing to leading, or take a base that predicts v"
        )


def _is_defined(base: Base, scheduler: Any, sampler: str) -> bool:
    """Say whether a sampler's arithmetic stays finite, by its steps with noise in place of a network's predictions.

    Raises:
        UserError: it fails.
    """
    generator = torch.Generator().manual_seed(0)
    noise, predicted = torch.randn(2, 1, base.shape[0], 4, 4, generator=generator)
    try:
        found = denoise(lambda x, t: predicted, scheduler, noise, [generator])
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"sampler {sampler} can't sample this base ({reason}); take another") from error
    alphas = getattr(scheduler, "alphas_cumprod", None)
    has_zero = alphas is not None and bool((alphas == 0).any())
    is_epsilon = isinstance(base.process, VP) and base.process.prediction_type == "epsilon"
    return not (is_epsilon and has_zero) or bool(found.isfinite().all())
