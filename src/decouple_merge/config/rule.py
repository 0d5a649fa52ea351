"""What a merge rule may be asked for beside the weights."""

from typing import Annotated, Any, Literal

from pydantic import Field

from .numbers import NonNegativeInt, Number, PositiveInt
from .section import Section

Density = Annotated[Number, Field(gt=0, le=1)]


class RuleSettings(Section):
    """A rule and its settings; docs/merging.md says which rule reads which.

    Attributes:
        method: a rule by name, one of merging's ``RULES``.
        density: share of a task vector that is kept: one for all experts, or a list with one for each.
        gamma: share of its largest entries that ``breadcrumbs`` drops.
        epsilon: how far ``della``'s chances of staying lie around the density.
        vote: of an election of signs: by the ``sum`` of the weighted task vectors, or by the ``count`` of their signs.
        normalize: what a sum is divided by: ``none``, the ``count`` of those who take part in an entry, or their
            ``weights``. None is the method's own: ``count`` after an election, else ``none``.
        scale: of the change, known as lambda.
        threshold, min_tasks, max_tasks: of ``consensus``: how much larger an entry must be than what the others do
            there, and for how many experts.
        off_diagonal: what ``regmean`` multiplies the off-diagonal inner products by.
        seed: of random masks.
    """

    method: str = "linear"
    density: Density | Annotated[list[Density], Field(min_length=1)] = 1.0
    gamma: Number = Field(0.01, ge=0, lt=1)
    epsilon: Number = Field(0.1, ge=0, lt=0.5)
    vote: Literal["sum", "count"] = "sum"
    normalize: Literal["none", "count", "weights"] | None = None
    scale: Number = 1.0
    threshold: Number = Field(0.4, ge=0)
    min_tasks: NonNegativeInt = 2
    max_tasks: PositiveInt | None = None
    off_diagonal: Number = Field(0.9, ge=0, le=1)
    seed: NonNegativeInt = 0

    def rule_settings(self) -> dict[str, Any]:
        """List what the rule itself reads, by name."""
        return {name: getattr(self, name) for name in RuleSettings.model_fields if name not in ("method", "seed")}
