"""Merge experts by task arithmetic; pure functions of tensors."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .adapted import Adapted
from .rules import RULES, check_method, check_weights
from .rules.rule import Context, Settings, merge_tensor
from .rules.sums import CHUNK, wide_dtype

Tensors = dict[str, Tensor]
# The tensors of a model, which may be made when they are asked for.
Model = Mapping[str, Tensor]


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


def all_keys(base: Model, experts: Sequence[Model]) -> list[str]:
    """List the base's keys, then those of projections."""
    return [*base, *sorted({k for e in experts for k in e} - base.keys())]


def versions(base: Model, experts: Sequence[Model]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield each tensor of the base and of every expert; a projection that one of them lacks is the identity."""
    for key in all_keys(base, experts):
        yield key, versions_of(key, base, experts)


def versions_of(key: str, base: Model, experts: Sequence[Model], device: torch.device | None = None) -> list[Tensor]:
    """Read a tensor of the base and of every expert, as ``versions`` does, onto a device where one is given."""
    if key not in base:
        start = torch.eye(len(next(e[key] for e in experts if key in e)), device=device)
        return [start, *(e.get(key, start).to(device=device) for e in experts)]
    start = base[key].to(device=device)
    return [start, *(e.version(key, start) if isinstance(e, Adapted) else e[key].to(device=device) for e in experts)]


def inner_products(
    base: Model, experts: Sequence[Model], gradients: Model, keys: Sequence[str], device: torch.device
) -> Tensor:
    """Compute ⟨g, θ_i - θ⟩ of each expert over some floating tensors: by the chain rule, ∂L/∂w_i of their merge.

    Args:
        gradients: g, by key.

    Returns:
        float64 [N] on the CPU. Task vectors are subtracted first: ⟨g, θ_i⟩ - ⟨g, θ⟩ would cancel.
    """
    total = torch.zeros(len(experts), dtype=torch.float64)
    dtype = wide_dtype(next(iter(gradients.values())))
    # Base, experts and gradient, as many entries at once whatever the tensors' sizes.
    rows, num_filled = torch.empty(len(experts) + 2, CHUNK, dtype=dtype, device=device), 0

    def product(found: Tensor) -> Tensor:
        return ((found[1:-1] - found[0]) @ found[-1]).cpu().double()

    for key in keys:
        flat = [t.reshape(-1) for t in (*versions_of(key, base, experts, device), gradients[key])]
        while len(flat[0]):
            num = min(CHUNK - num_filled, len(flat[0]))
            for row, piece in zip(rows, flat, strict=True):
                row[num_filled : num_filled + num] = piece[:num]
            flat, num_filled = [t[num:] for t in flat], num_filled + num
            if num_filled == CHUNK:
                total, num_filled = total + product(rows), 0
    return total + product(rows[:, :num_filled]) if num_filled else total


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Convert the floating tensors to a dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def task_vector_norms(base: Tensors, experts: list[Tensors]) -> list[float]:
    """Compute ‖θ_i - θ‖ of each expert over the base's floating tensors."""
    return [
        sum(float((e[k].double() - v.double()).square().sum()) for k, v in base.items() if v.is_floating_point()) ** 0.5
        for e in experts
    ]
