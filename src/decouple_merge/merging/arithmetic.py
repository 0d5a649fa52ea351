"""Merge experts by task arithmetic; pure functions of tensors."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .keys import group_keys
from .rules import RULES, Context, check_method, chunk_size, combine, combine_into

Tensors = dict[str, Tensor]


def merge(
    base: Tensors, experts: list[Tensors], weights: list[float], method: str = "linear", density: float = 1.0
) -> Tensors:
    """Merge every floating tensor by a rule, θ + Σ w_i·(θ_i - θ) by default (DeMe, Eq. 8; Ilharco et al. 2023).

    Sums are float32, then cast to the base's dtype: with weights 0 the result is the base, with a single 1 it is
    that expert, both bit for bit. Integer tensors are the base's. A projection W, which the base doesn't have,
    counts as a task vector around the identity.

    Raises:
        ValueError: there is no such rule, or there are not as many weights as experts.
    """
    check_method(method)
    if len(weights) != len(experts):
        raise ValueError(f"{len(weights)} weights for {len(experts)} experts, expected one each")
    merged = {}
    for key, versions in _versions(base, experts):
        if versions[0].is_floating_point():
            coefficients = RULES[method](versions[0], versions[1:], weights, Context(key, density))
            merged[key] = combine(versions, coefficients, versions[0].dtype)
        else:
            merged[key] = versions[0].clone()
    return merged


def _all_keys(base: Tensors, experts: list[Tensors]) -> list[str]:
    """List the base's keys, then those of projections."""
    return [*base, *sorted({k for e in experts for k in e} - base.keys())]


def _versions(base: Tensors, experts: list[Tensors]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield each tensor of the base and of every expert; a projection that one of them lacks is the identity."""
    for key in _all_keys(base, experts):
        start = base[key] if key in base else torch.eye(len(next(e[key] for e in experts if key in e)))
        yield key, [start, *(e[key] if key in base else e.get(key, start) for e in experts)]


def cut_blocks(base: Tensors, experts: list[Tensors], patterns: Sequence[str]) -> list[tuple[Tensors, list[Tensors]]]:
    """Cut base and experts into the blocks of ``group_keys``, which have merging weights of their own.

    Raises:
        ValueError: as ``group_keys``.
    """

    def part(tensors: Tensors, keys: list[str]) -> Tensors:
        return {k: tensors[k] for k in keys if k in tensors}

    groups = group_keys(_all_keys(base, experts), patterns)
    return [(part(base, keys), [part(e, keys) for e in experts]) for keys in groups]


class Stacked:
    """Base and experts as one matrix that is held once: a candidate is one pass over it, into memory that is reused.

    Attributes:
        matrix: [N + 1, P] of ``dtype``, the base's row first; P counts the elements of all floating tensors.
        merged: [P], the last candidate.
    """

    def __init__(
        self, base: Tensors, experts: list[Tensors], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.fixed: Tensors = {}
        self.shapes: dict[str, torch.Size] = {}
        for key, (start, *_) in _versions(base, experts):
            if start.is_floating_point():
                self.shapes[key] = start.shape
            else:
                self.fixed[key] = start.to(device)
        total = sum(shape.numel() for shape in self.shapes.values())
        self.matrix = torch.empty(len(experts) + 1, total, device=device, dtype=dtype)
        self.merged = torch.empty(total, device=device, dtype=dtype)
        rows = [self._views(row) for row in self.matrix]
        for key, versions in _versions(base, experts):
            if key in self.shapes:
                for row, version in zip(rows, versions, strict=True):
                    row[key].copy_(version)

    def _views(self, flat: Tensor) -> Tensors:
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {key: part.view(shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def merge(self, weights: Sequence[float]) -> Tensors:
        """Compute what ``merge`` does, bit for bit, as views of ``merged``; the next call overwrites them.

        Raises:
            ValueError: there are not as many weights as experts.
        """
        if len(weights) != len(self.matrix) - 1:
            raise ValueError(f"{len(weights)} weights for {len(self.matrix) - 1} experts, expected one each")
        combine_into(self.merged, self.matrix.unbind(), [1.0 - math.fsum(weights), *weights])
        return self._views(self.merged) | self.fixed

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


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Convert the floating tensors to a dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def task_vector_norms(base: Tensors, experts: list[Tensors]) -> list[float]:
    """Compute ‖θ_i - θ‖ of each expert over the base's floating tensors."""
    return [
        sum(float((e[k].double() - v.double()).square().sum()) for k, v in base.items() if v.is_floating_point()) ** 0.5
        for e in experts
    ]
