"""The verb ``schedule``."""

from pathlib import Path
from typing import Annotated

import typer

from .console import show
from .runs import Wait


def schedule(
    zoo: Annotated[Path, typer.Argument(metavar="ZOO", help="YAML of networks to choose from, see docs/mixtures.md")],
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="Of network calls, for a batch of images")],
    out: Annotated[Path, typer.Option(help="YAML of the schedule; a folder of its name holds the search")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the zoo's file")
    ] = None,
    wait: Wait = False,
) -> None:
    """Find which network runs at which step, or none, so that images are best within a time (OMS-DPM).

    Run it again to resume: what was scored is not scored twice.

    Example: `deme schedule zoo.yaml --budget 2 --out schedule.yaml`
    """
    from ..config import load_zoo
    from ..experiment.scheduling import find_schedule

    show(find_schedule(load_zoo(zoo, overrides), budget, out, wait))
