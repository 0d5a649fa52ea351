"""What a model's files hold, for ``deme info``: from headers and bytes, without torch, in a part of its import time."""

import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..storage.headers import read_headers, side_by_side
from ..storage.layouts import files_of_parts
from ..storage.reading import looked_for, parse_json, read_text
from ..storage.shipped import base_names, find_model
from .adapter_keys import is_adapter

ADVICE = "remove the record, or merge again"


def describe_model(name: Path) -> Iterator[str]:
    """Say what a model's files hold, and how it was merged if it was.

    Raises:
        UserError: there is no such path and no base of that name that we ship, or it holds no whole weights.
    """
    model = find_model(str(name))
    if model is None:
        raise UserError(
            f"{name} doesn't exist{looked_for(name)}; check the path, or take a base we ship: {', '.join(base_names())}"
        )
    headers = side_by_side({part: read_headers(files) for part, files in files_of_parts(model).items()})
    kind = "LoRA" if is_adapter(headers.places) else "weights"
    yield f"{model}: {kind}, {len(headers.places):,} tensors, {headers.num_bytes:,} bytes"
    yield "elements: " + ", ".join(f"{num:,} {dtype}" for dtype, num in sorted(headers.num_elements.items()))
    yield f"sha256 of the tensors: {headers.sha256()}"
    recipe = model / "merge.json"
    text = read_text(recipe, ADVICE) if recipe.is_file() else headers.metadata.get("merge")
    if text is None:
        yield "no record of a merge"
    else:
        yield json.dumps(parse_json(text, model, ADVICE), indent=2)
