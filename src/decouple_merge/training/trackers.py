"""Where the curves of a training are shown: TensorBoard's files, or a service with wandb's interface."""

from importlib import import_module
from pathlib import Path
from typing import Any

from ..config import Training


class NoTracker:
    """Shows nothing."""

    def log(self, values: dict[str, float], update: int) -> None:
        """Drop the numbers after an update."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """Files that ``tensorboard --logdir`` shows."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder))

    def log(self, values: dict[str, float], update: int) -> None:
        """Write the numbers after an update."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, update)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class Service:
    """A library with wandb's ``init``, ``log`` and ``finish``.

    Args:
        library: its name.
        name: of the training.
    """

    def __init__(self, library: str, name: str) -> None:
        self.library: Any = import_module(library)
        self.library.init(project="decouple-merge", name=name)

    def log(self, values: dict[str, float], update: int) -> None:
        """Send the numbers after an update."""
        self.library.log(values, step=update)

    def close(self) -> None:
        """Wait until all is sent."""
        self.library.finish()


Tracker = NoTracker | TensorBoard | Service


def open_tracker(settings: Training, name: str, folder: Path) -> Tracker:
    """Open the tracker that the settings name.

    Args:
        name: of the training.
        folder: for a tracker of files.
    """
    if settings.tracker == "none":
        return NoTracker()
    return TensorBoard(folder) if settings.tracker == "tensorboard" else Service(settings.tracker, name)
