"""Options that several verbs have."""

from pathlib import Path
from typing import Annotated, Any

import typer

PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="One prompt a line, PartiPrompts' .tsv, .json of names or of COCO"),
]
Template = Annotated[str | None, typer.Option(metavar="TEXT", help="What is asked for, {} being the file's prompt")]
NegativePrompt = Annotated[str | None, typer.Option(help="What guidance leads away from")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale, 7.5 where not given; 1 is none")]
NumProcesses = Annotated[
    int,
    typer.Option(min=1, help="Share the batches; GPUs are taken in turn. Images and numbers are those of one process"),
]


def text_values(
    prompts: Path | None, template: str | None, negative_prompt: str | None, guidance: float | None
) -> dict[str, Any]:
    """Name the values of the section ``text`` that are given."""
    given = {
        "prompts": prompts,
        "template": template,
        "negative_prompt": negative_prompt,
        "guidance_scale": guidance,
    }
    return {key: value for key, value in given.items() if value is not None}
