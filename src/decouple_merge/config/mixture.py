"""A mixture of networks as a file says it: which network on which range."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ..errors import UserError
from .document import read_document
from .loader import validate
from .numbers import Integer, NonNegativeFloat, Number
from .paths import Name
from .section import Section

YAML = (".yaml", ".yml")


class MixtureRange(Section):
    """A network and the range that is its own.

    Attributes:
        low, high: the range [low, high), in the mixture's unit.
        model: ``base``, or a pipeline by folder or name, one of its networks, an expert folder of a run, a weights file
            or a LoRA.
    """

    low: Integer | Number
    high: Integer | Number
    model: Name

    @model_validator(mode="after")
    def _not_empty(self) -> "MixtureRange":
        if not 0 <= self.low < self.high:
            raise UserError(f"the range is [{self.low:g}, {self.high:g}), expected 0 <= low < high")
        return self


class Mixture(Section):
    """Networks of one family, each on its ranges. Paths with a dot in front are counted from the file's folder.

    Attributes:
        base: the pipeline whose schedule, size and other parts count.
        unit: of low, high and band: ``timestep``; of a flow also ``sigma``, in 0 to 1, or ``boundary``, the same number
            under Wan's name.
        band: width of the soft hand-over around every edge; 0 is none.
        rest: the model of what no range holds; None refuses gaps.
    """

    base: Name
    unit: Literal["timestep", "sigma", "boundary"] = "timestep"
    band: NonNegativeFloat = 0
    ranges: list[MixtureRange] = Field(min_length=1)
    rest: Name | None = None


def is_document(name: str) -> bool:
    """Say whether a model's name is that of a YAML file, a mixture's."""
    return Path(name).suffix in YAML and Path(name).is_file()


def load_mixture(path: Path) -> Mixture:
    """Read a mixture's YAML.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown or lacks, or a value has the wrong type or range.
    """
    found = validate(Mixture, read_document(path), f"mixture {path}")
    ranges = [part.model_copy(update={"model": _from(path, part.model)}) for part in found.ranges]
    rest = None if found.rest is None else _from(path, found.rest)
    return found.model_copy(update={"base": _from(path, found.base), "ranges": ranges, "rest": rest})


def _from(path: Path, name: str) -> str:
    """Count a path with a dot in front from the mixture's folder."""
    return str(path.parent / name) if name.startswith(".") else name
