"""Options that several verbs have."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError

PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="One prompt a line, PartiPrompts' .tsv, .json of names or of COCO"),
]
Executor = Annotated[str | None, typer.Option(metavar="NAME", help="Where the pieces run, local or ray")]
Address = Annotated[str | None, typer.Option(help="The cluster of --executor ray, host:port, or auto for this one's")]


def chosen(overrides: list[str] | None, executor: str | None, address: str | None) -> list[str]:
    """Add what the options of an executor change to the values that ``--set`` changes; an address is Ray's.

    Raises:
        UserError: an address is given for another executor.
    """
    if address and executor not in (None, "ray"):
        raise UserError(f"--address is {address}, and --executor {executor} has no cluster: leave one out")
    given = {"executor": executor or ("ray" if address else None), "ray.address": address}
    return [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value is not None)]
