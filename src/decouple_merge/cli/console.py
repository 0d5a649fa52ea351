"""What the verbs print: events as they come, tables at the end."""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..experiment.results import Row

# Of the processes that torchrun starts, the first, rank 0, is the one that prints.
NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0")) if NUM_PROCESSES > 1 else 0
# Without a terminal a console is 80 columns wide, too few for the result table.
WIDTH = None if sys.stdout is not None and sys.stdout.isatty() else 110
# Brackets are those of paths and patterns, not of markup.
console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True, width=WIDTH, quiet=RANK > 0)

# In a pipe or a log, a merge says how far it is no more often.
SECONDS_BETWEEN_LINES = 5.0


def show(events: Iterable[Any], folder: Path | None = None) -> None:
    """Print events as they come, and the rows of the result table together at the end.

    Args:
        folder: of the run that they are of; then the time left is told of the whole job.
    """
    from .progress import show as show_live

    rows = show_live(events, console, folder)
    if rows:
        console.print(result_table(rows))


def show_bytes(events: Iterable[Any]) -> None:
    """Print lines as they come, and the bytes written so far: a bar on a terminal, else a line now and then."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar, said = progress.add_task("merge", total=None), time.monotonic()
        for event in events:
            if isinstance(event, str):
                console.print(event)
            else:
                progress.update(bar, completed=event.num_done, total=event.num_bytes)
                if not console.is_terminal and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    share = event.num_done / event.num_bytes
                    console.print(f"{event.num_done / 1e9:.3f} of {event.num_bytes / 1e9:.3f} GB written, {share:.0%}")


def result_table(rows: "list[Row]") -> Table:
    """Lay out the result table, with each mean's ratio to the pretrained model's."""
    from ..evaluation.metrics import METRICS

    only_distances = all(METRICS[r.metric].is_distance for r in rows)
    title = "distance to the reference (smaller is better)" if only_distances else "results"
    table = Table(title=title, min_width=100)
    for column in ("model", "parameters", "metric", "mean", "spread over seed sets", "/ pretrained"):
        table.add_column(column, justify="left" if column in ("model", "metric") else "right", no_wrap=True)
    first = {r.metric: r.mean for r in rows if r.model == "pretrained"}
    for row in rows:
        # A kernel distance may be below 0, and has no ratio.
        ratio = f"{row.mean / first[row.metric]:.3f}" if min(row.mean, first.get(row.metric, 0)) > 0 else ""
        table.add_row(row.model, f"{row.num_parameters:,}", row.metric, f"{row.mean:.4g}", f"{row.spread:.2g}", ratio)
    return table
