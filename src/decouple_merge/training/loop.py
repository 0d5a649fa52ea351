"""The loop of a training: updates, validations, checkpoints, and at last the model."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config import Data, Training
from ..data.batches import Batch, Examples, held_out_images, training_batches
from ..executors.distributed import check_shared, is_first
from ..models.base import Base
from ..models.lora import FILE
from ..seeds import stream_seed
from ..storage.files import write_json, write_tensors
from ..storage.run_folder import kept_weights
from .distillation import Distillation
from .made_from import RECORD, check_unchanged, is_finished, training_record
from .records import Log, StepRecord, step_record
from .state import remove_older, saved_state, state_path
from .trainer import Task, Trainer

# A record is yielded at most this often, so that a live view costs nothing.
SECONDS_BETWEEN_RECORDS = 1.0

Distance = Callable[[dict[str, Tensor]], float]


def train(
    base: Base,
    images: Examples,
    data: Data,
    task: Task,
    settings: Training,
    seed: int,
    folder: Path,
    distance: Distance | None = None,
    distillation: Distillation | None = None,
) -> Iterator[StepRecord]:
    """Train a copy of the base on one task; yields progress, leaves the folded EMA weights in ``folder``.

    Update s depends only on (seed, task.name, s) and the number of processes: a run that was killed goes on bitwise as
    if it had not been. The first process alone writes and yields. Records go to ``folder/log.jsonl``, the state to
    ``folder/state/`` until the training is finished, averaged weights that are kept to ``folder/checkpoints/``;
    ``folder/expert.json`` says from the start what it is made from. The result is ``folder/model.safetensors`` (EMA
    weights, stock keys); of an adapter also its factors, ``folder/lora/``, which diffusers loads.

    Args:
        distance: scores the averaged weights, given under the base's keys, every ``settings.distance.every`` updates.
            It must leave them as they are; then the training is bitwise the same with it and without.
        distillation: what to begin with and to be pulled to, instead of the base and the data.

    Raises:
        UserError: the training was begun with something else, the loss is no longer finite, a saved state is damaged,
            or the processes don't share the folder.
    """
    record = training_record(base, images, data, task, settings, seed)
    record |= distillation.made_from if distillation else {}
    check_unchanged(folder, record)
    if not is_finished(folder):
        trainer = Trainer(base, task, settings, seed, distillation)
        state = folder / "state"
        if (found := saved_state(state, trainer.part)) is not None:
            trainer.load(found)
        check_shared(folder, f"{task.name} after {trainer.num_done} updates")
        if is_first():
            write_json(folder / RECORD, record)
        batches = _batches(trainer, images, data)
        if not is_first():
            _follow(trainer, batches, held_out_images(images, data), state)
            return
        with closing(Log(folder, trainer)) as log:
            yield from _steps(trainer, batches, held_out_images(images, data), distance, log, state)
        _write_result(trainer, folder)
    if is_first():
        shutil.rmtree(folder / "state", ignore_errors=True)


def _batches(trainer: Trainer, images: Examples, data: Data) -> Iterator[Batch]:
    settings = trainer.settings
    return training_batches(
        images,
        data,
        settings.batch_size,
        stream_seed(trainer.seed, trainer.task.name),
        trainer.num_done * settings.accumulation,
        settings.num_updates * settings.accumulation,
        trainer.rank,
        trainer.world,
    )


def _steps(
    trainer: Trainer, batches: Iterator[Batch], held_out: Batch, distance: Distance | None, log: Log, state: Path
) -> Iterator[StepRecord]:
    settings = trainer.settings
    shown = started = time.monotonic()
    first = trainer.num_done
    while trainer.num_done < settings.num_updates:
        trainer.update(batches)
        does = _Due(settings, trainer.num_done)
        if does.validate or time.monotonic() - shown >= SECONDS_BETWEEN_RECORDS:
            shown = time.monotonic()
            record = step_record(trainer, (shown - started) / (trainer.num_done - first))
            if does.validate:
                record = replace(record, validation=trainer.validate(held_out))
                if distance and does.score:
                    record = replace(record, distance=distance(trainer.weights()))
                log.write(record)
                trainer.forget_losses()
                first, started = trainer.num_done, time.monotonic()
            yield record
        # Before the state: a training that goes on from it has kept all that came before.
        if does.keep:
            write_tensors(kept_weights(log.folder, trainer.num_done), trainer.weights())
        if does.save:
            _save(trainer, state)


def _follow(trainer: Trainer, batches: Iterator[Batch], held_out: Batch, state: Path) -> None:
    """Train as a process that isn't the first: it writes nothing, but takes part where a network is shared out."""
    while trainer.num_done < trainer.settings.num_updates:
        trainer.update(batches)
        does = _Due(trainer.settings, trainer.num_done)
        if not trainer.is_shared_out:
            continue
        if does.validate:
            trainer.validate(held_out)
        for _ in range(does.score + does.keep):
            trainer.weights()
        if does.save:
            _save(trainer, state)
    if trainer.is_shared_out:
        trainer.adapter()
        trainer.weights()


def _save(trainer: Trainer, folder: Path) -> None:
    """Write the state; of a network that is shared out every process its part, and the older ones go when all have."""
    trainer.save(state_path(folder, trainer.num_done, trainer.part))
    if trainer.is_shared_out:
        check_shared(folder, f"the state after {trainer.num_done} updates")
        if is_first():
            remove_older(folder, trainer.num_done)


class _Due:
    """What is due after an update, in all processes alike: a validation, a distance, weights to keep, a state."""

    def __init__(self, settings: Training, update: int) -> None:
        finished = update == settings.num_updates
        self.validate = update % settings.validate_every == 0 or finished
        self.score = settings.distance is not None and (update % settings.distance.every == 0 or finished)
        self.keep = settings.keep_every is not None and update % settings.keep_every == 0
        self.save = update % settings.checkpoint_every == 0 and not finished


def _write_result(trainer: Trainer, folder: Path) -> None:
    """Write an expert's adapter, where it is one, and at last its weights: with them the training is finished."""
    if adapter := trainer.adapter():
        write_tensors(folder / "lora" / FILE, adapter)
    write_tensors(folder / "model.safetensors", trainer.weights())
