"""The ranges of a base's experts: its process's own, or some that are given in timesteps, σ or as a boundary."""

from collections.abc import Sequence
from itertools import pairwise

from ..errors import UserError
from .process import VP, Process
from .timesteps import TimestepRange, check_ranges

UNITS = ("timestep", "sigma", "boundary")


def listed_ranges(process: Process, pairs: Sequence[tuple[int | float, int | float]]) -> list[TimestepRange]:
    """Make the ranges that are listed as [low, high), in timesteps.

    Raises:
        UserError: they are no partition of [0, T), or cut a timestep of a table.
    """
    ranges = [TimestepRange(low, high) for low, high in pairs]
    broken = [r for r in ranges if r.low != int(r.low) or r.high != int(r.high)]
    if isinstance(process, VP) and broken:
        raise UserError(f"a range is {broken[0]}, expected whole timesteps: the base's schedule has one entry for each")
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
    if unit != "timestep" and isinstance(process, VP):
        raise UserError(
            f"finetune.ranges has the unit {unit}, which is a flow's, and the base has a table of "
            f"{process.num_train_timesteps} timesteps: give edges with the unit timestep"
        )
    end = process.num_train_timesteps if unit == "timestep" else 1
    if not edges or any(low >= high for low, high in pairwise([0, *edges, end])):
        raise UserError(
            f"finetune.ranges.edges are {list(edges)}, expected the cuts between ranges, which rise between 0 and {end}"
        )
    scale = process.num_train_timesteps // end
    # Rounded, so that 0.57 is the timestep 570, not 569.9999….
    inner = [edge if unit == "timestep" else round(edge * scale, 9) for edge in edges]
    return listed_ranges(process, list(pairwise([0, *inner, process.num_train_timesteps])))
