"""The samplers: any scheduler of diffusers on a base's own schedule."""

import inspect
from typing import Any

import diffusers

from ..diffusion.process import Flow
from ..errors import UserError
from .base import Base
from .processes import flow_arguments


def make_scheduler(base: Base, sampler: str, num_steps: int, timestep_spacing: str | None) -> Any:
    """Build any diffusers scheduler from the base's own config, with its timesteps set as the stock pipeline sets them.

    Raises:
        UserError: diffusers has no such scheduler, it can't sample the base's process, or it refuses the number of
            steps.
    """
    name = sampler if sampler.endswith("Scheduler") else sampler + "Scheduler"
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        known = sorted(
            n.removesuffix("Scheduler") for n in dir(diffusers) if n.endswith("Scheduler") and "Flax" not in n
        )
        raise UserError(f"sampler is {sampler!r}, expected one of {', '.join(known)}")
    own, changes = base.pipeline.scheduler, dict[str, Any]()
    if isinstance(base.process, Flow):
        changes = flow_arguments(base.process, own, cls)
        if timestep_spacing is not None and "timestep_spacing" not in inspect.signature(cls).parameters:
            raise UserError(f"timestep_spacing is {timestep_spacing}, and a {name} has none: leave it out")
    if timestep_spacing is not None:
        changes["timestep_spacing"] = timestep_spacing
    try:
        scheduler: Any = cls.from_config(own.config, **base.family.sampler_config, **changes)
        base.family.set_timesteps(scheduler, base.network, num_steps)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(f"sampler {name} with {num_steps} steps: {error}") from error
    return scheduler
