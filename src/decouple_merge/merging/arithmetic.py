"""Merge experts by task arithmetic; pure functions of tensors."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .keys import group_keys
from .rules import RULES, check_method, check_weights
from .rules.rule import Context, Settings, merge_tensor

Tensors = dict[str, Tensor]


def merge(
    base: Tensors,
    experts: list[Tensors],
    weights: list[float],
    method: str = "linear",
    settings: Settings | None = None,
) -> Tensors:
    """Merge every floating tensor by a rule, θ + Σ w_i·(θ_i - θ) by default (DeMe, Eq. 8; Ilharco et al. 2023).

    Sums are float32, then cast to the base's dtype: with weights 0 the result is the base, with a single 1 it is
    that expert, both bit for bit, and experts may come in any order. Integer tensors are the base's. A projection W,
    which the base doesn't have, counts as a task vector around the identity.

    Args:
        method: a rule of ``RULES`` that needs no more than the tensors.
        settings: of the rule, its own where not given.

    Raises:
        UserError: there is no such rule, it needs more, or there is not a finite weight for each expert.
    """
    check_method(method)
    check_weights(weights, len(experts))
    if needs := RULES[method].needs:
        raise UserError(f"{method} needs {' and '.join(needs)} beside the tensors; use merge_models, or deme merge")
    merged = {}
    for key, (start, *others) in versions(base, experts):
        if start.is_floating_point():
            context = Context(key, settings or Settings())
            merged[key] = merge_tensor(RULES[method], start, others, weights, context).to(start.dtype)
        else:
            merged[key] = start.clone()
    return merged


def _all_keys(base: Tensors, experts: list[Tensors]) -> list[str]:
    """List the base's keys, then those of projections."""
    return [*base, *sorted({k for e in experts for k in e} - base.keys())]


def versions(base: Tensors, experts: list[Tensors]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield each tensor of the base and of every expert; a projection that one of them lacks is the identity."""
    for key in _all_keys(base, experts):
        start = base[key] if key in base else torch.eye(len(next(e[key] for e in experts if key in e)))
        yield key, [start, *(e[key] if key in base else e.get(key, start) for e in experts)]


def cut_blocks(base: Tensors, experts: list[Tensors], patterns: Sequence[str]) -> list[tuple[Tensors, list[Tensors]]]:
    """Cut base and experts into the blocks of ``group_keys``, which have merging weights of their own.

    Raises:
        UserError: as ``group_keys``.
    """

    def part(tensors: Tensors, keys: list[str]) -> Tensors:
        return {k: tensors[k] for k in keys if k in tensors}

    groups = group_keys(_all_keys(base, experts), patterns)
    return [(part(base, keys), [part(e, keys) for e in experts]) for keys in groups]


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Convert the floating tensors to a dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def task_vector_norms(base: Tensors, experts: list[Tensors]) -> list[float]:
    """Compute ‖θ_i - θ‖ of each expert over the base's floating tensors."""
    return [
        sum(float((e[k].double() - v.double()).square().sum()) for k, v in base.items() if v.is_floating_point()) ** 0.5
        for e in experts
    ]
