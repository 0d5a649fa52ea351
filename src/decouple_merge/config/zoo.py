"""What ``deme schedule`` is asked for: networks to choose from, and how schedules of them are searched."""

from pathlib import Path

from pydantic import Field, model_validator

from ..errors import UserError
from .document import read_document
from .loader import validate
from .mixture import resolve
from .numbers import Integer, NonNegativeInt, Number, PositiveInt
from .paths import Name
from .sample import Sample, Text
from .section import Section
from .stats import Stats


class ScheduleSearch(Section):
    """The search for a schedule.

    Attributes:
        num_slots: steps of the sampler's even grid, each of which has a model or is skipped.
        num_schedules: random ones that are scored, to learn from.
        held_out: the share of them that the predictor doesn't see, for Kendall's τ.
        metric: a distance, on num_images images of the seeds from first_seed on.
        num_updates: of the predictor.
        num_generations, population: of the evolution.
        num_finalists: of the last population, scored like the random ones; the best is the result.
        shares: of the budget, each of which has a schedule of its own, for the front; the last is the budget.
        num_report_images: for the front, of the seeds from report_first_seed on, which choose nothing.
        baselines: models that are drawn alone; where not given those called base and merged, or the first.
        baseline_steps: with how many steps.
        num_timed: calls of each model, whose median is its latency.
    """

    num_slots: PositiveInt = 50
    num_schedules: Integer = Field(300, ge=8)
    held_out: Number = Field(0.25, gt=0, lt=1)
    metric: str = "kd_effnetlite0"
    num_images: PositiveInt = 500
    first_seed: NonNegativeInt = 1_000_000
    num_updates: PositiveInt = 300
    num_generations: PositiveInt = 500
    population: Integer = Field(40, ge=2)
    num_finalists: PositiveInt = 8
    shares: list[Number] = Field([0.25, 0.5, 0.75, 1.0], min_length=1)
    num_report_images: PositiveInt = 1000
    report_first_seed: NonNegativeInt = 0
    baselines: list[str] = []
    baseline_steps: list[PositiveInt] = Field([10, 15, 20, 25, 50], min_length=1)
    num_timed: PositiveInt = 10

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.num_images)

    @property
    def report_seeds(self) -> range:
        return range(self.report_first_seed, self.report_first_seed + self.num_report_images)

    @model_validator(mode="after")
    def _shares(self) -> "ScheduleSearch":
        if self.shares != sorted({share for share in self.shares if share > 0}) or self.shares[-1] != 1:
            raise UserError(f"shares are {self.shares}, expected numbers above 0 that rise to 1, the whole budget")
        if max(self.first_seed, self.report_first_seed) < min(self.seeds.stop, self.report_seeds.stop):
            raise UserError(
                f"the seeds {self.seeds.start} to {self.seeds.stop - 1} that choose and {self.report_seeds.start} to "
                f"{self.report_seeds.stop - 1} that report overlap: move first_seed or report_first_seed"
            )
        return self


class Zoo(Section):
    """Networks that a schedule may choose from. Paths as in a mixture.

    Attributes:
        base: as of a mixture.
        models: as of a mixture's ranges, by the names that the schedule's steps will have.
        seed: of the random schedules and of the evolution.
        reference: images that drawn ones are compared with, as ``data.source``.
        num_reference_images: of them, from the start; None takes all.
        sample: how images are drawn; the budget is of a batch of ``sample.batch_size``. The steps are
            ``schedule.num_slots``, and all networks are held in memory.
        stats: the feature networks' weights, and the split of the reference.
    """

    base: Name
    models: dict[str, Name] = Field(min_length=1)
    reference: Name = "fashion-mnist"
    num_reference_images: PositiveInt | None = None
    seed: NonNegativeInt = 0
    sample: Sample = Sample()
    text: Text = Text()
    stats: Stats = Stats()
    schedule: ScheduleSearch = ScheduleSearch()

    @property
    def baselines(self) -> list[str]:
        """The models that are drawn alone, for comparison."""
        known = [name for name in self.models if name in ("base", "merged")]
        return self.schedule.baselines or known or list(self.models)[:1]

    @model_validator(mode="after")
    def _known(self) -> "Zoo":
        if unknown := [name for name in self.schedule.baselines if name not in self.models]:
            raise UserError(f"schedule.baselines has {unknown[0]!r}, expected one of {', '.join(self.models)}")
        if "num_steps" in self.sample.model_fields_set:
            raise UserError("sample.num_steps is given, and a schedule has steps of its own: set schedule.num_slots")
        if self.sample.one_resident:
            raise UserError("sample.one_resident is true, and a zoo's networks are all held in memory: leave it out")
        return self


def load_zoo(path: Path, overrides: list[str] | None = None) -> Zoo:
    """Read a zoo's YAML, and apply ``a.b=c`` overrides.

    Raises:
        UserError: as ``load_config``.
    """
    found = validate(Zoo, read_document(path), f"zoo {path}", overrides)
    models = {name: resolve(path, model) for name, model in found.models.items()}
    return found.model_copy(update={"base": resolve(path, found.base), "models": models})
