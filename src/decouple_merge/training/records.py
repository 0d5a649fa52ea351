"""What a training says while it runs: records of steps, and of validations a log and a tracker."""

import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..executors.devices import device_name, peak_bytes
from ..storage.files import read_records, write_records
from .schedule import learning_rate_at
from .trackers import open_tracker
from .trainer import Trainer


@dataclass(frozen=True)
class StepRecord:
    """Progress of a training.

    Attributes:
        loss, consistency_loss: means over the updates since the last validation.
        own_range: the index of the range that is trained, where it is one of the task's ranges.
        validation: losses of the averaged weights on each range, where they were just taken.
        distance: of images drawn with the averaged weights, where it was just taken.
        device, memory_bytes: where it runs, and the most that its process has held there.
    """

    name: str
    update: int
    num_updates: int
    loss: float
    consistency_loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float
    own_range: int | None = None
    validation: list[float] | None = None
    distance: float | None = None
    device: str = ""
    memory_bytes: int = 0


def step_record(trainer: Trainer, seconds_per_update: float) -> StepRecord:
    """Say how far a training is.

    Raises:
        UserError: the loss is no longer finite.
    """
    settings, task = trainer.settings, trainer.task
    loss, consistency_loss = trainer.mean_losses()
    if not math.isfinite(loss):
        raise UserError(
            f"{task.name}: the loss is {loss} at update {trainer.num_done}; lower the learning rate "
            f"({settings.learning_rate:g}) or raise the precision ({settings.mixed_precision})"
        )
    num_images = settings.batch_size * settings.accumulation * trainer.world
    return StepRecord(
        name=task.name,
        update=trainer.num_done,
        num_updates=settings.num_updates,
        loss=loss,
        consistency_loss=consistency_loss,
        learning_rate=learning_rate_at(trainer.num_done - 1, settings),
        images_per_second=num_images / seconds_per_update,
        seconds_left=(settings.num_updates - trainer.num_done) * seconds_per_update,
        own_range=task.ranges.index(task.own) if task.own in task.ranges else None,
        device=device_name(trainer.device),
        memory_bytes=peak_bytes(trainer.device),
    )


class Log:
    """The validations of a training, in a JSON-lines file and the tracker.

    Of a training that goes on from a saved state, what was logged after it is dropped.
    """

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.folder, self.path, self.trainer = folder, folder / "log.jsonl", trainer
        self.tracker = open_tracker(trainer.settings, trainer.task.name, folder / "tracker")
        self.records = [r for r in read_records(self.path, update=int) if r["update"] <= trainer.num_done]

    def write(self, record: StepRecord) -> None:
        """Add a validation's record."""
        assert record.validation is not None
        losses = {"loss": record.loss, "consistency_loss": record.consistency_loss}
        distance = {} if record.distance is None else {"distance": record.distance}
        self.records.append({"update": record.update, **losses, "validation": record.validation, **distance})
        write_records(self.path, self.records)
        by_range = zip(self.trainer.task.ranges, record.validation, strict=True)
        validation = {f"validation_loss/{r.low:g}-{r.high:g}": v for r, v in by_range}
        self.tracker.log(losses | validation | distance, record.update)

    def close(self) -> None:
        """Close the tracker."""
        self.tracker.close()
