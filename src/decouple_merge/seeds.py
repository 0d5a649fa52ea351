"""Random streams: every draw is a function of a key, so nothing random needs saving or restoring."""

import hashlib
from collections.abc import Sequence

import torch

from .errors import UserError

NUM_SEEDS = 2**32


def stream_seed(*key: int | str) -> int:
    """Hash a key such as ``(seed, "noise", rank, step)`` to a seed in [0, 2**32), all that torch's CPU generator keeps.

    Hashing, and not adding, keeps (1, 2) and (2, 1) apart and makes neighbouring steps independent.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1 & 0xFFFFFFFF


def generator(*key: int | str) -> torch.Generator:
    """Make the CPU generator of a key. CPU, so that the numbers are the same on every device."""
    return torch.Generator().manual_seed(stream_seed(*key))


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds beyond 2**32, where torch's start again from 0.

    Raises:
        UserError: as said.
    """
    # Of a range without walking it: it may be of any length.
    last = max(seeds[0], seeds[-1]) if isinstance(seeds, range) and seeds else max(seeds, default=0)
    if last >= NUM_SEEDS:
        raise UserError(f"the last seed is {last}, expected less than 2**32: the noise of seed 0 comes again")


def check_disjoint(search: range, report: range) -> None:
    """Refuse seeds that are used both to choose a model and to report on it.

    Raises:
        UserError: the two half-open seed ranges overlap, or go beyond 2**32, where torch's seeds start again from 0.
    """
    if max(search.stop, report.stop) > NUM_SEEDS:
        raise UserError(
            f"search seeds end at {search.stop} and report seeds at {report.stop}, expected at most 2**32: beyond, "
            "the same noise comes again; lower search.first_seed or evaluate.first_seed"
        )
    if max(search.start, report.start) < min(search.stop, report.stop):
        raise UserError(
            f"search seeds [{search.start}, {search.stop}) overlap report seeds [{report.start}, {report.stop}); "
            "a number must not be reported on the seeds that chose the model: move search.first_seed or "
            "evaluate.first_seed"
        )
