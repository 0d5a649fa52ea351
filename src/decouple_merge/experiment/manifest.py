"""Whose a run folder is: its config, and the manifest of what it was made with and from."""

import platform
from collections.abc import Sequence
from contextlib import ExitStack
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
from ..storage.made_from import changes, differences, told
from ..storage.outputs import RUN, check_output
from ..storage.provenance import git_commit
from ..storage.reading import AGAIN, read_record
from ..storage.run_folder import LOCKS, Run

# The folder of what ``deme pretrain`` trains.
PRETRAINING = "training"


def check_owner(run: Run, config: Config, inputs: Sequence[str]) -> None:
    """Require that a run folder can be made, apart from what is read, or is one.

    Raises:
        UserError: as said.
    """
    check_output(run.folder, RUN, inputs)
    if not run.config.exists():
        if run.folder.exists() and any(
            p for p in run.folder.iterdir() if not p.name.startswith(".") and p.name != LOCKS
        ):
            raise UserError(f"{run.folder} is not empty and not a run folder (no config.yaml); give another --out")
    elif (run.folder / PRETRAINING).exists():
        check_same_config(run, config)


def check_same_config(run: Run, config: Config) -> None:
    """Require that a folder is of one config, if of any: what ``deme pretrain`` makes belongs to it as a whole.

    Raises:
        UserError: it is of another; the keys that differ are named.
    """
    if differing := _differing_keys(run, config):
        raise UserError(
            f"{run.folder} belongs to another config, which differs in {', '.join(differing)}; "
            "give another --out, or remove the folder"
        )


def _differing_keys(run: Run, config: Config) -> list[str]:
    if not run.config.exists():
        return []
    old = load_config(run.config).model_dump(mode="json")
    return sorted(key for key, _, _ in changes(old, config.model_dump(mode="json")))


def check_claimed(run: Run, config: Config) -> None:
    """Require that the folder that a process works on from now on has its config.

    Raises:
        UserError: another start has changed it, since this one looked.
    """
    if differing := _differing_keys(run, config):
        raise UserError(f"{run.folder}: another start has changed {', '.join(differing)} meanwhile; start again")


def check_same_origin(run: Run, record: dict[str, Any]) -> None:
    """Require that what a folder is made from, as a whole, is what it was made from.

    Args:
        record: its manifest of now.

    Raises:
        UserError: it isn't.
    """
    if run.manifest.exists():
        old = read_record(run.manifest, AGAIN, base=dict, data=dict)
        found = differences(*({key: each[key].get("sha256") for key in ("base", "data")} for each in (old, record)))
        if found:
            raise UserError(f"{run.folder} was made from something else: {told(found)}; put that back, or remove it")


def claim(run: Run, config: Config, record: dict[str, Any], wait: bool = False) -> None:
    """Make the run folder, with config and manifest, or give a run's folder those of now.

    What a killed process left in the folder is removed.

    Args:
        wait: where the config changes, until no other process works on the folder, instead of refusing.

    Raises:
        UserError: another process works on the folder by another config.
    """
    for folder in {place.parent for place in run.folder.rglob(LEFTOVERS)}:
        remove_leftovers(folder)
    with hold(run.lock("claim"), "another start", wait=True), ExitStack() as held:
        differing = _differing_keys(run, config)
        if differing:
            held.enter_context(hold(run.lock("run"), f"a start that changes {', '.join(differing)}", wait))
        if differing or not run.config.exists():
            write_text(run.config, dump_config(config))
        old = read_record(run.manifest, AGAIN) if run.manifest.exists() else {}
        if any(old.get(key) != record[key] for key in ("base", "data", "seeds")):
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
