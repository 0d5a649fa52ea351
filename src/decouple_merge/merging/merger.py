"""A merge that a network holds, made anew for every candidate."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..storage.tensors import hash_tensors
from .arithmetic import Model, Tensors, all_keys, versions_of
from .keys import group_keys, has_trunk
from .rules import RULES, check_method, check_weights
from .rules.rule import Context, order_of
from .rules.sums import combine_into
from .survival import change_of, survival_record


class Merger:
    """Merge the same base and experts again and again, one tensor at a time, and write each merge into one network.

    Neither base nor experts are copied. They stay what they are: memory, memory-mapped files in their stored dtype, or
    factors of adapters. While a merge works, it holds one tensor of each of them at most, and a few temporaries. What
    a rule measures of the experts, whatever the weights, is measured once.

    Args:
        method: a rule by name, one of ``RULES``.
        context_of: a key's context, all that the rule needs besides the tensors; the rule's own settings where not
            given.
        patterns: of keys, as of ``group_keys``; each has weights of its own.
        tuned: settings of the rule that stand behind the weights of each merge, with what they are for the base.
        dtype: of the merged model's files. What a network is given was rounded to it.
        device: where tensors are merged.

    Attributes:
        keys: of each pattern, in the models' order.
        known: by key, the context with what the rule measured of each expert, and for each expert its place in the
            order of their sum where weights are equal.
    """

    def __init__(
        self,
        base: Model,
        experts: Sequence[Model],
        *,
        method: str = "linear",
        context_of: Callable[[str], Context] = Context,
        patterns: Sequence[str] = ("*",),
        tuned: Mapping[str, float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device,
    ) -> None:
        check_method(method)
        self.base, self.experts, self.patterns = base, list(experts), list(patterns)
        self.rule, self.context_of, self.dtype, self.device = RULES[method], context_of, dtype, device
        self.keys = group_keys(all_keys(base, experts), patterns)
        self.tuned, self.known = dict(tuned or {}), dict[str, tuple[Context, list[int]]]()
        self._targets: Tensors = {}

    @property
    def zeros(self) -> list[float]:
        """The weights that give the base."""
        return [0.0] * (len(self.experts) * len(self.patterns)) + list(self.tuned.values())

    @property
    def has_trunk(self) -> bool:
        """Say whether the merges have trunk projections."""
        return any(map(has_trunk, self.keys))

    def merge(self, weights: Sequence[float], into: Tensors | None = None) -> Tensors:
        """Merge the experts as ``arithmetic.merge`` does, bit for bit.

        Args:
            weights: one for each expert, pattern after pattern, then the settings that are tuned.
            into: tensors to merge into, by key, that were such a merge.

        Returns:
            Floating tensors in ``dtype``.

        Raises:
            UserError: there are more or fewer weights, or the rule doesn't take them.
        """
        return dict(self._merged(weights, into or {}))

    def survival(self, weights: Sequence[float]) -> dict[str, Any] | None:
        """Say what rounding to ``dtype`` leaves of a merge's change; None where it is as fine as the sums."""
        if self.dtype.itemsize >= torch.float32.itemsize:
            return None
        changes = {}
        for key, row in self._rows(weights):
            start, *others = versions_of(key, self.base, self.experts, self.device)
            if start.is_floating_point():
                out = torch.empty(start.shape, device=self.device)
                self._merge_into(out, key, [start, *others], row)
                changes[key] = change_of(start, others, out, out.to(self.dtype))
        return survival_record(changes)

    def attach(self, network: nn.Module) -> None:
        """Choose the network that ``write`` writes into; it then holds the base."""
        self._targets = network.state_dict()
        for _ in self._merged(self.zeros, self._targets):
            pass

    def write(self, weights: Sequence[float]) -> str:
        """Merge the experts into the network's own storage; returns the hash of the merged tensors.

        Raises:
            UserError: as ``merge``.
        """
        return hash_tensors(self._merged(weights, self._targets, in_order=True))

    def _rows(self, weights: Sequence[float]) -> list[tuple[str, Sequence[float]]]:
        """List every key with its pattern's weights."""
        num, num_weights = len(self.experts), len(self.experts) * len(self.patterns)
        if len(weights) != len(self.zeros):
            settings = f" and settings {', '.join(self.tuned)}" if self.tuned else ""
            raise UserError(f"{len(weights)} weights for {num} experts and {len(self.patterns)} patterns{settings}")
        check_weights(weights, len(weights))
        self._tune(weights[num_weights:])
        rows = [weights[i : i + num] for i in range(0, num_weights, num)]
        return [(key, row) for keys, row in zip(self.keys, rows, strict=True) for key in keys]

    def _tune(self, settings: Sequence[float]) -> None:
        now = dict(zip(self.tuned, settings, strict=True))
        if now != self.tuned:
            # What was measured may depend on them, as thresholds of a trim do on the density.
            self.tuned, self.known = now, {}

    @torch.no_grad()
    def _merged(
        self, weights: Sequence[float], targets: Tensors, in_order: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Merge tensor after tensor, into a target where there is one; yields them as they are written to files."""
        rows = self._rows(weights)
        for key, row in sorted(rows) if in_order else rows:
            found, target = versions_of(key, self.base, self.experts, self.device), targets.get(key)
            if not found[0].is_floating_point():
                yield key, found[0] if target is None else target.copy_(found[0])
                continue
            # A target in the files' dtype is merged into as it is: nothing of its size is made.
            made = (self.dtype, found[0].device)
            if target is not None and (target.dtype, target.device) == made and target.is_contiguous():
                out = target
            else:
                out = torch.empty(found[0].shape, dtype=self.dtype, device=self.device)
            self._merge_into(out, key, found, row)
            if target is not None and out is not target:
                target.copy_(out)
            yield key, out

    def _merge_into(self, out: Tensor, key: str, found: list[Tensor], weights: Sequence[float]) -> None:
        context, ranks = self._known(key, found)
        context = replace(context, fishers=[f.to(self.device) for f in context.fishers])
        order = sorted(range(len(weights)), key=lambda i: (weights[i], ranks[i]))
        base, *experts = [found[0], *(found[1 + i] for i in order)]
        answer = self.rule.answer(base, experts, [weights[i] for i in order], context.ordered(order))
        combine_into(out.view(-1), [t.reshape(-1) for t in (base, *experts)], answer)

    def _known(self, key: str, found: list[Tensor]) -> tuple[Context, list[int]]:
        if key not in self.known:
            base, *experts = found
            context = self.context_of(key)
            tuned: dict[str, Any] = dict(self.tuned)
            context = replace(context, settings=replace(context.settings, **tuned))
            on_device = replace(context, fishers=[f.to(self.device) for f in context.fishers])
            measured = self.rule.measured(base, experts, on_device)
            order = order_of(experts, [0.0] * len(experts), context)
            self.known[key] = replace(measured, fishers=context.fishers), [order.index(i) for i in range(len(order))]
        return self.known[key]
