"""Merge experts by task arithmetic; pure functions of tensors."""

import torch
from torch import Tensor

from .rules import Context, combine, linear

Tensors = dict[str, Tensor]


def check_same_keys(base: Tensors, expert: Tensors, name: str) -> None:
    """Require that an expert has the base's keys and shapes; projections may be extra.

    Raises:
        ValueError: names the keys that are missing, unknown or of another shape.
    """
    unknown = [k for k in expert if k not in base and not k.endswith("projection.weight")]
    problems = {
        "missing": [k for k in base if k not in expert and not k.endswith("projection.weight")],
        "unknown": unknown,
        "of another shape": [k for k in base if k in expert and base[k].shape != expert[k].shape],
    }
    found = "; ".join(f"{what}: {', '.join(keys[:5])}" for what, keys in problems.items() if keys)
    if found:
        raise ValueError(f"{name} doesn't fit the base: {found}; expected an expert finetuned from this base")


def merge(base: Tensors, experts: list[Tensors], weights: list[float]) -> Tensors:
    """Compute θ + Σ w_i·(θ_i - θ) over every floating tensor (DeMe, Eq. 8; Ilharco et al. 2023).

    Sums are float32, then cast to the base's dtype: with weights 0 the result is the base, with a single 1 it is
    that expert, both bit for bit. Integer tensors are the base's. A projection W, which the base doesn't have,
    counts as a task vector around the identity.

    Raises:
        ValueError: there are not as many weights as experts.
    """
    if len(weights) != len(experts):
        raise ValueError(f"{len(weights)} weights for {len(experts)} experts, expected one each")
    merged = {}
    for key in [*base, *sorted({k for e in experts for k in e} - base.keys())]:
        start = base[key] if key in base else torch.eye(len(next(e[key] for e in experts if key in e)))
        if not start.is_floating_point():
            merged[key] = start.clone()
            continue
        values = [e[key] if key in base else e.get(key, start) for e in experts]
        merged[key] = combine([start, *values], linear(start, values, weights, Context(key))).to(start.dtype)
    return merged


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Convert the floating tensors to a dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def task_vector_norms(base: Tensors, experts: list[Tensors]) -> list[float]:
    """Compute ‖θ_i - θ‖ of each expert over the base's floating tensors."""
    return [
        sum(float((e[k].double() - v.double()).square().sum()) for k, v in base.items() if v.is_floating_point()) ** 0.5
        for e in experts
    ]
