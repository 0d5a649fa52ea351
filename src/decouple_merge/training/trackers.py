"""Where the curves of a training are shown: by the names of the libraries that show them."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..config import Training

# Of the trainings in a service; a training is a run of it.
PROJECT = "decouple-merge"


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
        self.library.init(project=PROJECT, name=name)

    def log(self, values: dict[str, float], update: int) -> None:
        """Send the numbers after an update."""
        self.library.log(values, step=update)

    def close(self) -> None:
        """Wait until all is sent."""
        self.library.finish()


class MLflow:
    """MLflow, which writes where ``MLFLOW_TRACKING_URI`` says, or into the working folder.

    Args:
        name: of the training.
    """

    def __init__(self, name: str) -> None:
        self.library: Any = import_module("mlflow")
        self.library.set_experiment(PROJECT)
        self.library.start_run(run_name=name)

    def log(self, values: dict[str, float], update: int) -> None:
        """Write the numbers after an update."""
        self.library.log_metrics(values, step=update)

    def close(self) -> None:
        """End the run."""
        self.library.end_run()


Tracker = NoTracker | TensorBoard | Service | MLflow
# By name: made of the name of the training and a folder for files.
TRACKERS: dict[str, Callable[[str, Path], Tracker]] = {
    "none": lambda name, folder: NoTracker(),
    "tensorboard": lambda name, folder: TensorBoard(folder),
    "wandb": lambda name, folder: Service("wandb", name),
    "trackio": lambda name, folder: Service("trackio", name),
    "mlflow": lambda name, folder: MLflow(name),
}


def open_tracker(settings: Training, name: str, folder: Path) -> Tracker:
    """Open the tracker that the settings name.

    Args:
        name: of the training.
        folder: for a tracker of files.
    """
    return TRACKERS[settings.tracker](name, folder)
