"""One HTML file that says what runs hold: needs no network, and reads without JavaScript."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from .. import __version__
from ..analysis import analyses
from ..analysis.charts import ramp_colours
from ..analysis.duration import duration
from ..errors import UserError
from ..storage.files import write_text
from ..storage.outputs import REPORT, check_output
from .contents import Contents, read_run
from .gaps import not_measured
from .verdict import check_alike, check_runs, metrics_of, table, title_of, verdict
from .views import view

MAX_BYTES = 5_000_000
# How much smaller pictures are tried, until a page is small enough.
SCALES = (1.0, 0.9, 0.7, 0.5, 0.35, 0.25)


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write one HTML page on a run, or on runs that differ in their training seed only.

    Equal contents give equal bytes. The page is below 5 MB: pictures shrink where they must.

    Args:
        out: ``report.html`` in the run's folder where not given; of several runs in the folder that the first lies in.

    Returns:
        Where the page is.

    Raises:
        UserError: a folder holds no run, the runs differ in more than their seed, or ``out`` holds something else.
    """
    runs = [read_run(folder) for folder in folders]
    out = out or (runs[0].run.report if len(runs) == 1 else runs[0].run.folder.resolve().parent / "report.html")
    check_output(out, REPORT, [])
    check_runs(runs)
    check_alike(runs)
    for scale in SCALES:
        html = render(runs, scale)
        if len(html.encode()) < MAX_BYTES:
            write_text(out, html)
            return out
    raise UserError(
        f"a page of {', '.join(run.name for run in runs)} has {len(html.encode()) / 1e6:.1f} MB with its pictures as "
        "small as they get, expected less than 5 MB: report on fewer runs"
    )


def render(runs: list[Contents], scale: float = 1.0) -> str:
    """Make the page.

    Args:
        scale: of the pictures that may be made smaller.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("decouple_merge.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"title_of": title_of, "duration": duration}
    views = [view(run, scale) for run in runs]
    return environment.get_template("report.html").render(
        version=__version__,
        verdict=verdict(runs),
        metrics=metrics_of(runs),
        rows=table(runs),
        views=views,
        gaps=not_measured(runs, analyses()),
        colours=ramp_colours(max(v.num_colours for v in views)),
    )
