"""A run as tables: what of it is done and left, its trainings, its search, its numbers."""

from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..analysis.duration import duration
from ..reporting.job import Job, Stage, Training

# Of the trainings that a study has, the newest are shown.
MAX_TRAININGS = 12
SPACE = 4
# Of a column of losses, with the space before it.
LOSS_WIDTH = 10


def tables(job: Job, console: Console, of_now: bool = False) -> Group:
    """Lay out what is known of a run, for a terminal of some width.

    Args:
        of_now: leave out the trainings once they are finished.
    """
    return Group(*_tables(job, console, of_now))


def _tables(job: Job, console: Console, of_now: bool) -> Iterator[RenderableType]:
    # Of a study the trainings alone are told, which are not its whole job.
    if job.work and (stages := job.stages()):
        yield _stages(job, stages)
    shown = [t for t in job.trainings.values() if t.last][-MAX_TRAININGS:]
    is_past = of_now and any(level.trials for level in job.levels.values())
    if shown and not is_past:
        validated = [t for t in shown if len(t.validation) == len(job.ranges) > 0]
        yield from _beside(console, _trainings(shown), _losses(job, validated, console.width) if validated else None)
    yield from _beside(console, _search(job), _numbers(job))


def run_table(runs: dict[str, tuple[str, Job] | None]) -> Table:
    """Lay out how far each run of a study is.

    Args:
        runs: by name, in a word what they do, and what is known of them; None of one that isn't begun.
    """
    table = _table("run", "state", "updates", "candidates", "sets of images", "left")
    for name, told in runs.items():
        if told is None:
            table.add_row(name, "not begun")
            continue
        state, job = told
        done = {stage.name: f"{stage.num_done:,}/{stage.num_total:,}" for stage in job.stages()}
        cells = [done.get(stage, "") for stage in ("finetune", "search", "evaluate")]
        table.add_row(name, state, *cells, left_line(job.seconds_left()).removeprefix("about "))
    return table


def _beside(console: Console, left: Table | None, right: Table | None) -> Iterator[Table]:
    """Put two tables side by side where they fit, else one below the other; one that is empty is left out."""
    both = [table for table in (left, right) if table]
    if (
        len(both) == 2
        and sum(Measurement.get(console, console.options, t).maximum for t in both) + SPACE <= console.width
    ):
        grid = Table.grid(padding=(0, SPACE))
        grid.add_row(*both)
        yield grid
    else:
        yield from both


def left_line(seconds: float | None) -> str:
    """Say how long something takes still, about."""
    if seconds is None:
        return "not known yet"
    return f"about {duration(seconds)}" if seconds else "done"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _stages(job: Job, stages: list[Stage]) -> Table:
    table = _table("stage", "", "done", "left", "took")
    for stage in stages:
        bar = ProgressBar(max(stage.num_total, 1), stage.num_done if stage.num_total else 1, width=16)
        took = "" if stage.seconds is None else duration(stage.seconds)
        done = f"{stage.num_done:,} of {stage.num_total:,} {stage.unit}"
        table.add_row(stage.name, bar, done, left_line(stage.seconds_left), took)
    table.add_section()
    table.add_row("whole job", "", "", Text(left_line(job.seconds_left()), style="bold"), "")
    return table


def _trainings(shown: list[Training]) -> Table:
    table = _table("training", "updates", "loss", "images/s", "left", "memory")
    for training in shown:
        last = training.last
        speed, memory = last.get("images_per_second"), last.get("memory_bytes")
        table.add_row(
            training.name,
            f"{training.update:,}/{training.num_updates:,}",
            f"{last['loss']:.4f}",
            f"{speed:.0f}" if speed else "",
            left_line(training.seconds_left(None)).removeprefix("about "),
            f"{last['device']} {memory / 1e9:.2f} GB" if memory else "",
        )
    return table


def _losses(job: Job, shown: list[Training], width: int) -> Table:
    """Show the newest losses by range, the own one's bold, or where they don't fit alone; and distances, if taken."""
    has_distance = any(t.distances for t in shown)
    more = ["distance", "best"] if has_distance else []
    is_few = len(max((t.name for t in shown), key=len)) + (len(job.ranges) + len(more)) * LOSS_WIDTH <= width
    columns = [f"{low:g}–{high:g}" for low, high in job.ranges] if is_few else ["own range"]
    table = _table("validation loss", *columns, *more)
    for training in shown:
        is_own = [own == training.own for own in job.ranges]
        pairs = zip(training.validation, is_own, strict=True)
        cells = [Text(f"{loss:.4f}", style="bold" if own else "") for loss, own in pairs if own or is_few]
        taken = list(training.distances.values())
        distances = [_number(taken[-1]), _number(min(taken))] if taken else ["", ""]
        table.add_row(training.name, *(cells or [Text()]), *(distances if has_distance else []))
    return table


def _search(job: Job) -> Table | None:
    if not any(level.trials for level in job.levels.values()):
        return None
    metric = job.work["search_metric"]
    table = _table(f"search, {metric}", "candidates", "images", "last", "best")
    for level in job.levels.values():
        values = level.values
        told = [_number(values[-1]), _number(min(values))] if values else ["", ""]
        table.add_row(level.name, f"{len(level.trials)}/{level.num_candidates}", f"{level.num_images:,}", *told)
    return table


def _numbers(job: Job) -> Table | None:
    """Show what the models have, as far as it is measured; of each mean also its ratio to the first model's."""
    means = job.means()
    if not means:
        return None
    first = next(iter(means))
    table = _table("model", *(c for metric in job.work["metrics"] for c in (metric, f"/ {first}")))
    for model, of_model in means.items():
        cells = []
        for metric in job.work["metrics"]:
            value, other = of_model.get(metric), means[first].get(metric)
            cells += ["" if value is None else _number(value)]
            cells += [f"{value / other:.3f}" if value and other and min(value, other) > 0 else ""]
        table.add_row(model, *cells)
    return table


def _number(value: float) -> str:
    return f"{value:.4g}"
