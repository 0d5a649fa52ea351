"""The section ``finetune``: the experts."""

from typing import Literal

from pydantic import Field, model_validator

from ..errors import UserError
from .balancing import Clusters
from .numbers import Integer, NonNegativeFloat, Number, PositiveFloat, PositiveInt
from .section import Section
from .training import Training


class Projection(Section):
    """Channel-wise projections P(F) = W·F.

    Attributes:
        placement: ``folded`` multiplies the layer that writes a block's output and folds away on saving;
            ``trunk`` is the paper's layout, whose layers stay in the merged model; ``none`` trains without.
        learning_rate_scale: factor on the learning rate for W, which multiplies how fast its layer moves.
    """

    placement: Literal["folded", "trunk", "none"] = "folded"
    learning_rate_scale: NonNegativeFloat = 0.1


class Lora(Section):
    """Low-rank adapters θ + (alpha / rank)·B·A, with which experts are trained in place of all weights.

    Attributes:
        alpha: None is the rank, a scale of 1.
        target_modules: by the ends of their names.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    target_modules: list[str] = Field(["to_q", "to_k", "to_v", "to_out.0"], min_length=1)


class Ranges(Section):
    """Where the schedule is cut into ranges.

    Attributes:
        unit: ``timestep``; of a flow also ``sigma``, in 0 to 1, or ``boundary``, the same number under Wan's name.
        edges: between the ranges, rising; 0 and the end are not among them.
    """

    unit: Literal["timestep", "sigma", "boundary"]
    edges: list[Integer | Number] = Field(min_length=1)


class Finetune(Training):
    """Training of the experts.

    Attributes:
        experts: ``trained`` on the ranges; or ``denoisers``, the two of a Wan 2.2 base, each on its own timesteps:
            nothing is trained, and the merge is one denoiser.
        num_ranges: N ranges, unless ``ranges`` lists them: equal ones of a table of timesteps, of a flow those with
            equal shares of the sampler's steps.
        ranges: [low, high) pairs in timesteps, a unit and edges, or what ``num_ranges`` clusters are made by.
        global_prob: p of DeMe, Eq. 6.
        consistency_weight: λ of Eq. 5; 0 trains without the teacher.
        lora: train adapters, without projections; the teacher is the same network with them switched off.
        baseline: also finetune on all timesteps for the same total of updates, to compare with.
    """

    experts: Literal["trained", "denoisers"] = "trained"
    num_ranges: PositiveInt = 4
    ranges: list[tuple[Integer | Number, Integer | Number]] | Ranges | Clusters | None = None
    global_prob: Number = Field(0.4, ge=0, le=1)
    consistency_weight: NonNegativeFloat = 1.0
    projection: Projection = Projection()
    lora: Lora | None = None
    baseline: bool = True

    @property
    def num_experts(self) -> int:
        if self.experts == "denoisers":
            return 2
        if self.ranges is None or isinstance(self.ranges, Clusters):
            return self.num_ranges
        return len(self.ranges) if isinstance(self.ranges, list) else len(self.ranges.edges) + 1

    @model_validator(mode="after")
    def _no_training(self) -> "Finetune":
        if self.experts == "denoisers" and (self.ranges is not None or self.lora is not None):
            raise UserError(
                "experts is denoisers, which have their own timesteps and aren't trained: set neither ranges nor lora"
            )
        return self

    @model_validator(mode="after")
    def _no_projections_of_adapters(self) -> "Finetune":
        if self.lora is not None and self.projection.placement != "none":
            raise UserError(
                f"lora is set and projection.placement is {self.projection.placement}; an adapter trains no "
                "projections: set projection.placement to none"
            )
        return self
