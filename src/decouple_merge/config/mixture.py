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


class Schedule(Section):
    """Which network runs at each step of a sampler (OMS-DPM, Liu et al. 2023). Paths as in a mixture.

    Attributes:
        base: as of a mixture.
        models: as of a mixture's ranges, by the names that the steps have.
        steps: for each slot of the sampler's even grid a name, or 0 where the step is skipped; the noisiest first.
    """

    base: Name
    models: dict[str, Name] = Field(min_length=1)
    steps: list[str | Literal[0]] = Field(min_length=1)

    @model_validator(mode="after")
    def _known(self) -> "Schedule":
        if unknown := [step for step in self.steps if step and step not in self.models]:
            raise UserError(f"steps has {unknown[0]!r}, expected 0 or one of the models {', '.join(self.models)}")
        if not any(self.steps):
            raise UserError("steps skips every step, expected at least one that runs")
        return self


def load_schedule(path: Path) -> Schedule | None:
    """Read a schedule's YAML; None where the file has no steps, and so is another's.

    Raises:
        UserError: as ``load_mixture``.
    """
    values = read_document(path)
    if "steps" not in values:
        return None
    found = validate(Schedule, values, f"schedule {path}")
    models = {name: resolve(path, model) for name, model in found.models.items()}
    return found.model_copy(update={"base": resolve(path, found.base), "models": models})


def load_mixture(path: Path) -> Mixture:
    """Read a mixture's YAML.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown or lacks, or a value has the wrong type or range.
    """
    values = read_document(path)
    if "models" in values and "ranges" not in values:
        raise UserError(f"{path} has models and no ranges, as a zoo: give it to deme schedule, which writes a schedule")
    found = validate(Mixture, values, f"mixture {path}")
    ranges = [part.model_copy(update={"model": resolve(path, part.model)}) for part in found.ranges]
    rest = None if found.rest is None else resolve(path, found.rest)
    return found.model_copy(update={"base": resolve(path, found.base), "ranges": ranges, "rest": rest})


def resolve(path: Path, name: str) -> str:
    """Count a path with a dot in front from the mixture's folder."""
    # Absolute, so that it stays a path: a folder called base here is no other name for the mixture's base.
    return str((path.parent / name).absolute()) if name.startswith(".") else name
