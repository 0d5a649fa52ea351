"""Which examples are trained on, and which are held out for validation."""

from collections.abc import Sequence, Sized
from typing import NamedTuple

from ..config import Data
from ..errors import UserError


class Split(NamedTuple):
    """Indices of the examples that trainings see, and of those that none does."""

    trained: Sequence[int]
    held_out: Sequence[int]


def split(examples: Sized, data: Data) -> Split:
    """Hold out the last ``data.num_held_out`` examples.

    Raises:
        UserError: nothing is left to train on.
    """
    num = len(examples) - data.num_held_out
    if num <= 0:
        raise UserError(
            f"the data has {len(examples)} images and data.num_held_out is {data.num_held_out}: nothing is left to "
            "train on; give more images, or hold out fewer"
        )
    return Split(range(num), range(num, len(examples)))
