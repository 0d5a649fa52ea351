"""What the benchmarks share: contenders timed in turn, and ratios of times of one repeat."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch


def seconds_of(function: Callable[[], object]) -> float:
    """Time a call, and on a GPU what it has set going."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def interleaved(contenders: Mapping[Any, Callable[[], object]], num_repeats: int) -> dict[Any, list[float]]:
    """Time contenders in turn; who goes first changes, so that a drift of the machine's speed favours nobody."""
    seconds: dict[Any, list[float]] = {name: [] for name in contenders}
    for repeat in range(num_repeats):
        for name in list(contenders)[:: -1 if repeat % 2 else 1]:
            seconds[name].append(seconds_of(contenders[name]))
    return seconds


def advance(updates: Iterator[object], num: int) -> None:
    """Take so many steps of what yields after each."""
    for _ in islice(updates, num):
        pass


def ratios(seconds: list[float], reference: list[float], digits: int = 2) -> str:
    """Say the ratio to what ran in the same repeat: median (quartiles)."""
    found = [a / b for a, b in zip(seconds, reference, strict=True)]
    low, median, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
