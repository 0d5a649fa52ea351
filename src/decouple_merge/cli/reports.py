"""The verb of pages: ``report``."""

from pathlib import Path
from typing import Annotated

import typer

from .console import console


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders that differ in their training seed")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; report.html in RUN, or beside several, where not given")
    ] = None,
) -> None:
    """Write one HTML page on a run: verdict, table, images, losses, search, analyses, cost, recipe.

    It is one file below 5 MB that needs no network. Of several runs, training seeds stand side by side.

    Example: `deme report runs/fashion-quick`
    """
    from ..reporting.page import write_report

    console.print(f"report: {write_report(runs, out)}")
