"""The verb ``sample``."""

from pathlib import Path
from typing import Annotated

import typer

from .console import console
from .options import Guidance, NegativePrompt, NumProcesses, PromptFile, Template, text_values


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Pipeline folder, hub name, or run folder (its ensemble)")
    ],
    out: Annotated[Path, typer.Option(help="Folder for <seed>.png")],
    num_images: Annotated[int | None, typer.Option(min=1, help="As many as prompts where not given")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image")] = 0,
    num_steps: Annotated[int, typer.Option(min=1)] = 50,
    sampler: Annotated[str, typer.Option(help="Any diffusers scheduler by name")] = "DDIM",
    prompts: PromptFile = None,
    template: Template = None,
    negative_prompt: NegativePrompt = None,
    guidance: Guidance = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images drawn at once, 256 where not given")] = None,
    num_processes: NumProcesses = 1,
) -> None:
    """Draw images from a model, or from a run's ensemble of experts.

    Example: `deme sample models/fashion-ddpm --out samples --num-images 16`

    Of a text-to-image model: `deme sample CompVis/stable-diffusion-v1-4 --out samples --prompts prompts.txt
    --sampler PNDM --guidance 7.5`
    """
    from ..config import Text, validate
    from ..sampling.folder import sample_model

    text = validate(Text, text_values(prompts, template, negative_prompt, guidance), "prompts")
    sample_model(model, out, num_images, seed, num_steps, sampler, text, batch_size, num_processes)
    console.print(f"images: {out}")
