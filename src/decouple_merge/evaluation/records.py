"""A record of metrics.jsonl: a number with all that it depends on."""

import json
import re
from datetime import UTC, datetime
from typing import Any

from ..data.decoding import VERSION
from ..storage.provenance import git_commit

# What was measured on and compared with, then how images were drawn and what they were resized to.
DEPENDS_ON = ["extractor", "reference", "sampler", "num_steps", "timestep_spacing", "precision", "prompts", "resize"]
# Records that differ in one of these measure different things.
COMPARED_FIELDS = [*DEPENDS_ON, "decoding", "num_images"]


def make_record(
    model: str,
    metric: str,
    value: float,
    num_images: int,
    seeds: range | None,
    depends_on: dict[str, str | int | None],
    model_sha256: str | None = None,
) -> dict[str, Any]:
    """Make a record of metrics.jsonl, with the version of decoding, the commit and the time of now.

    Args:
        seeds: of the images, where a model drew them.
        depends_on: values of ``DEPENDS_ON``, where they are known.
        model_sha256: of what was scored: a model's, as ``models.identity`` counts it, or of images; None of batches.
    """
    return with_value(wanted_record(model, metric, num_images, seeds, depends_on, model_sha256), value)


def wanted_record(
    model: str,
    metric: str,
    num_images: int,
    seeds: range | None,
    depends_on: dict[str, str | int | None],
    model_sha256: str | None,
) -> dict[str, Any]:
    """Say all that a number depends on before it is known; arguments as of ``make_record``."""
    assert depends_on.keys() <= set(DEPENDS_ON)
    return {
        "model": model,
        "model_sha256": model_sha256,
        "metric": metric,
        "num_images": num_images,
        "seeds": None if seeds is None else [seeds.start, seeds.stop - 1],
        **dict.fromkeys(DEPENDS_ON),
        **depends_on,
        "decoding": VERSION,
    }


def with_value(wanted: dict[str, Any], value: float) -> dict[str, Any]:
    """Complete a record by the number, the commit, and the time of now."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {**wanted, "value": value, "git": git_commit(), "time": time}


def identity_of(record: dict[str, Any]) -> str:
    """Give all of a record but its value and what says when it was made: equal ones are the same number."""
    kept = {key: value for key, value in record.items() if key not in ("value", "git", "time")}
    return json.dumps(kept | {"reference": content_of(record.get("reference"))}, sort_keys=True)


def newest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pick the records that stand beside the last ones: of the models as they are now, and measured alike.

    What a file has of an older merged model, or of another reference, is left out.
    """
    models = {r["model"]: r.get("model_sha256") for r in records}
    measured = {r["metric"]: measured_by(r) for r in records}
    current = [
        r for r in records if r.get("model_sha256") == models[r["model"]] and measured_by(r) == measured[r["metric"]]
    ]
    return list({(r["model"], r["metric"], str(r.get("seeds"))): r for r in current}.values())


def measured_by(record: dict[str, Any]) -> dict[str, Any]:
    """Give what records of one metric must agree in to measure the same thing."""
    found = {field: record.get(field) for field in COMPARED_FIELDS}
    return found | {"reference": content_of(record.get("reference"))}


def content_of(reference: str | None) -> str | None:
    """Reduce a reference, NAME:HASH or NAME:HASH:COUNT, to what doesn't depend on where its files lie."""
    return reference and re.sub(r"^.*:(?=[0-9a-f]{16}(:\d+)?$)", "", reference)
