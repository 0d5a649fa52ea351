"""The ranges of a base's experts: its process's own, or some that are given in timesteps, σ or as a boundary."""

from collections.abc import Sequence
from itertools import pairwise

from ..errors import UserError
from .process import VP, Process
from .timesteps import TimestepRange, check_ranges


def listed_ranges(process: Process, pairs: Sequence[tuple[int | float, int | float]]) -> list[TimestepRange]:
    """Make the ranges that are listed as [low, high), in timesteps.

    Raises:
        UserError: they are no partition of [0, T), or cut a timestep of a table.
    """
    ranges = [TimestepRange(low, high) for low, high in pairs]
    broken = [r for r in ranges if r.low != int(r.low) or r.high != int(r.high)]
    if isinstance(process, VP) and broken:
        raise UserError(f"a range is {broken[0]}, expected whole timesteps: the base's schedule has one entry for each")
    if isinstance(process, VP):
        # 250.0 is no place in a table.
        ranges = [TimestepRange(int(r.low), int(r.high)) for r in ranges]
    check_ranges(ranges, process.num_train_timesteps)
    return ranges


def cut_ranges(process: Process, unit: str, edges: Sequence[int | float]) -> list[TimestepRange]:
    """Cut the schedule at some edges, the cleanest first.

    Args:
        unit: ``timestep``; of a flow also ``sigma``, the noise level in 0 to 1, or ``boundary``, the same number as
            Wan's pipelines call it: the fraction of T.

    Raises:
        UserError: the edges don't rise between 0 and the end, or the base's schedule has no such unit.
    """
    end = end_of(process, unit, "finetune.ranges has")
    if not edges or any(low >= high for low, high in pairwise([0, *edges, end])):
        raise UserError(
            f"finetune.ranges.edges are {list(edges)}, expected the cuts between ranges, which rise between 0 and {end}"
        )
    inner = [in_timesteps(process, unit, edge) for edge in edges]
    return listed_ranges(process, list(pairwise([0, *inner, process.num_train_timesteps])))


def end_of(process: Process, unit: str, whose: str) -> int:
    """Say where the schedule ends in a unit.

    Args:
        whose: for messages, what has the unit.

    Raises:
        UserError: the base's schedule has no such unit.
    """
    if unit != "timestep" and isinstance(process, VP):
        raise UserError(
            f"{whose} the unit {unit}, which is a flow's, and the base has a table of "
            f"{process.num_train_timesteps} timesteps: give them with the unit timestep"
        )
    return process.num_train_timesteps if unit == "timestep" else 1


def in_timesteps(process: Process, unit: str, value: int | float) -> int | float:
    """Convert a place in a schedule, or a width, to timesteps."""
    # Rounded, so that 0.57 is the timestep 570, not 569.9999….
    return value if unit == "timestep" else round(value * process.num_train_timesteps, 9)


def filled_ranges(
    process: Process, unit: str, parts: Sequence[tuple[int | float, int | float, str]], rest: str | None
) -> list[tuple[TimestepRange, str]]:
    """Order ranges with the names of their networks, and give what none of them holds to another.

    Args:
        unit: as ``cut_ranges`` has it.
        parts: low, high, name.
        rest: the name for what is left; None refuses gaps.

    Returns:
        A partition of [0, T) in timesteps, the cleanest first, with a name for each range.

    Raises:
        UserError: ranges overlap, leave a gap, end behind the schedule or cut a timestep of a table, or the base's
            schedule has no such unit.
    """
    end = end_of(process, unit, "the mixture has")
    filled: list[tuple[int | float, int | float, str]] = []
    done: int | float = 0
    for low, high, name in [*sorted(parts), (end, end, "")]:
        if low < done:
            raise UserError(
                f"the ranges [{filled[-1][0]:g}, {filled[-1][1]:g}) and [{low:g}, {high:g}) overlap, expected a "
                f"network for every {unit}"
                if high != low
                else f"a range ends at {done:g}, expected at most {end}, the end of the base's schedule"
            )
        if low > done and rest is None:
            raise UserError(
                f"no range holds [{done:g}, {low:g}), expected a partition of [0, {end}); add one, or rest: base"
            )
        filled += [(done, low, rest)] if low > done and rest is not None else []
        filled += [(low, high, name)] if high > low else []
        done = high
    pairs = [(in_timesteps(process, unit, low), in_timesteps(process, unit, high)) for low, high, _ in filled]
    return list(zip(listed_ranges(process, pairs), [name for _, _, name in filled], strict=True))
