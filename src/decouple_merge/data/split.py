"""Which examples are trained on, and which are held out for validation."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from ..config import Data
from ..errors import UserError
from ..seeds import generator

# Of the classes that a message lists.
NUM_NAMED = 12


@runtime_checkable
class Labelled(Protocol):
    """Examples, and what is known of them.

    Attributes:
        labels: the class of each; empty where there are none.
        groups: of each the group that is not to be separated; empty where there are none.
    """

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...

    @property
    def labels(self) -> Sequence[Hashable]: ...

    @property
    def groups(self) -> Sequence[Hashable]: ...


@runtime_checkable
class Classed(Labelled, Protocol):
    """Examples whose classes may have names; empty where they have none."""

    @property
    def class_names(self) -> Sequence[str]: ...


class Split(NamedTuple):
    """Indices of the examples that trainings see, and of those that none does."""

    trained: Sequence[int]
    held_out: Sequence[int]


@lru_cache(maxsize=2)
def split(examples: Labelled, data: Data) -> Split:
    """Hold out ``data.num_held_out`` examples, the last or a random sample as ``data.held_out`` says.

    Of the others those are trained on that have one of ``data.classes``, where it names some.

    Raises:
        UserError: as ``hold_out``; or the examples have no classes, or none of such a name.
    """
    num = len(examples)
    if data.held_out == "random":
        found = hold_out(num, data.num_held_out, examples.labels, examples.groups)
    else:
        _check(num, data.num_held_out)
        found = Split(range(num - data.num_held_out), range(num - data.num_held_out, num))
    return found if data.classes is None else found._replace(trained=_of_classes(examples, found.trained, data.classes))


def _of_classes(examples: Labelled, indices: Sequence[int], wanted: Sequence[str]) -> list[int]:
    names = examples.class_names if isinstance(examples, Classed) else []
    if not names:
        raise UserError(
            "data.classes names classes, and the data has none; expected Fashion-MNIST, images in folders by class, or "
            "the classes of a class-conditional base"
        )
    there = dict.fromkeys(names[i] for i in indices)
    if unknown := [name for name in wanted if name not in there]:
        some = ", ".join(sorted(there)[:NUM_NAMED]) + (", …" if len(there) > NUM_NAMED else "")
        raise UserError(
            f"data.classes has {unknown[0]!r}, which no image has that is trained on; expected some of {some}"
        )
    return [i for i in indices if names[i] in wanted]


def hold_out(num: int, num_held_out: int, labels: Sequence[Hashable] = (), groups: Sequence[Hashable] = ()) -> Split:
    """Hold out a random sample, by class, without separating groups.

    The sample is a function of the arguments alone, not of a run's seed: a base and all that is trained from it leave
    out the same examples. Of each class it has the share that the class has of all; where it is large enough it has one
    group of each class, and leaves one. Where groups don't fit it is smaller than asked for.

    Args:
        labels, groups: as in ``Labelled``. A group has the class of its first example.

    Raises:
        UserError: nothing is left to train on, or nothing to hold out.
    """
    _check(num, num_held_out)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, group in enumerate(groups or range(num)):
        members[group].append(i)
    units = list(members.values())
    order = torch.randperm(len(units), generator=generator("held out")).tolist()
    classes = [labels[units[i][0]] if labels else None for i in order]
    held_out: list[int] = []
    for _, i in sorted(zip(_places(classes), order, strict=True), key=lambda pair: pair[0]):
        if len(held_out) + len(units[i]) <= num_held_out:
            held_out += units[i]
    if not held_out:
        raise UserError(
            f"data.num_held_out is {num_held_out}, less than the images that belong together, of which there are at "
            f"least {min(map(len, units))}: hold out more"
        )
    others = set(held_out)
    return Split([i for i in range(num) if i not in others], sorted(held_out))


def _places(classes: list[Hashable]) -> Iterator[float]:
    """Say of members of classes, in random order, where they stand in an order of which every start has all shares."""
    sizes, ranks = Counter(classes), Counter[Hashable]()
    for label in classes:
        rank, size = ranks[label], sizes[label]
        ranks[label] += 1
        # The last of a class is left to train on, the first is held out before the others.
        yield 1 if rank == size - 1 else 0 if rank == 0 else (rank + 0.5) / size


def _check(num: int, num_held_out: int) -> None:
    if num_held_out >= num:
        raise UserError(
            f"the data has {num} images and data.num_held_out is {num_held_out}: nothing is left to "
            "train on; give more images, or hold out fewer"
        )
