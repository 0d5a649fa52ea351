"""What a merge rule is, what it may ask for, and how it merges one tensor."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import UserError
from ..order import summing_order
from .sums import Answer, combine


@dataclass(frozen=True)
class Settings:
    """What may be chosen beside the weights. A rule reads those that its ``params`` name.

    Attributes:
        density: share of a task vector that is kept, in (0, 1]: one for all experts, or one for each.
        gamma: share of its largest entries that ``breadcrumbs`` drops, in [0, 1).
        epsilon: how far ``della``'s chances of staying lie around the density.
        vote: of an election: ``sum`` of the weighted task vectors, or ``count`` of their signs.
        normalize: what a sum is divided by: ``none``, ``count`` of the experts that take part in an entry, or their
            ``weights``. None is the rule's own: ``count`` after an election, else ``none``.
        scale: λ, which the change is multiplied by.
        threshold: λ of ``consensus``: how much larger an entry must be than what the others do there.
        min_tasks, max_tasks: how many experts need an entry that ``consensus`` keeps.
        off_diagonal: α of ``regmean``, which the off-diagonal inner products are multiplied by, in [0, 1].
    """

    density: float | Sequence[float] = 1.0
    gamma: float = 0.01
    epsilon: float = 0.1
    vote: Literal["sum", "count"] = "sum"
    normalize: Literal["none", "count", "weights"] | None = None
    scale: float = 1.0
    threshold: float = 0.4
    min_tasks: int = 2
    max_tasks: int | None = None
    off_diagonal: float = 0.9

    def densities(self, num: int) -> list[float]:
        """List the density of each expert.

        Raises:
            UserError: there are more or fewer.
        """
        if isinstance(self.density, int | float):
            return [float(self.density)] * num
        if len(self.density) != num:
            raise UserError(f"density has {len(self.density)} numbers for {num} experts, expected one, or one for each")
        return [float(d) for d in self.density]


@dataclass(frozen=True)
class Context:
    """What a rule may need besides the tensors; all lists go with the experts.

    Attributes:
        key: the parameter's name.
        seeds: one for each expert, of random masks; they go with the expert, not with its place.
        fishers: diagonal Fisher information of each expert, of the parameter's shape, >= 0.
        grams: mean outer product of the inputs that each expert's layer sees, [in, in]; none where it has no such
            layer.
        statistics: what ``Rule.measure`` says of each expert.
    """

    key: str = ""
    settings: Settings = field(default_factory=Settings)
    seeds: Sequence[int] = ()
    fishers: Sequence[Tensor] = ()
    grams: Sequence[Tensor] = ()
    statistics: Sequence[Any] = ()

    def ordered(self, order: Sequence[int]) -> "Context":
        """Put all that goes with the experts into another order."""
        densities = self.settings.densities(len(order))
        return replace(
            self,
            settings=replace(self.settings, density=[densities[i] for i in order]),
            seeds=[self.seeds[i] for i in order if self.seeds],
            fishers=[self.fishers[i] for i in order if self.fishers],
            grams=[self.grams[i] for i in order if self.grams],
            statistics=[self.statistics[i] for i in order if self.statistics],
        )


Bounds = tuple[float, float]


@dataclass(frozen=True)
class Rule:
    """A merge rule.

    Attributes:
        merge: of base, experts, weights and context to coefficients or a change.
        params: the settings that it reads, with the bounds that a search looks within; None where it doesn't.
        needs: what its context must hold: ``seeds``, ``fishers``, ``grams``.
        low: the least weight that it takes.
        requires: raises ``UserError`` where it doesn't take such weights or settings.
        measure: what it needs to know of an expert whatever the weights, of base, experts, context and the expert's
            place. Where the same experts are merged again and again, it is computed once.
        kept: how many numbers that is, of a tensor's shape and the number of experts; ends of intervals don't count.
        only_finite: it takes no NaN and no infinity, whatever a merge allows.
        num_tensors: how many float32 tensors of the parameter's size a merge holds, the result and its cast included.
        work: bytes that it takes besides for a tensor, of its shape.
    """

    merge: Callable[[Tensor, list[Tensor], list[float], Context], Answer]
    params: Mapping[str, Bounds | None] = field(default_factory=dict)
    needs: Sequence[Literal["seeds", "fishers", "grams"]] = ()
    low: float = -math.inf
    requires: Callable[[Sequence[float], Settings], None] | None = None
    measure: Callable[[Tensor, Sequence[Tensor], Context, int], Any] | None = None
    kept: Callable[[Sequence[int], int], int] = lambda shape, num: 0
    only_finite: bool = False
    num_tensors: int = 3
    work: Callable[[Sequence[int]], int] = lambda shape: 0

    def check(self, weights: Sequence[float], settings: Settings) -> None:
        """Require that the rule takes a weight for each expert, and settings.

        Raises:
            UserError: a weight is below the least that it takes, or they don't fit the rule or each other.
        """
        settings.densities(len(weights))
        if min(weights, default=0.0) < self.low:
            raise UserError(f"weights are {list(weights)}, expected none below {self.low:g} with this method")
        if self.requires is not None:
            self.requires(weights, settings)

    def measured(self, base: Tensor, experts: Sequence[Tensor], context: Context) -> Context:
        """Add what the rule needs to know of each expert, unless it is there."""
        if self.measure is None or context.statistics:
            return context
        return replace(context, statistics=[self.measure(base, experts, context, i) for i in range(len(experts))])

    def answer(self, base: Tensor, experts: list[Tensor], weights: Sequence[float], context: Context) -> Answer:
        """Apply the rule to experts in the order of their sum. All weights 0 give the base, whatever the
        rule, and so do experts that are the base.

        Raises:
            UserError: as ``check``.
        """
        self.check(weights, context.settings)
        if not any(weights) or base.numel() == 0 or all(_is_same(e, base) for e in experts):
            # Not a change of 0: that makes 0 of -0. Nor (1 - Σw)·θ + Σw·θ, which rounds what nobody trained.
            return [1.0, *(0.0 for _ in weights)]
        return self.merge(base, experts, [float(w) for w in weights], self.measured(base, experts, context))


def _is_same(expert: Tensor, base: Tensor) -> bool:
    return expert is base or (expert.dtype == base.dtype and torch.equal(expert, base))


def merge_tensor(rule: Rule, base: Tensor, experts: list[Tensor], weights: Sequence[float], context: Context) -> Tensor:
    """Merge one tensor by a rule, in float32, or float64 where the base is; experts may come in any order."""
    order = order_of(experts, weights, context)
    sorted_experts = [experts[i] for i in order]
    answer = rule.answer(base, sorted_experts, [weights[i] for i in order], context.ordered(order))
    return combine([base, *sorted_experts], answer)


def order_of(experts: Sequence[Tensor], weights: Sequence[float], context: Context) -> list[int]:
    """Say in which order experts are summed, whatever the user's: ``summing_order`` of all that goes with them."""
    densities = context.settings.densities(len(experts))
    return summing_order(experts, [weights, densities, context.seeds], [context.fishers, context.grams])
