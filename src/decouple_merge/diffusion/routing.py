"""Routers: which networks of a mixture a timestep asks for, and with which shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..errors import UserError
from .timesteps import TimestepRange, check_ranges, range_index

# Networks by their number, with shares that add up to 1.
Route = list[tuple[int, float]]


@runtime_checkable
class Router(Protocol):
    """What a mixture asks about a timestep that some range holds."""

    @property
    def num_networks(self) -> int:
        """How many networks there are to choose from."""
        ...

    def route(self, t: int | float) -> Route:
        """Say which networks run for t, one or two, and how much of the prediction is whose."""
        ...

    def following(self, t: int | float) -> int | None:
        """Say which other network comes next while t falls; None where none does."""
        ...

    def record(self) -> Any:
        """Describe all that decides a route, as plain values."""
        ...


@dataclass(frozen=True)
class RangeRouter:
    """A network for each range of timesteps (DeMe, Eq. 7), with a soft hand-over where a band is given.

    In a band of width b around an edge e between two ranges, the share of the noisier side's network is
    (t - e + b/2) / b, and that of the other the rest. With b = 0 every t has one network.

    Args:
        ranges: in order, a partition of [0, T).
        num_train_timesteps: T.
        networks: the number of each range's network; where not given each has its own.
        band: b, in timesteps.

    Raises:
        UserError: the ranges are no partition, or a band is wider than a range beside it.
    """

    ranges: Sequence[TimestepRange]
    num_train_timesteps: int
    networks: Sequence[int] | None = None
    band: int | float = 0

    def __post_init__(self) -> None:
        check_ranges(list(self.ranges), self.num_train_timesteps)
        narrow = [own for own in self.ranges if own.high - own.low < self.band]
        if narrow and len(self.ranges) > 1:
            raise UserError(
                f"band is {self.band:g} timesteps and the range {narrow[0]} has {narrow[0].high - narrow[0].low:g}, "
                "expected a band no wider than the ranges at its sides"
            )

    @property
    def numbers(self) -> list[int]:
        """The number of each range's network."""
        return list(range(len(self.ranges)) if self.networks is None else self.networks)

    @property
    def num_networks(self) -> int:
        return max(self.numbers) + 1

    def route(self, t: int | float) -> Route:
        """Say whose t is: one network with all of it, or in a band two.

        Raises:
            UserError: no range holds t.
        """
        index, half, numbers = range_index(list(self.ranges), t), self.band / 2, self.numbers
        own, last = self.ranges[index], len(self.ranges) - 1
        if index > 0 and t < own.low + half:
            below, edge = index - 1, own.low
        elif index < last and t > own.high - half:
            below, edge = index, own.high
        else:
            return [(numbers[index], 1.0)]
        share = (t - edge + half) / self.band
        if numbers[below] == numbers[below + 1]:
            return [(numbers[below], 1.0)]
        return [(numbers[below], 1 - share), (numbers[below + 1], share)]

    def following(self, t: int | float) -> int | None:
        numbers, index = self.numbers, range_index(list(self.ranges), t)
        return next((n for n in reversed(numbers[:index]) if n != numbers[index]), None)

    def record(self) -> Any:
        """List [low, high) of the ranges; the numbers of networks and the band too where they say something."""
        if self.band == 0 and self.numbers == list(range(len(self.ranges))):
            return [[own.low, own.high] for own in self.ranges]
        rows = [[own.low, own.high, n] for own, n in zip(self.ranges, self.numbers, strict=True)]
        return {"ranges": rows, "band": self.band}
