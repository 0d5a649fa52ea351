"""The verb that writes a config: ``init``."""

from pathlib import Path
from typing import Annotated

import typer

from .console import show


def init(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Pipeline folder or name")],
    data: Annotated[str, typer.Option(metavar="DATA", help="Images in any form data.source takes")],
    out: Annotated[Path | None, typer.Option(help="YAML file; named by BASE and DATA where not given")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A value that the config shall have")
    ] = None,
) -> None:
    """Write a commented config for a base and its images: asks both what they are, computes nothing.

    Example: `deme init fashion-ddpm --data fashion-mnist`
    """
    from ..experiment.initial import write_config

    show(write_config(base, data, out, overrides))
