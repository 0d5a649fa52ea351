"""A merge that a network holds, made anew for every candidate."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..storage.tensors import hash_tensors
from .arithmetic import Tensors, cast, cut_blocks, versions
from .rules import RULES, check_method
from .rules.rule import Context
from .stacked import Ruled, Stacked
from .survival import change_of, survival_record


class Merger:
    """Merge the same base and experts again and again, and write each merge into one network.

    Args:
        method: a rule by name, one of ``RULES``.
        context_of: a key's context, all that the rule needs besides the tensors; the rule's own settings where not
            given.
        patterns: of keys, as of ``group_keys``; each has weights of its own.
        dtype: of the merged model's files. What a network is given was rounded to it.
        device: where base and experts are held, in float32.
    """

    def __init__(
        self,
        base: Tensors,
        experts: list[Tensors],
        *,
        method: str = "linear",
        context_of: Callable[[str], Context] = Context,
        patterns: Sequence[str] = ("*",),
        dtype: torch.dtype = torch.float32,
        device: torch.device,
    ) -> None:
        check_method(method)
        self.base, self.experts, self.patterns = base, experts, list(patterns)
        self.method, self.context_of, self.dtype, self.device = method, context_of, dtype, device
        self._copied: Tensors = {}

    # Made for the first merge: a search that is finished needs none.
    @cached_property
    def stacks(self) -> list[Stacked]:
        """Base and experts, once for each pattern."""
        cut = cut_blocks(self.base, self.experts, self.patterns)
        return [Stacked(start, experts, self.device) for start, experts in cut]

    @cached_property
    def _blocks(self) -> Sequence[Stacked | Ruled]:
        if self.method == "linear":
            return self.stacks
        return [Ruled(stack, RULES[self.method], self.context_of) for stack in self.stacks]

    @property
    def zeros(self) -> list[float]:
        """The weights that give the base."""
        return [0.0] * (len(self.experts) * len(self.patterns))

    def merge(self, weights: Sequence[float]) -> Tensors:
        """Merge the experts; the next call may overwrite the tensors.

        Args:
            weights: one for each expert, pattern after pattern.

        Returns:
            Floating tensors in ``dtype``.

        Raises:
            UserError: there are more or fewer weights, or the rule doesn't take them.
        """
        return cast(self._merge(weights), self.dtype)

    def survival(self, weights: Sequence[float]) -> dict[str, Any] | None:
        """Say what rounding to ``dtype`` leaves of a merge's change; None where it is as fine as the sums."""
        if self.dtype.itemsize >= torch.float32.itemsize:
            return None
        merged, changes = self._merge(weights), {}
        for key, (start, *others) in versions(self.base, self.experts):
            if start.is_floating_point():
                changes[key] = change_of(start, others, merged[key], merged[key].to(self.dtype))
        return survival_record(changes)

    def _merge(self, weights: Sequence[float]) -> Tensors:
        num = len(self.experts)
        rows = [weights[i : i + num] for i in range(0, len(weights), num)]
        if len(weights) != len(self.zeros):
            raise UserError(f"{len(weights)} weights for {num} experts and {len(self.patterns)} patterns")
        merged: Tensors = {}
        for block, row in zip(self._blocks, rows, strict=True):
            merged |= block.merge(row)
        return merged

    def attach(self, network: nn.Module) -> None:
        """Choose the network that ``write`` writes into; it then holds the base.

        Its parameters become the memory that merges are summed into where both are float32 to the end; the others,
        and buffers, keep their own.
        """
        merged, shared = self.merge(self.zeros), set[str]()
        for name, parameter in network.named_parameters():
            if parameter.dtype == self.dtype == torch.float32:
                parameter.data = merged[name]
                shared.add(name)
        self._copied = {k: v for k, v in network.state_dict().items() if k not in shared}
        self._copy(merged)

    def write(self, weights: Sequence[float]) -> str:
        """Merge the experts into the network's own storage; returns the hash of the merged tensors.

        Raises:
            UserError: as ``merge``.
        """
        merged = self.merge(weights)
        self._copy(merged)
        return hash_tensors(sorted(merged.items()))

    @torch.no_grad()
    def _copy(self, merged: Tensors) -> None:
        for key, value in self._copied.items():
            value.copy_(merged[key])
