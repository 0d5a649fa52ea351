"""Models merged again and again with other weights: held once, in one matrix."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .arithmetic import Tensors, versions
from .rules import chunk_size, combine_into, ties_above, trim_floor


class Stacked:
    """Base and experts as one matrix that is held once: a merge is one pass over it, into memory that is reused.

    Attributes:
        matrix: [N + 1, P] of ``dtype``, the base's row first; P counts the elements of all floating tensors.
        merged: [P], the last merge.
    """

    def __init__(
        self, base: Tensors, experts: list[Tensors], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.fixed: Tensors = {}
        self.shapes: dict[str, torch.Size] = {}
        for key, (start, *_) in versions(base, experts):
            if start.is_floating_point():
                self.shapes[key] = start.shape
            else:
                self.fixed[key] = start.to(device)
        total = sum(shape.numel() for shape in self.shapes.values())
        self.matrix = torch.empty(len(experts) + 1, total, device=device, dtype=dtype)
        self.merged = torch.empty(total, device=device, dtype=dtype)
        rows = [self.views(row) for row in self.matrix]
        for key, found in versions(base, experts):
            if key in self.shapes:
                for row, tensor in zip(rows, found, strict=True):
                    row[key].copy_(tensor)

    def views(self, flat: Tensor) -> Tensors:
        """Cut a row into the tensors that it consists of."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {key: part.view(shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def check_count(self, weights: Sequence[float]) -> None:
        """Require a weight for each expert.

        Raises:
            UserError: there are more or fewer.
        """
        if len(weights) != len(self.matrix) - 1:
            raise UserError(f"{len(weights)} weights for {len(self.matrix) - 1} experts, expected one each")

    def merge(self, weights: Sequence[float]) -> Tensors:
        """Compute what ``arithmetic.merge`` does, bit for bit, as views of ``merged``; the next call overwrites them.

        Raises:
            UserError: there are not as many weights as experts.
        """
        self.check_count(weights)
        combine_into(self.merged, self.matrix.unbind(), [1.0 - math.fsum(weights), *weights])
        return self.views(self.merged) | self.fixed

    def inner_products(self, gradients: Tensors) -> Tensor:
        """Compute ⟨g, θ_i - θ⟩ of each expert over all floating tensors: by the chain rule, ∂L/∂w_i of ``merge``.

        Args:
            gradients: g, by key.

        Returns:
            float64 [N] on the CPU. Task vectors are subtracted first: ⟨g, θ_i⟩ - ⟨g, θ⟩ would cancel.
        """
        flat = torch.cat([gradients[key].flatten() for key in self.shapes])
        total = torch.zeros(len(self.matrix) - 1, dtype=torch.float64)
        size = chunk_size(flat)
        for rows, chunk in zip(self.matrix.split(size, dim=1), flat.split(size), strict=True):
            total += ((rows[1:] - rows[0]) @ chunk).cpu().double()
        return total


class Trimmed:
    """TIES on a stack: trimming is done once, a merge is one pass of election, into the stack's memory.

    Task vectors are not kept: of each no more than its floor, from which the pass finds again what trimming left. So
    this holds no more than the stack itself, and while it works a few temporaries of a chunk, or of a tensor on other
    devices than the CPU.

    Attributes:
        floors: by key, for each expert the size of the smallest entry of its task vector that stays.
    """

    def __init__(self, stack: Stacked, density: float) -> None:
        self.stack = stack
        self.rows = [stack.views(row) for row in stack.matrix]
        base, *experts = self.rows
        self.floors = {k: [trim_floor(e[k] - base[k], density) for e in experts] for k in base}

    def merge(self, weights: Sequence[float]) -> Tensors:
        """Compute what ``arithmetic.merge`` does by ``ties``, bit for bit; the next call overwrites the tensors.

        Raises:
            UserError: there are not as many weights as experts.
        """
        self.stack.check_count(weights)
        merged = self.stack.views(self.stack.merged)
        for key, floors in self.floors.items():
            out, *tensors = (t.view(-1) for t in (merged[key], *(row[key] for row in self.rows)))
            size = chunk_size(out)
            for target, *chunks in zip(*(t.split(size) for t in (out, *tensors)), strict=True):
                start, *others = chunks
                combine_into(target, chunks, ties_above(start, others, list(weights), floors))
        return merged | self.stack.fixed
