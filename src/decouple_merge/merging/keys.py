"""Names of tensors: which of them belong to a model, to a block, to a trunk projection."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

from ..errors import UserError

TRUNK_PROJECTION = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.projection\.weight")


@runtime_checkable
class HasShape(Protocol):
    """A tensor, or what a file's header says of one."""

    @property
    def shape(self) -> Sequence[int]: ...


def is_trunk_projection(key: str) -> bool:
    """Say whether a key is that of a projection behind a U-Net's block, which a stock network doesn't have."""
    return TRUNK_PROJECTION.fullmatch(key) is not None


def has_trunk(keys: Iterable[str]) -> bool:
    """Say whether any key is that of a trunk projection."""
    return any(map(is_trunk_projection, keys))


def check_same_keys(base: Mapping[str, HasShape], expert: Mapping[str, HasShape], name: str) -> None:
    """Require that an expert has the base's keys and shapes; trunk projections may be extra, or lack.

    Raises:
        UserError: names the keys that are missing, unknown or of another shape.
    """
    if found := describe(compare_keys(base, expert)):
        raise UserError(f"{name} doesn't fit the base: {found}; expected an expert finetuned from this base")


def compare_keys(base: Mapping[str, HasShape], expert: Mapping[str, HasShape]) -> dict[str, list[str]]:
    """List the keys that are missing, unknown or of another shape; trunk projections may be extra, or lack."""
    return {
        "missing": [k for k in base if k not in expert and not is_trunk_projection(k)],
        "unknown": [k for k in expert if k not in base and not is_trunk_projection(k)],
        "of another shape": [k for k in base if k in expert and tuple(base[k].shape) != tuple(expert[k].shape)],
    }


def describe(problems: Mapping[str, Sequence[str]]) -> str:
    """Name the first keys of every kind, and how many there are."""

    def named(keys: Sequence[str]) -> str:
        return ", ".join(keys[:5]) + (f", … ({len(keys)} in all)" if len(keys) > 5 else "")

    return "; ".join(f"{what}: {named(keys)}" for what, keys in problems.items() if keys)


def group_keys(keys: Sequence[str], patterns: Sequence[str]) -> list[list[str]]:
    """Give every key to the first pattern that matches it, as the blocks of a merge do.

    Returns:
        The keys of each pattern, in their order.

    Raises:
        UserError: a key is matched by no pattern, or a pattern gets no key.
    """
    groups: list[list[str]] = [[] for _ in patterns]
    for key in keys:
        index = next((i for i, pattern in enumerate(patterns) if fnmatchcase(key, pattern)), None)
        if index is None:
            raise UserError(f"no pattern of {', '.join(patterns)} matches {key}; end them with * for all other keys")
        groups[index].append(key)
    for pattern, group in zip(patterns, groups, strict=True):
        if not group:
            raise UserError(f"no key is left for the pattern {pattern!r}; keys are like {keys[0]}")
    return groups
