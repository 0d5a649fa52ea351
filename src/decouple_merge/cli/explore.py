"""The verb of the local page: ``explore``."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import not_installed
from .console import console


def explore(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with finished experts")],
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 is all, for everybody who reaches them")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="7860 or the next free where not given")] = None,
    num_steps: Annotated[
        int | None, typer.Option(min=1, help="Of the sampler; as the search's where not given")
    ] = None,
) -> None:
    """Open a local page with a slider for each merging weight: the same seeds at once, and what the search knows.

    It needs the extra `explore`. Nobody but this machine reaches it, unless `--host` says so.

    Example: `deme explore runs/fashion-quick`
    """
    try:
        from ..exploring import page
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "sklearn"):
            raise
        raise not_installed("deme explore", str(error.name), "explore") from error
    from ..exploring.explorer import Explorer

    opened = page.open_page(Explorer(run, num_steps), run.parent / f"{run.name}-explored")
    console.print("stop with Ctrl-C")
    page.launch(opened, host, port)
