"""Show a run's events: a live view on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..analysis.cost import duration
from ..analysis.subject import Progress as Share
from ..experiment.results import Row
from ..searching.trial import Trial
from ..training.records import StepRecord

# In a pipe or a log, an analysis says how far it is no more often.
SECONDS_BETWEEN_LINES = 10.0


class _Shares:
    """Say how far analyses are: a bar on a terminal, else a line now and then."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress, self.console = progress, console
        self.bars: dict[str, TaskID] = {}
        self.started: dict[str, tuple[float, int]] = {}
        self.said = time.monotonic()

    def show(self, share: Share) -> None:
        """Show one; the time left counts from the first, since what was done before this start took none."""
        now = time.monotonic()
        if share.name not in self.bars:
            self.bars[share.name] = self.progress.add_task(share.name, total=share.num_total, detail="")
            self.started[share.name] = now, share.num_done
        self.progress.update(self.bars[share.name], completed=share.num_done)
        started, first = self.started[share.name]
        if not self.console.is_terminal and now - self.said >= SECONDS_BETWEEN_LINES and share.num_done > first:
            self.said = now
            left = (now - started) / (share.num_done - first) * (share.num_total - share.num_done)
            self.console.print(f"{share.name} {share.num_done}/{share.num_total}: about {duration(left)} left")


def show(events: Iterable[Any], console: Console) -> list[Row]:
    """Print events as they come; returns the rows of the result table."""
    rows: list[Row] = []
    bars: dict[str, TaskID] = {}
    validations: dict[str, str] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        disable=not console.is_terminal,
    )
    shares = _Shares(progress, console)
    with progress:
        for event in events:
            if isinstance(event, Row):
                rows.append(event)
            elif isinstance(event, StepRecord):
                if event.name not in bars:
                    bars[event.name] = progress.add_task(event.name, total=event.num_updates, detail="")
                if event.validation is not None:
                    validations[event.name] = validation_line(event)
                line = training_line(event) + validations.get(event.name, "")
                progress.update(bars[event.name], completed=event.update, detail=line)
                if not console.is_terminal and event.validation is not None:
                    console.print(f"{event.name} {event.update}/{event.num_updates}: {line}")
            elif isinstance(event, Share):
                shares.show(event)
            elif isinstance(event, Trial):
                weights = ", ".join(f"{w:.3f}" for w in event.weights)
                value = f"lost: {event.failure}" if event.failure else f"{event.value:.4g}"
                console.print(f"{event.level} {event.number}: ({weights}) → {value}  {event.seconds:.0f} s")
            elif isinstance(event, dict):
                console.print(metrics_line(event))
            else:
                console.print(event)
    return rows


def training_line(record: StepRecord) -> str:
    """Say in one line how a training goes: losses, speed, time left."""
    consistency = f"  consistency {record.consistency_loss:.5f}" if record.consistency_loss else ""
    return (
        f"loss {record.loss:.4f}{consistency}  {record.images_per_second:.0f} images/s  "
        f"{record.seconds_left // 60:.0f}:{record.seconds_left % 60:02.0f} left"
    )


def validation_line(record: StepRecord) -> str:
    """Say the validation losses, the own range's first, and the distance of drawn images."""
    losses = list(record.validation or [])
    own = "" if record.own_range is None else f"own {losses.pop(record.own_range):.5f} others "
    distance = "" if record.distance is None else f"  distance {record.distance:.4g}"
    return f"  validation {own}" + " ".join(f"{v:.5f}" for v in losses) + distance


def metrics_line(record: dict[str, Any]) -> str:
    """Say a metrics record in one line."""
    seeds = f" on seeds {record['seeds'][0]} to {record['seeds'][1]}" if record["seeds"] else ""
    return f"{record['model']}: {record['metric']} {record['value']:.5g}, {record['num_images']} images{seeds}"
