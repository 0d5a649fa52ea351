"""Models merged again and again with other weights: held once, in one matrix."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .arithmetic import Tensors, versions
from .order import summing_order
from .rules import check_weights
from .rules.rule import Context, Rule, order_of
from .rules.sums import CHUNK, chunk_size, combine_into


class Stacked:
    """Base and experts as one matrix that is held once: a merge is one pass over it, into memory that is reused.

    Attributes:
        matrix: [N + 1, P] of ``dtype``, the base's row first; P counts the elements of all floating tensors.
        rows: the tensors of each of its rows, by key.
        merged: [P], the last merge.
        ranks: by key, for each expert its place in ``summing_order`` where weights are equal.
    """

    def __init__(
        self, base: Tensors, experts: list[Tensors], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.fixed: Tensors = {}
        self.shapes: dict[str, torch.Size] = {}
        self.ranks: dict[str, list[int]] = {}
        for key, (start, *others) in versions(base, experts):
            if start.is_floating_point():
                self.shapes[key] = start.shape
                order = summing_order(others, [])
                self.ranks[key] = [order.index(i) for i in range(len(order))]
            else:
                self.fixed[key] = start.to(device)
        total = sum(shape.numel() for shape in self.shapes.values())
        self.matrix = torch.empty(len(experts) + 1, total, device=device, dtype=dtype)
        self.merged = torch.empty(total, device=device, dtype=dtype)
        self.rows = [self.views(row) for row in self.matrix]
        for key, found in versions(base, experts):
            if key in self.shapes:
                for row, tensor in zip(self.rows, found, strict=True):
                    row[key].copy_(tensor)

    def views(self, flat: Tensor) -> Tensors:
        """Cut a row into the tensors that it consists of."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {key: part.view(shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def check(self, weights: Sequence[float]) -> None:
        """Require a finite weight for each expert; raises a UserError as ``check_weights``."""
        check_weights(weights, len(self.matrix) - 1)

    def order(self, key: str, weights: Sequence[float]) -> list[int]:
        """Say in which order the experts' versions of a tensor are summed, as ``summing_order`` does."""
        return sorted(range(len(weights)), key=lambda i: (weights[i], self.ranks[key][i]))

    def merge(self, weights: Sequence[float]) -> Tensors:
        """Compute what ``arithmetic.merge`` does, bit for bit, as views of ``merged``; the next call overwrites them.

        Raises:
            UserError: there is not a finite weight for each expert.
        """
        self.check(weights)
        merged, rest = self.views(self.merged), 1.0 - math.fsum(weights)
        for key, out in merged.items():
            order = self.order(key, weights)
            tensors = [row[key].view(-1) for row in (self.rows[0], *(self.rows[1 + i] for i in order))]
            combine_into(out.view(-1), tensors, [rest, *(weights[i] for i in order)])
        return merged | self.fixed

    def inner_products(self, gradients: Tensors) -> Tensor:
        """Compute ⟨g, θ_i - θ⟩ of each expert over all floating tensors: by the chain rule, ∂L/∂w_i of ``merge``.

        Args:
            gradients: g, by key.

        Returns:
            float64 [N] on the CPU. Task vectors are subtracted first: ⟨g, θ_i⟩ - ⟨g, θ⟩ would cancel.
        """
        flat = torch.cat([gradients[key].flatten() for key in self.shapes])
        total = torch.zeros(len(self.matrix) - 1, dtype=torch.float64)
        size = chunk_size(flat, CHUNK)
        for rows, chunk in zip(self.matrix.split(size, dim=1), flat.split(size), strict=True):
            total += ((rows[1:] - rows[0]) @ chunk).cpu().double()
        return total


class Ruled:
    """Merges by any rule on a stack, into its memory; what doesn't depend on the weights is computed once.

    Task vectors are not kept. While a merge works, it holds a few temporaries of a chunk, or of a tensor where the rule
    works on matrices or the device isn't the CPU.

    Args:
        context_of: a key's context, all that the rule needs besides the tensors.

    Attributes:
        contexts: by key, with what the rule measured of each expert.
    """

    def __init__(self, stack: Stacked, rule: Rule, context_of: Callable[[str], Context]) -> None:
        self.stack, self.rule, self.rows = stack, rule, stack.rows
        self.contexts: dict[str, Context] = {}
        self.ranks: dict[str, list[int]] = {}
        for key, base in self.rows[0].items():
            experts = [row[key] for row in self.rows[1:]]
            context = context_of(key)
            context = replace(context, fishers=[f.to(base.device) for f in context.fishers])
            self.contexts[key] = rule.measured(base, experts, context)
            order = order_of(experts, [0.0] * len(experts), self.contexts[key])
            self.ranks[key] = [order.index(i) for i in range(len(order))]

    def merge(self, weights: Sequence[float]) -> Tensors:
        """Compute what ``arithmetic.merge`` does by the rule, bit for bit; the next call overwrites the tensors.

        Raises:
            UserError: there is not a finite weight for each expert.
        """
        self.stack.check(weights)
        merged = self.stack.views(self.stack.merged)
        for key, context in self.contexts.items():
            order = sorted(range(len(weights)), key=lambda i: (weights[i], self.ranks[key][i]))
            base, *experts = [self.rows[0][key], *(self.rows[1 + i][key] for i in order)]
            answer = self.rule.answer(base, experts, [weights[i] for i in order], context.ordered(order))
            combine_into(merged[key].view(-1), [t.view(-1) for t in (base, *experts)], answer)
        return merged | self.stack.fixed
