"""The order in which experts are summed: that of their weights and contents, whatever the user's."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# Elements compared at once: two experts nearly always differ in the first ones.
CHUNK = 1 << 14


def summing_order(
    experts: Sequence[Tensor], numbers: Sequence[Sequence[float | int]], tensors: Sequence[Sequence[Tensor]] = ()
) -> list[int]:
    """Sort experts by numbers that go with them, then by content, then by tensors that do; returns their places.

    Args:
        numbers: lists with one for each expert, the weights first; an empty list is as none.
        tensors: the same.

    Floating-point sums depend on the order of their terms. In this one a merge is a function of which expert has which
    weight, bit for bit, and not of the order in which experts are given: those that compare equal are equal.
    """

    def compared(i: int, j: int) -> int:
        for values in numbers:
            if values and values[i] != values[j]:
                return -1 if values[i] < values[j] else 1
        found = (compare(each[i], each[j]) for each in (experts, *tensors) if each)
        return next((sign for sign in found if sign), 0)

    return sorted(range(len(experts)), key=functools.cmp_to_key(compared))


def compare(a: Tensor, b: Tensor) -> int:
    """Say which tensor of a shape comes first: -1, 1, or 0 where they are equal, by the first element that differs.

    Elements are compared as the bits of float64 numbers, so that NaN and -0 have their places, too.
    """
    if a is b:
        return 0
    for x, y in zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True):
        x, y = (t.cpu().double().view(torch.int64) for t in (x, y))
        if len(differing := (x != y).nonzero()):
            first = differing[0]
            return -1 if x[first] < y[first] else 1
    return 0
