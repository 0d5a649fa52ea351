"""The model card of a merged model."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

TASK = "unconditional-image-generation"
EXAMPLE = 'pipeline(num_inference_steps=50).images[0].save("image.png")'
LOAD = (
    'from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained("path/of/this/folder")\n'
)
TRUNK = (
    "It keeps its channel-wise projections (placement: trunk) in `projections.safetensors`, which stock diffusers "
    "ignores: load it with decouple_merge.\n\n"
)


@dataclass(frozen=True)
class Usage:
    """What a merged model is for.

    Attributes:
        task: the hub's tag of what the pipeline does; None where it is a network alone.
        example: Python that draws with ``pipeline``.
        load: Python that loads it.
    """

    task: str | None = TASK
    example: str = EXAMPLE
    load: str = LOAD


def model_card(record: dict[str, Any], usage: Usage | None = None, inherited: str = "") -> str:
    """Write the README.md of a merged model from its merge.json.

    Args:
        inherited: lines of the base's own card, on its licence and on what it was made from.
    """
    usage = usage or Usage()
    tags = ", ".join([*([usage.task] if usage.task else []), "decouple-then-merge"])
    code = f"```python\n{usage.load}{usage.example}".rstrip() + "\n```\n" if usage.load else ""
    return (
        f"""---
library_name: diffusers
{inherited}tags: [{tags}]
---

{_origin(record)}

{_table(record)}
{_blocks(record)}{_choice(record)}`merge.json` has every hash.

{TRUNK if record.get("projection") == "trunk" else ""}{code}""".rstrip()
        + "\n"
    )


def shown_name(name: str) -> str:
    """Say which model a record means: the hub's name, or the last part of a path, which is no one else's business."""
    return PurePosixPath(name).name if name.startswith((".", "/")) else name


def _origin(record: dict[str, Any]) -> str:
    num, base = len(record["weights"]), record["base"]
    has_ranges = bool(record.get("ranges")) and all(record["ranges"])
    what = ("timestep expert" if has_ranges else "model") + ("s" if num > 1 else "")
    how = (
        "by task arithmetic, θ + Σ w_i (θ_i - θ)" if record["method"] == "linear" else f"by {record['method'].upper()}"
    )
    name = f"`{shown_name(base['name'])}` (sha256 {base['sha256'][:16]})"
    made = f"Made with decouple-merge {record['decouple_merge']}"
    story = (
        f"{made} by Decouple-then-Merge (CVPR 2025, arXiv 2410.06664): copies of\n{name} were finetuned on one "
        f"timestep range each and merged\n{how}."
        if has_ranges
        else f"{made}: {num} {what} merged into\n{name}\n{how}."
    )
    return f"# Merged from {num} {what}\n\n{story} It has the base's architecture and sampling cost."


def _table(record: dict[str, Any]) -> str:
    ranges, weights = record.get("ranges"), record["weights"]
    if ranges and any(ranges):
        rows = [f"| {i} | {r or ''} | {w:.4f} |\n" for i, (r, w) in enumerate(zip(ranges, weights, strict=True))]
        return "| expert | timesteps | weight |\n|---|---|---|\n" + "".join(rows)
    names = map(shown_name, record["experts"])
    rows = [f"| {name} | {w:.4f} |\n" for name, w in zip(names, weights, strict=True)]
    return "| expert | weight |\n|---|---|\n" + "".join(rows)


def _blocks(record: dict[str, Any]) -> str:
    return "".join(
        f"Tensors that match `{pattern}` have the weights {', '.join(f'{w:.4f}' for w in weights)}.\n\n"
        for pattern, weights in record["settings"]["blocks"].items()
    )


def _choice(record: dict[str, Any]) -> str:
    found = record.get("search")
    if not found:
        return ""
    return (
        f"The weights were chosen by {found['strategy']} search for the smallest {found['metric']} on seeds "
        f"{found['seeds'][0]} to {found['seeds'][1]}. "
    )
