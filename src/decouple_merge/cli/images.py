"""The verb ``sample``."""

from pathlib import Path
from typing import Annotated

import typer

from .console import console
from .options import Address, Executor, PromptFile, chosen


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Pipeline, run folder (its ensemble), or a mixture's YAML")
    ],
    out: Annotated[Path, typer.Option(help="Folder for PNGs, each named by its seed")],
    num_images: Annotated[int | None, typer.Option(min=1, help="As many as prompts where not given")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image, which has the first prompt")] = 0,
    num_steps: Annotated[int, typer.Option(min=1)] = 50,
    sampler: Annotated[
        str | None, typer.Option(help="Any diffusers scheduler by name; DDIM, or of a flow its own, where not given")
    ] = None,
    prompts: PromptFile = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change num_processes, or what the sections sample, text and ray hold"
        ),
    ] = None,
    executor: Executor = None,
    address: Address = None,
) -> None:
    """Draw images from a model, or from a run's ensemble of experts.

    Example: `deme sample fashion-ddpm --out samples --num-images 16`

    Of a text-to-image model: `deme sample CompVis/stable-diffusion-v1-4 --out samples --prompts prompts.txt
    --sampler PNDM --set text.guidance_scale=5 --set sample.batch_size=8`
    """
    from ..config import Drawing, validate
    from ..sampling.folder import sample_model

    given = {"sample": {"sampler": sampler, "num_steps": num_steps}, "text": {"prompts": prompts} if prompts else {}}
    settings = validate(Drawing, given, "deme sample", chosen(overrides, executor, address))
    drawn = sample_model(model, out, num_images, seed, settings.sample, settings.text, settings, console.print)
    console.print(f"images: {out}, of which {len(drawn)} were drawn now")
