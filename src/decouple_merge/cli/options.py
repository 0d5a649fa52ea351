"""Options that several verbs have."""

from pathlib import Path
from typing import Annotated

import typer

PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="One prompt a line, PartiPrompts' .tsv, .json of names or of COCO"),
]
