"""What merge.json says of a merge."""

from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..config import Merge


def merge_record(
    settings: Merge,
    base: dict[str, str],
    experts: Sequence[str],
    experts_sha256: Sequence[str],
    ranges: list[list[int | float]] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Say how a model was merged, so that ``recipes.repeat_merge`` can do it again.

    Args:
        base: name, and sha256 where it is known by now.
        experts: paths, from the folder of merge.json or as the user gave them.
        ranges: [low, high) in timesteps of each expert, where they were finetuned on some.
        fields: what else is known of the merge.
    """
    return {
        "method": settings.method,
        "weights": settings.weights,
        "settings": settings.model_dump(mode="json"),
        "ranges": ranges,
        "base": base,
        "experts": list(experts),
        "experts_sha256": list(experts_sha256),
        **fields,
        "decouple_merge": __version__,
    }
