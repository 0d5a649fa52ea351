"""The ranges of a run's experts, and the density that it draws timesteps by."""

from dataclasses import replace

from ..config import Finetune, Training
from ..diffusion.process import Flow
from ..diffusion.ranges import cut_ranges, listed_ranges
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from .base import Base


def ranges_of(base: Base, settings: Finetune) -> list[TimestepRange]:
    """Make the ranges that a run's settings ask for, or those that its base's process has by default.

    Raises:
        UserError: they are no partition of the base's timesteps, or their unit isn't the base's.
    """
    if settings.ranges is None:
        return base.process.split(settings.num_ranges)
    if isinstance(settings.ranges, list):
        return listed_ranges(base.process, settings.ranges)
    return cut_ranges(base.process, settings.ranges.unit, settings.ranges.edges)


def with_density(base: Base, settings: Training) -> Base:
    """Have the base's process draw timesteps as a training's settings ask for.

    Raises:
        UserError: a density is set for a base whose timesteps are a table.
    """
    density = settings.density
    if density is None:
        return base
    if not isinstance(base.process, Flow):
        raise UserError(
            f"density is {density.name}, which is for flow-matching bases; the timesteps of this base are a table, "
            "drawn uniformly: leave it out, or set weighting"
        )
    return replace(base, process=replace(base.process, density=density.name, mean=density.mean, std=density.std))
