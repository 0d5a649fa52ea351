"""The one adapter to Accelerate: processes, precision, trackers."""

from contextlib import AbstractContextManager
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from ..config import Training


def is_main_process() -> bool:
    """Say whether this is the process that writes; under ``torchrun`` or ``accelerate launch`` there are several."""
    return PartialState().is_main_process


def main_process_first() -> AbstractContextManager[None]:
    """Let the main process through first, and the others when it is done."""
    return PartialState().main_process_first()


def start_accelerator(name: str, settings: Training, folder: Path) -> Accelerator:
    """Make what a training runs on: its device, its processes, its precision, and its tracker.

    Args:
        name: of the training, for the tracker.
        folder: that the tracker writes to.
    """
    # Accelerate's precision is the process's; an earlier training may have had another.
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        mixed_precision="no" if settings.mixed_precision == "fp32" else settings.mixed_precision,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=folder,
    )
    if settings.tracker != "none":
        accelerator.init_trackers(name)
    return accelerator
