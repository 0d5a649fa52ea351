"""The samplers: any scheduler of diffusers on a base's own schedule."""

from typing import Any

import diffusers

from ..errors import UserError
from .base import Base


def make_scheduler(base: Base, sampler: str, num_steps: int, timestep_spacing: str | None) -> Any:
    """Build any diffusers scheduler from the base's own config, with its timesteps set.

    Raises:
        UserError: diffusers has no such scheduler, or it refuses the number of steps.
    """
    name = sampler if sampler.endswith("Scheduler") else sampler + "Scheduler"
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        known = sorted(
            n.removesuffix("Scheduler") for n in dir(diffusers) if n.endswith("Scheduler") and "Flax" not in n
        )
        raise UserError(f"sampler is {sampler!r}, expected one of {', '.join(known)}")
    changes: dict[str, Any] = {} if timestep_spacing is None else {"timestep_spacing": timestep_spacing}
    try:
        scheduler = cls.from_config(base.pipeline.scheduler.config, **base.family.sampler_config, **changes)
        scheduler.set_timesteps(num_steps)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(f"sampler {name} with {num_steps} steps: {error}") from error
    return scheduler
