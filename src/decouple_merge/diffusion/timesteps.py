"""Timestep ranges: split [0, T), and draw training timesteps from one range or from all of it."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class TimestepRange:
    """The half-open range [low, high) of timesteps; t = 0 is the cleanest image.

    Timesteps are integers where a schedule is a table, and real numbers, 1000·σ, where it is a flow.
    """

    low: int | float
    high: int | float

    def __contains__(self, t: int | float) -> bool:
        return self.low <= t < self.high

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g})"


def exact(t: Tensor) -> Tensor:
    """Widen to float64, or on Apple's GPUs, which don't have it, to float32."""
    return t.float() if t.device.type == "mps" else t.double()


def split_timesteps(num_train_timesteps: int, num_ranges: int) -> list[TimestepRange]:
    """Split [0, T) into N contiguous ranges [⌊iT/N⌋, ⌊(i+1)T/N⌋); DeMe, section 3.1.

    Raises:
        UserError: N is not in [1, T].
    """
    if not 1 <= num_ranges <= num_train_timesteps:
        raise UserError(
            f"num_ranges is {num_ranges}, expected 1 to {num_train_timesteps}, the number of timesteps of the "
            "base's schedule"
        )
    edges = [i * num_train_timesteps // num_ranges for i in range(num_ranges + 1)]
    return [TimestepRange(low, high) for low, high in pairwise(edges)]


def check_ranges(ranges: list[TimestepRange], num_train_timesteps: int) -> None:
    """Require that the ranges, in order, are a partition of [0, T).

    Raises:
        UserError: a range is empty, lies outside [0, T), or leaves a gap or an overlap.
    """
    expected: int | float = 0
    for index, r in enumerate(ranges):
        if not 0 <= r.low < r.high <= num_train_timesteps:
            raise UserError(f"range {index} is {r}, expected a non-empty part of [0, {num_train_timesteps})")
        if r.low != expected:
            raise UserError(f"range {index} starts at {r.low}, expected {expected}: the ranges must follow each other")
        expected = r.high
    if expected != num_train_timesteps:
        raise UserError(f"the last range ends at {expected}, expected {num_train_timesteps}, the schedule's length")


def range_index(ranges: list[TimestepRange], t: int | float) -> int:
    """Say which range holds timestep t (DeMe, Eq. 7: the expert for t)."""
    for index, r in enumerate(ranges):
        if t in r:
            return index
    raise UserError(f"timestep {t} is in none of the ranges {', '.join(map(str, ranges))}")


def draw_timesteps(
    num: int,
    own: TimestepRange,
    num_train_timesteps: int,
    global_prob: float,
    generator: torch.Generator,
    antithetic: bool = False,
) -> Int[Tensor, "num"]:
    """Draw training timesteps: from all of [0, T) with probability p, else from the own range (DeMe, Eq. 6).

    The coin p is tossed for every sample. The mass on the own range is (1 - p) + p·|own|/T.

    With ``antithetic``, draws come in pairs t and low + high - 1 - t of the same interval (the own range or
    [0, T)), which lowers the variance of the loss and leaves each sample's distribution unchanged.

    Returns:
        int64 timesteps in [0, T), on the CPU.
    """
    half = (num + 1) // 2 if antithetic else num
    is_global = torch.rand(half, generator=generator) < global_prob
    uniform = torch.rand(half, generator=generator, dtype=torch.float64)
    low = torch.where(is_global, 0, own.low)
    high = torch.where(is_global, num_train_timesteps, own.high)
    t = low + (uniform * (high - low)).long()
    if antithetic:
        t = torch.cat([t, low + high - 1 - t])[:num]
    return t
