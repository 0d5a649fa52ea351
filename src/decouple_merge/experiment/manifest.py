"""Whose a run folder is: its config, and the manifest of what it was made with and from."""

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch

from .. import __version__
from ..config import Config, dump_config, load_config
from ..data.batches import Examples
from ..errors import UserError
from ..executors.devices import default_device
from ..models.base import Base
from ..storage.files import LEFTOVERS, remove_leftovers, write_json, write_text
from ..storage.locks import hold
from ..storage.outputs import RUN, check_output
from ..storage.provenance import git_commit
from ..storage.run_folder import LOCKS, Run


def check_owner(run: Run, config: Config, inputs: Sequence[str]) -> None:
    """Require that a run folder can be made, apart from what is read, or holds the same config.

    Raises:
        UserError: as said.
    """
    check_output(run.folder, RUN, inputs)
    _check_config(run, config)


def _check_config(run: Run, config: Config) -> None:
    if run.config.exists():
        old = load_config(run.config).model_dump(mode="json")
        differing = sorted(_differing_keys(old, config.model_dump(mode="json")))
        if differing:
            raise UserError(
                f"{run.folder} belongs to another config, which differs in {', '.join(differing)}; "
                "give another --out, or remove the folder"
            )
    elif run.folder.exists() and any(p for p in run.folder.iterdir() if not p.name.startswith(".") and p.name != LOCKS):
        raise UserError(f"{run.folder} is not empty and not a run folder (no config.yaml); give another --out")


def claim(run: Run, config: Config, record: dict[str, Any]) -> None:
    """Make the run folder, with config and manifest; an older run of the same config keeps its own.

    What a killed process left in the folder is removed.

    Raises:
        UserError: another process has made it meanwhile, of another config.
    """
    for folder in {place.parent for place in run.folder.rglob(LEFTOVERS)}:
        remove_leftovers(folder)
    with hold(run.lock("claim"), "another start", wait=True):
        _check_config(run, config)
        if not run.config.exists():
            write_text(run.config, dump_config(config))
        if not run.manifest.exists():
            write_json(run.manifest, record)


def manifest(config: Config, base: Base, images: Examples) -> dict[str, Any]:
    return {
        "versions": {
            "decouple_merge": __version__,
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "python": platform.python_version(),
        },
        "git": git_commit(),
        "device": str(default_device()),
        "base": {"name": config.base, "sha256": base.sha256},
        "data": {"source": config.data.source, "num_images": len(images), "sha256": images.sha256},
        "seeds": {
            "training": config.seed,
            "search": [config.search.first_seed, config.all_search_seeds.stop - 1],
            "report": [config.report_seeds.start, config.report_seeds.stop - 1],
        },
    }


def _differing_keys(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differing_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix
