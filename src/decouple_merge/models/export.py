"""Pipelines written to folders: a base's with other weights, or one that was made here."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..merging.arithmetic import cast
from ..merging.joining import leave_out
from ..storage.files import atomic_path, copy_folder
from ..storage.layouts import PROJECTIONS_FILE
from ..storage.outputs import hashes_of_files
from .base import Base
from .network import blank_network


def save_pipeline(base: Base, folder: Path, name: str | None = None, record: dict[str, Any] | None = None) -> None:
    """Write a base that was made here, with all of its parts.

    Args:
        name: of a record of how it was made, which also lists the hashes of the files.
    """
    with atomic_path(folder) as temporary:
        base.pipeline.save_pretrained(temporary)
        if name is not None:
            listed = {**(record or {}), "files": hashes_of_files(temporary)}
            (temporary / name).write_text(json.dumps(listed, indent=2) + "\n")


def export_pipeline(
    base: Base, weights: dict[str, Tensor], folder: Path, card: str | None, record: dict[str, Any] | None
) -> None:
    """Write the base's pipeline with other weights, and where given a model card and merge.json.

    The folder appears whole or not at all. A latent pipeline's other parts are copied as they are. Trunk
    projections among the weights go to ``projections.safetensors`` beside the network, which stock diffusers doesn't
    read.
    """
    stock = base.network.state_dict()
    extra = {k: v for k, v in weights.items() if k not in stock}
    # Weights in the base's dtype are written from where they are.
    network: Any = blank_network(base, base.dtype, "cpu", without_memory=True)
    network.load_state_dict(cast({k: weights[k] for k in stock}, base.dtype), assign=True)
    networks = base.family.parted(network)
    for each in networks.values():
        # Where it was loaded from says nothing of what it is now.
        each.register_to_config(_name_or_path="")
    with atomic_path(folder) as temporary:
        if base.family.is_latent and base.encoders is not None:
            _copy_encoders(base.encoders.folder, temporary, networks)
            for name, each in networks.items():
                each.save_pretrained(temporary / name)
        else:
            type(base.pipeline)(**{**base.pipeline.components, **networks}).save_pretrained(temporary)
        leave_out(temporary, [name for name in base.family.components if name not in networks])
        if extra:
            save_file(extra, temporary / PROJECTIONS_FILE)
        if record is not None:
            (temporary / "merge.json").write_text(json.dumps(record, indent=2) + "\n")
        if card is not None:
            (temporary / "README.md").write_text(card)


def _copy_encoders(pipeline: Path, folder: Path, networks: Iterable[str]) -> None:
    # Loaded and saved again, parts in half precision would come out twice as large.
    own = {*networks, PROJECTIONS_FILE}
    copy_folder(pipeline, folder, lambda at, names: own & set(names) if Path(at) == pipeline else set())
