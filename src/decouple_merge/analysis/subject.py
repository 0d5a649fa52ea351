"""What an analysis looks at, and what it finds: plain data."""

from dataclasses import dataclass
from typing import Any

from ..diffusion.timesteps import TimestepRange
from ..merging.arithmetic import Tensors
from ..models.base import Base


@dataclass(frozen=True)
class Subject:
    """A base and the experts that were finetuned from it.

    Attributes:
        experts: one for each of the ranges, with the base's keys.
    """

    base: Base
    experts: list[Tensors]
    ranges: tuple[TimestepRange, ...]


@dataclass(frozen=True)
class Finding:
    """What an analysis found.

    Attributes:
        rows: of its table, all with the same columns.
        summary: what is no table, in JSON's types.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
