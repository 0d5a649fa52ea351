"""The section ``search``: the merging weights."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..errors import UserError
from .numbers import Integer, NonNegativeInt, Number, PositiveFloat, PositiveInt
from .paths import Name
from .rule import RuleSettings


class Search(RuleSettings):
    """The search for merging weights.

    Attributes:
        over: what is combined: the run's ``experts``; ``baseline``, the model finetuned on all timesteps, by one
            weight, its scale; ``baseline-checkpoints``, those that ``finetune.keep_every`` kept of its training (LCSC,
            Liu et al. 2025); or ``nothing``, without a search. Where it isn't ``experts``, none are finetuned.
        strategy: ``gp`` or ``tpe`` (Optuna samplers), ``cmaes``, ``evolution``, ``coordinate``, ``random``, ``greedy``
            (soup), ``uniform`` (soup, 1/N each, nothing is searched), ``grid``, coarse to fine, or ``gradient``, which
            tries what was learned and multiples of it.
        blocks: patterns of keys such as ``down_blocks.*``, each with weights of its own; the first that matches counts,
            and the last is ``*`` for all others. A candidate holds the weights of the first, then of the second, ….
            ``[layers]`` is a pattern for each layer of the base.
        checkpoints: pipelines or weight files to combine in place of the run's experts.
        tune: settings of the method, such as ``density``, that are chosen with the weights, each with its bounds; or
            without, then they are the method's own.
        low, high: bounds of every weight; ``frozen`` fixes some of the winner's, by their place in a candidate.
        total: what the weights of each block add up to; None leaves them free. 1 with ``linear`` is an affine
            combination, in which the base has no part.
        start: weight vectors to evaluate before the strategy chooses.
        gradient_batches: training batches on which a weight vector to start with is learned by the gradient of the
            denoising loss; 0 learns none.
        num_trials: candidates to screen, at most; less where max_images, the images drawn for screening, or
            max_minutes, the time spent on it by all workers, are reached before. The candidates that a search begins
            with are all scored.
        batch_size: candidates that ``gp`` and ``tpe`` propose at once, to keep several workers busy.
        grid_step: of the coarse grid; the fine grid around its best has half of it.
        metric: a distance, minimised; candidates are screened on num_images images of num_steps steps (None: as
            ``sample``).
        halving: each level keeps one candidate in so many, and draws so many times the images.
        num_finalists: compared at last on num_final_images images (None: as many as ``evaluate``) from fresh seeds;
            0 trusts the screening.
        first_seed: of the initial noise; the seeds from there on are the search's.
    """

    over: Literal["experts", "baseline", "baseline-checkpoints", "nothing"] = "experts"
    strategy: Literal[
        "gp", "tpe", "cmaes", "evolution", "coordinate", "random", "greedy", "uniform", "grid", "gradient"
    ] = "gp"
    blocks: list[str] = Field(["*"], min_length=1)
    checkpoints: list[Name] = []
    tune: dict[str, tuple[Number, Number] | None] = {}
    low: Number = -0.2
    high: Number = 2.5
    frozen: dict[Annotated[int, Field(ge=0)], Number] = {}
    total: Number | None = None
    start: list[list[Number]] = []
    gradient_batches: NonNegativeInt = 200
    num_trials: PositiveInt = 40
    max_images: PositiveInt | None = None
    max_minutes: PositiveFloat | None = None
    batch_size: PositiveInt = 1
    grid_step: PositiveFloat = 0.4
    metric: str = "fd_effnetlite0"
    num_images: PositiveInt = 1000
    num_steps: PositiveInt | None = None
    halving: Integer = Field(3, ge=2)
    num_finalists: NonNegativeInt = 3
    num_final_images: PositiveInt | None = None
    first_seed: NonNegativeInt = 1_000_000

    @property
    def combines_experts(self) -> bool:
        """Whether the run's own experts are combined: neither its baseline nor other models."""
        return self.over == "experts" and not self.checkpoints

    @property
    def learns_start(self) -> bool:
        """Whether weights to start with are learned by the gradient."""
        return self.gradient_batches > 0 and self.strategy != "uniform"

    @model_validator(mode="after")
    def _what_is_combined(self) -> "Search":
        if self.checkpoints and self.over != "experts":
            raise UserError(f"checkpoints are listed and over is {self.over}: leave one of them out")
        return self

    @model_validator(mode="after")
    def _bounds(self) -> "Search":
        if self.low >= self.high:
            raise UserError(f"low is {self.low} and high is {self.high}, expected low below high")
        if self.strategy == "gradient" and self.gradient_batches == 0:
            raise UserError("gradient_batches is 0, which leaves the strategy gradient nothing to try; set it to 200")
        return self
