"""How a sampler's steps fall into the ranges of a run's experts."""

from collections.abc import Iterator, Sequence

from ..config import Sample
from ..diffusion.timesteps import TimestepRange, range_index
from ..models.base import Base
from ..models.schedulers import make_scheduler, sampler_of


def steps_of(base: Base, ranges: Sequence[TimestepRange], settings: Sample) -> list[int]:
    """Count the steps of the sampler in each range."""
    scheduler = make_scheduler(base, settings.sampler, settings.num_steps, settings.timestep_spacing)
    held = [range_index(list(ranges), t) for t in base.process.visited(scheduler.timesteps).tolist()]
    return [held.count(index) for index in range(len(ranges))]


def unlike_shares(
    base: Base, ranges: Sequence[TimestepRange], settings: Sample, trained: Sequence[float] | None = None
) -> Iterator[str]:
    """Say in a line where a sampler's steps fall into ranges more than twice, or less than half, as often as expected.

    One step more or less is none: few steps can't be shared evenly.

    Args:
        trained: the shares of the steps that are expected; where not given, those of steps that are even in the base's
            schedule, of a flow at its shift.
    """
    counts = steps_of(base, ranges, settings)
    shares = trained or [base.process.step_share(own) for own in ranges]
    expected = [sum(counts) * share for share in shares]
    unlike = [
        f"{own} has {found} of {sum(counts)} steps, {even:.3g} expected"
        for own, found, even in zip(ranges, counts, expected, strict=True)
        if found - 1 > 2 * even or found + 1 < even / 2
    ]
    if unlike:
        yield (
            f"warning: {sampler_of(base, settings.sampler)} shares its steps otherwise than the schedule that experts "
            f"are trained for: {'; '.join(unlike)}; take another sampler, the scheduler of the training, or "
            "finetune on ranges that are cut for this one"
        )
