"""What is left of a merge's change when it is written in a coarser dtype than it was computed in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .rules.sums import CHUNK

NUM_WORST = 3


@dataclass(frozen=True)
class Change:
    """Sums over the entries of a tensor, or of several: of the wanted change Δ and of the written one δ.

    Attributes:
        product: Σ Δ·δ.
        wanted: Σ Δ².
        written: Σ δ².
        num_wanted: entries that were to change.
        num_lost: those of them that didn't.
    """

    product: float = 0.0
    wanted: float = 0.0
    written: float = 0.0
    num_wanted: int = 0
    num_lost: int = 0

    @property
    def cosine(self) -> float:
        """Compute the cosine between Δ and δ: 1 where nothing was to change, 0 where nothing changed."""
        norm = math.sqrt(self.wanted) * math.sqrt(self.written)
        return self.product / norm if norm else float(self.wanted == 0)

    @property
    def unchanged(self) -> float:
        """Compute the share of the entries that didn't change, of those that were to."""
        return self.num_lost / max(1, self.num_wanted)


def change_of(base: Tensor, experts: Sequence[Tensor], merged: Tensor, written: Tensor) -> Change:
    """Compare the change that a merge wants with what rounding leaves of it, in float64 on the CPU.

    Δ = θ_merged - θ and δ = round(θ_merged) - round(θ), entry by entry. Where every expert has the base's entry, the
    sum's own rounding isn't taken for a change. Entries that are not finite don't count.

    Args:
        merged: as it was computed.
        written: the same in the dtype of the file.
    """
    total = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
    num_wanted = num_lost = 0
    flat = (t.cpu().reshape(-1).split(CHUNK) for t in (base, merged, written, *experts))
    for start, wide, coarse, *others in zip(*flat, strict=True):
        moved = torch.zeros(len(start), dtype=torch.bool)
        for other in others:
            moved |= other != start
        wanted = (wide.double() - start.double()) * moved
        left = coarse.double() - start.to(coarse.dtype).double()
        finite = wanted.isfinite() & left.isfinite()
        wanted, left = wanted.where(finite, 0.0), left.where(finite, 0.0)
        for sum_, product in zip(total, (wanted * left, wanted.square(), left.square()), strict=True):
            sum_ += product.sum()
        num_wanted += int((wanted != 0).sum())
        num_lost += int(((wanted != 0) & (left == 0)).sum())
    product, wanted_square, written_square = (float(t) for t in total)
    return Change(product, wanted_square, written_square, num_wanted, num_lost)


def whole(changes: Mapping[str, Change]) -> Change:
    """Add up the changes of tensors."""
    every = list(changes.values())
    return Change(
        math.fsum(c.product for c in every),
        math.fsum(c.wanted for c in every),
        math.fsum(c.written for c in every),
        sum(c.num_wanted for c in every),
        sum(c.num_lost for c in every),
    )


def worst(changes: Mapping[str, Change]) -> dict[str, Change]:
    """Pick the tensors of which the least is left."""
    moved = sorted((k for k in changes if changes[k].num_wanted), key=lambda k: (changes[k].cosine, k))
    return {key: changes[key] for key in moved[:NUM_WORST]}


def survival_record(changes: Mapping[str, Change]) -> dict[str, Any]:
    """Say it for merge.json; rounded, so that no thread count shows in it."""

    def said(change: Change) -> dict[str, float]:
        return {"cosine": round(change.cosine, 4), "unchanged": round(change.unchanged, 4)}

    return {**said(whole(changes)), "worst": {key: said(change) for key, change in worst(changes).items()}}


def survival_line(record: dict[str, Any]) -> str:
    """Say it for the user, from the record."""
    layers = ", ".join(f"{key} {found['cosine']:.4f}" for key, found in record["worst"].items())
    return (
        f"rounding leaves a change whose cosine with the wanted one is {record['cosine']:.4f}, and "
        f"{100 * record['unchanged']:.2f} % of the entries as they were; worst: {layers}"
    )


def check_survival(record: dict[str, Any], dtype: str, bound: float) -> None:
    """Require that enough of the change is left.

    Raises:
        UserError: the cosine is below the bound.
    """
    if record["cosine"] < bound:
        raise UserError(
            f"in {dtype} {survival_line(record)}; expected a cosine of at least {bound:g}: write it in a finer dtype "
            f"with --set dtype=F32, or take it as it is with --set min_delta_cosine=-1"
        )
