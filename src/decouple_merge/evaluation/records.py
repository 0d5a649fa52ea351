"""A record of metrics.jsonl: a number with all that it depends on."""

from datetime import UTC, datetime
from typing import Any

from ..data.decoding import VERSION
from ..storage.provenance import git_commit

# What was measured on and compared with, then how images were drawn and what they were resized to.
DEPENDS_ON = ["extractor", "reference", "sampler", "num_steps", "timestep_spacing", "precision", "prompts", "resize"]
# Records that differ in one of these measure different things.
COMPARED_FIELDS = [*DEPENDS_ON, "decoding", "num_images"]


def make_record(
    model: str, metric: str, value: float, num_images: int, seeds: range | None, depends_on: dict[str, str | int | None]
) -> dict[str, Any]:
    """Make a record of metrics.jsonl, with the version of decoding, the commit and the time of now.

    Args:
        seeds: of the images, where a model drew them.
        depends_on: values of ``DEPENDS_ON``, where they are known.
    """
    assert depends_on.keys() <= set(DEPENDS_ON)
    return {
        "model": model,
        "metric": metric,
        "value": value,
        "num_images": num_images,
        "seeds": None if seeds is None else [seeds.start, seeds.stop - 1],
        **dict.fromkeys(DEPENDS_ON),
        **depends_on,
        "decoding": VERSION,
        "git": git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
