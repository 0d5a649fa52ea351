"""What a training is made from: the record that stands beside its weights from its start on."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..config import Data, Training
from ..data.batches import Examples
from ..data.split import split
from ..errors import UserError
from ..executors.distributed import world_size
from ..models.base import Base
from ..models.identity import base_parts
from ..storage.made_from import MadeFrom, differences, plain, told
from ..storage.reading import file_sha256, read_record
from .trainer import Task

RECORD = "expert.json"
AGAIN = "remove the folder to train again"
# Settings that change no weights, and those that ``own`` and ``ranges`` of the task say.
SILENT = {"tracker", "checkpoint_every", "baseline", "num_ranges", "ranges", "num_ranks", "sharding"}
# Where the images come from and how they are read; their hash says what they are.
PLACES = {"source", "path", "split", "column", "caption_column", "fit", "skip_damaged", "num_workers"}


def training_record(base: Base, images: Examples, data: Data, task: Task, settings: Training, seed: int) -> MadeFrom:
    """Say what a training is made from: base, data, settings, seed, and how many processes it is."""
    return plain(
        {
            "base_sha256": base.sha256,
            "base": base_parts(base),
            "data": data_parts(images, data),
            "seed": seed,
            **asdict(task),
            # By the scheduler that the base has now.
            "step_shares": [base.process.step_share(each) for each in task.ranges],
            "training": settings_parts(settings),
            "num_processes": num_ranks(settings),
        }
    )


def num_ranks(settings: Training) -> int:
    """Count the processes of a training: torchrun's, or as many as the settings say."""
    return max(world_size(), settings.num_ranks)


def settings_parts(settings: Training) -> MadeFrom:
    """Say what of a training's settings its weights depend on; a map of similarities by its hash, wherever it lies."""
    found = settings.model_dump(mode="json", exclude=SILENT)
    if settings.balancing is not None and settings.balancing.similarity is not None:
        found["balancing"]["similarity"] = file_sha256(settings.balancing.similarity)
    return found


def images_of_update(settings: Training) -> int:
    """Count the images that an update sees, those of all processes together."""
    return settings.batch_size * settings.accumulation * num_ranks(settings)


def data_parts(images: Examples, data: Data) -> MadeFrom:
    """Say what is trained on: the hash of the examples and of which are held out, and how they are fed."""
    held_out = hashlib.sha256(repr(list(split(images, data).held_out)).encode()).hexdigest()
    return {"sha256": images.sha256, "held_out_sha256": held_out, **data.model_dump(mode="json", exclude=PLACES)}


def is_finished(folder: Path) -> bool:
    """Say whether the training of a folder has ended."""
    return (folder / "model.safetensors").exists()


def changes_of(folder: Path, now: MadeFrom, unknown: Iterable[str] = ()) -> list[str]:
    """Name what differs between what a training was begun with and a record of now; nothing where none was begun.

    A finished one may have been that of any number of processes.

    Args:
        unknown: entries that aren't known now.

    Raises:
        UserError: its record is missing or can't be read.
    """
    if not (folder / RECORD).exists() and not is_finished(folder):
        return []
    found = {k: v for k, v in read_record(folder / RECORD, AGAIN).items() if k not in unknown}
    if is_finished(folder):
        now = now | {"num_processes": found.get("num_processes")}
    return differences(found, now)


def check_unchanged(folder: Path, now: MadeFrom) -> None:
    """Require that a training that was begun goes on with what it was begun with.

    Raises:
        UserError: it doesn't; what differs is named.
    """
    if found := changes_of(folder, now):
        raise UserError(f"{folder} was made from something else: {told(found)}; put that back, or {AGAIN}")
