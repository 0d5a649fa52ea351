"""Sums of versions of a tensor, chunk by chunk, in float32 or wider."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

Coefficients = list[float | Tensor]

# Elements whose sum stays in a core's cache while the tensors pass through it. A sum of a whole tensor would also spend
# most of its time on the system's clearing of fresh memory.
CHUNK = 1 << 18
# The same where coefficients are made on the way, with a few temporaries for each expert.
SMALL_CHUNK = 1 << 16


@dataclass(frozen=True)
class Pointwise:
    """An answer for any part of the tensors, so that no more than a chunk of temporaries is in memory.

    Attributes:
        function: of a flat chunk of the base and a list of those of the experts to their coefficients, or to a change.
            It gets every chunk once, in order.
        row: chunks start at multiples of it, and end at some.
        beside: tensors of the same shape whose chunks stand behind the experts' in the list.
    """

    function: Callable[[Tensor, list[Tensor]], Coefficients | Tensor]
    row: int = 1
    beside: Sequence[Tensor] = ()


# Coefficients of the base and of each expert, or the change that is added to the base.
Answer = Coefficients | Pointwise | Tensor


def combine(tensors: Sequence[Tensor], answer: Answer) -> Tensor:
    """Sum c_k·θ_k in float32, or float64 where the tensors are; a coefficient of 0 leaves its tensor out.

    Args:
        tensors: the base, then the experts, of one shape.
        answer: the coefficients, or a change Δ: then it is θ + Δ.
    """
    out = torch.empty(tensors[0].shape, dtype=wide_dtype(tensors[0]), device=tensors[0].device)
    combine_into(out.view(-1), [t.reshape(-1) for t in tensors], answer)
    return out


def combine_into(out: Tensor, tensors: Sequence[Tensor], answer: Answer) -> None:
    """Do what ``combine`` does with flat tensors, into memory that is there."""
    if isinstance(answer, Pointwise):
        size = max(1, chunk_size(out, SMALL_CHUNK) // max(1, answer.row)) * max(1, answer.row)
        every = [out, *tensors, *(t.reshape(-1) for t in answer.beside)]
        for target, base, *others in zip(*(t.split(size) for t in every), strict=True):
            combine_into(target, [base, *others[: len(tensors) - 1]], answer.function(base, others))
    elif isinstance(answer, Tensor):
        out.copy_(tensors[0].to(wide_dtype(tensors[0])) + answer.reshape(-1))
    else:
        _sum_into(out, tensors, [c.reshape(-1) if isinstance(c, Tensor) else c for c in answer])


def _sum_into(out: Tensor, tensors: Sequence[Tensor], coefficients: Coefficients) -> None:
    wide = wide_dtype(tensors[0])
    terms = [(c, t) for c, t in zip(coefficients, tensors, strict=True) if isinstance(c, Tensor) or c != 0]
    if not terms:
        out.zero_()
        return
    size = chunk_size(out, CHUNK)
    pieces = [zip(c.split(size) if isinstance(c, Tensor) else repeat(c), t.split(size)) for c, t in terms]  # noqa: B905
    for target, (c, first), *others in zip(out.split(size), *pieces, strict=True):
        total = target if out.dtype == wide else torch.empty_like(target, dtype=wide)
        torch.mul(first.to(wide), c, out=total)
        for c, piece in others:
            if isinstance(c, Tensor):
                total.addcmul_(c, piece.to(wide))
            else:
                total.add_(piece.to(wide), alpha=c)
        if total is not target:
            target.copy_(total)


def chunk_size(flat: Tensor, size: int) -> int:
    """Say how many elements to sum at once: a device other than the CPU is best kept busy with all of them."""
    return size if flat.device.type == "cpu" else max(1, len(flat))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Say what sums are computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """Say what votes and inner products are summed in: float64, which Apple's GPUs don't have."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def task_vector(base: Tensor, expert: Tensor) -> Tensor:
    """Compute θ_i - θ in what sums are computed in."""
    wide = wide_dtype(base)
    return expert.to(wide) - base.to(wide)


def gram(tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Compute the inner products of some tensors, or of their differences from a base; float64 [N, N] on the CPU."""
    flat = [t.reshape(-1) for t in tensors]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    start = torch.zeros(()).expand(len(flat[0])) if base is None else base.reshape(-1)
    size = chunk_size(flat[0], SMALL_CHUNK)
    for origin, *chunks in zip(*(t.split(size) for t in (start, *flat)), strict=True):
        rows = torch.stack([c.to(exact_dtype(c)) for c in chunks])
        rows = rows if base is None else rows - origin.to(rows)
        total += (rows @ rows.T).cpu().double()
    return total
