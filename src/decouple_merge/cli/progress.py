"""Show a run's events: one live table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..analysis.duration import duration
from ..analysis.subject import Progress as Share
from ..experiment.results import Row
from ..reporting.job import Job
from ..reporting.status import read_job
from ..searching.trial import Trial
from ..storage.run_folder import Run
from ..training.records import StepRecord
from .live import left_line, tables

# In a pipe or a log, an analysis says how far it is no more often.
SECONDS_BETWEEN_LINES = 10.0


class _Shares:
    """Say how far analyses are: a bar on a terminal, else a line now and then."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.console = console
        self.bars: dict[str, TaskID] = {}
        self.started: dict[str, tuple[float, int]] = {}
        self.said = time.monotonic()

    def show(self, share: Share) -> None:
        """Show one; the time left counts from the first, since what was done before this start took none."""
        now = time.monotonic()
        if share.name not in self.bars:
            self.bars[share.name] = self.progress.add_task(share.name, total=share.num_total)
            self.started[share.name] = now, share.num_done
        self.progress.update(self.bars[share.name], completed=share.num_done)
        started, first = self.started[share.name]
        if not self.console.is_terminal and now - self.said >= SECONDS_BETWEEN_LINES and share.num_done > first:
            self.said = now
            left = (now - started) / (share.num_done - first) * (share.num_total - share.num_done)
            self.console.print(f"{share.name} {share.num_done}/{share.num_total}: about {duration(left)} left")


class _View:
    """What is shown of a run: its tables on a terminal, else lines.

    Args:
        folder: of the run; without one, trainings are shown as they come, and no job that they are of.
    """

    def __init__(self, console: Console, folder: Path | None) -> None:
        self.console, self.folder = console, folder
        self.shares = _Shares(console)
        self.job = Job({})
        # The terminal is drawn by a thread of its own.
        self.lock = Lock()

    def draw(self) -> Group:
        """Lay out what is known by now."""
        with self.lock:
            return Group(tables(self.job, self.console, of_now=True), self.shares.progress.get_renderable())

    def add(self, event: Any) -> None:
        """Take in an event, and print what it says in a line."""
        if isinstance(event, Share):
            self.shares.show(event)
        elif isinstance(event, StepRecord | Trial | dict):
            with self.lock:
                self._take_in(event)
            self._say(event)
        else:
            self.console.print(event)

    def _take_in(self, event: StepRecord | Trial | dict[str, Any]) -> None:
        # Now that there is work, its plan is in the folder.
        if self.folder is not None:
            self.job, self.folder = read_job(Run(self.folder)), None
        if isinstance(event, StepRecord):
            self.job.add_step(asdict(event))
        elif isinstance(event, Trial):
            self.job.add_trial(asdict(event))
        elif self.job.work:
            self.job.is_search_done = True
            self.job.add_number(event)

    def _say(self, event: StepRecord | Trial | dict[str, Any]) -> None:
        if isinstance(event, StepRecord):
            # On a terminal the tables say it, but of trainings that are of no one run.
            if event.validation is not None and not (self.console.is_terminal and self.job.work):
                line = f"{event.name} {event.update}/{event.num_updates}: {training_line(event)}"
                self.console.print(line + self._whole() + validation_line(event))
        elif isinstance(event, Trial):
            weights = ", ".join(f"{w:.3f}" for w in event.weights)
            value = f"lost: {event.failure}" if event.failure else f"{event.value:.4g}"
            whole = "" if self.console.is_terminal else self._whole()
            self.console.print(f"{event.level} {event.number}: ({weights}) → {value}  {event.seconds:.0f} s{whole}")
        else:
            self.console.print(metrics_line(event))

    def _whole(self) -> str:
        """Say the time left of the whole job, where it is known."""
        seconds = self.job.seconds_left() if self.job.work else None
        return f"  whole job {left_line(seconds)}" if seconds else ""


def show(events: Iterable[Any], console: Console, folder: Path | None = None) -> list[Row]:
    """Print events as they come; returns the rows of the result table.

    Args:
        folder: of the run that they are of.
    """
    rows: list[Row] = []
    view = _View(console, folder)
    live = Live(console=console, get_renderable=view.draw, refresh_per_second=2)
    if console.is_terminal:
        live.start()
    try:
        for event in events:
            if isinstance(event, Row):
                rows.append(event)
            else:
                view.add(event)
    finally:
        live.stop()
    return rows


def training_line(record: StepRecord) -> str:
    """Say in one line how a training goes: losses, speed, time left."""
    consistency = f"  consistency {record.consistency_loss:.5f}" if record.consistency_loss else ""
    minutes, seconds = divmod(round(record.seconds_left), 60)
    return f"loss {record.loss:.4f}{consistency}  {record.images_per_second:.0f} images/s  {minutes}:{seconds:02} left"


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
