"""The model card of a merged model."""

from typing import Any

TASK = "unconditional-image-generation"
EXAMPLE = 'pipeline(num_inference_steps=50).images[0].save("image.png")'
TRUNK = (
    "It keeps its channel-wise projections (placement: trunk) in `projections.safetensors`, which stock diffusers "
    "ignores: load it with decouple_merge.\n\n"
)


def model_card(record: dict[str, Any], task: str = TASK, example: str = EXAMPLE) -> str:
    """Write the README.md of a merged pipeline from its merge.json.

    Args:
        task: the hub's tag of what the pipeline does.
        example: Python that draws an image with ``pipeline``.
    """
    ranges = record.get("ranges") or [""] * len(record["weights"])
    rows = "".join(f"| {i} | {r} | {w:.4f} |\n" for i, (r, w) in enumerate(zip(ranges, record["weights"], strict=True)))
    found = record.get("search")
    chosen = (
        f"The weights were chosen by {found['strategy']} search for the smallest {found['metric']} on seeds "
        f"{found['seeds'][0]} to {found['seeds'][1]}. "
        if found
        else ""
    )
    blocks = "".join(
        f"Tensors that match `{pattern}` have the weights {', '.join(f'{w:.4f}' for w in weights)}.\n\n"
        for pattern, weights in record["settings"]["blocks"].items()
    )
    trunk = TRUNK if record.get("projection") == "trunk" else ""
    how = (
        "by task arithmetic, θ + Σ w_i (θ_i - θ)" if record["method"] == "linear" else f"by {record['method'].upper()}"
    )
    return f"""---
library_name: diffusers
tags: [{task}, decouple-then-merge]
---

# Merged from {len(record["weights"])} timestep experts

Made with decouple-merge {record["decouple_merge"]} by Decouple-then-Merge (CVPR 2025, arXiv 2410.06664): copies of
`{record["base"]["name"]}` (sha256 {record["base"]["sha256"][:16]}) were finetuned on one timestep range each and merged
{how}. It has the base's architecture and sampling cost.

| expert | timesteps | weight |
|---|---|---|
{rows}
{blocks}{chosen}`merge.json` has every hash.

{trunk}```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/of/this/folder")
{example}
```
"""
