"""The verbs of weight files: ``merge`` and ``info``."""

from pathlib import Path
from typing import Annotated

import typer

from .console import console, show_bytes


def merge(
    out: Annotated[Path, typer.Option(help="Folder where BASE is one, .safetensors file where BASE is one")],
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="Pipeline, network folder or file, hub name")
    ] = None,
    experts: Annotated[
        list[Path] | None, typer.Argument(metavar="EXPERT…", help="The same, runs' experts, LoRAs")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One weight for each expert, separated by commas")] = None,
    method: Annotated[str, typer.Option(help="linear, ties, dare, dare_ties, fisher or slerp")] = "linear",
    blocks: Annotated[
        list[str] | None, typer.Option("--block", metavar="PATTERN=a,b,…", help="Weights of the keys that match")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of a task vector that TIES and DARE keep")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of DARE's masks")] = 0,
    fishers: Annotated[
        list[Path] | None, typer.Option("--fisher", help="Fisher information of an expert, in the experts' order")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="F32, F16 or BF16; the base's where not given")] = None,
    max_shard_bytes: Annotated[int, typer.Option(help="Write a larger network as several files")] = 10_000_000_000,
    allow_non_finite: Annotated[bool, typer.Option("--allow-non-finite", help="Merge NaN and infinity")] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="Repeat the merge of a merge.json, instead of all the above")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done")] = False,
) -> None:
    """Merge experts into their base, one tensor at a time, whatever their size.

    Example: `deme merge models/fashion-ddpm runs/fashion-quick/experts/0 runs/fashion-quick/experts/1
    --weights 0.5,0.5 --out merged`
    """
    from ..config import Merge, validate
    from ..merging import recipes

    if recipe is not None:
        show_bytes(recipes.repeat_merge(recipe, out, dry_run))
    elif base is None or not experts or weights is None:
        raise ValueError("expected BASE, at least one EXPERT and --weights, or --recipe")
    else:
        settings = {
            "method": method,
            "weights": _numbers("--weights", weights),
            "blocks": dict(_block(b) for b in blocks or []),
            "density": density,
            "seed": seed,
            "fishers": fishers or [],
            "dtype": dtype,
            "max_shard_bytes": max_shard_bytes,
            "allow_non_finite": allow_non_finite,
        }
        show_bytes(recipes.merge_models(base, experts, validate(Merge, settings, "merge"), out, dry_run))
    if not dry_run:
        console.print(f"merged model: {out}")


def info(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Pipeline, network folder, file or LoRA")],
) -> None:
    """Say what a model's files hold, and how it was merged.

    Example: `deme info models/fashion-ddpm`
    """
    from ..merging import recipes

    for line in recipes.describe_model(model):
        console.print(line)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(w) for w in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}, expected numbers separated by commas, such as 0.5,1.2") from None


def _block(text: str) -> tuple[str, list[float]]:
    pattern, _, numbers = text.rpartition("=")
    return pattern, _numbers("--block", numbers)
