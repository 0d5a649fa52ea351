"""The verbs of weight files: ``merge``, ``masks`` and ``info``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .console import console, show_bytes

if TYPE_CHECKING:
    from ..config import Merge

MethodOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="linear where not given; ties, iso_c, karcher: see docs/merging.md")
]
ComponentOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The part of the pipelines that is merged; all denoisers if not given"),
]
ExtraKeysOption = Annotated[
    str | None, typer.Option(metavar="error|keep|drop", help="What is done with tensors that only an expert has")
]
MissingKeysOption = Annotated[
    str | None, typer.Option(metavar="error|base", help="What is done with tensors that an expert lacks")
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(help="A merge.json, a merged file or YAML: do that merge; only --out and --dry-run go with it"),
]


def merge(
    out: Annotated[Path, typer.Option(help="Folder where BASE is one, .safetensors file where BASE is one")],
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="Pipeline, network folder or file, or a name")
    ] = None,
    experts: Annotated[
        list[Path] | None, typer.Argument(metavar="EXPERT…", help="The same, runs' experts, LoRAs")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One weight for each expert, separated by commas")] = None,
    method: MethodOption = None,
    blocks: Annotated[
        list[str] | None, typer.Option("--block", metavar="PATTERN=a,b,…", help="Weights of the keys that match")
    ] = None,
    component: ComponentOption = None,
    extra_keys: ExtraKeysOption = None,
    missing_keys: MissingKeysOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="density, seed, fishers, dtype, min_delta_cosine and more, as docs/merging.md has them",
        ),
    ] = None,
    recipe: RecipeOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done")] = False,
) -> None:
    """Merge experts into their base, one tensor at a time, whatever their size.

    Example: `deme merge fashion-ddpm runs/fashion-quick/experts/0 runs/fashion-quick/experts/1
    --weights 0.5,0.5 --out merged`

    With other weights in a part of the network, in half precision: add `--block 'up_blocks.*=1,0' --set dtype=F16`
    """
    from ..merging import recipes
    from ..storage.shipped import find_model

    if recipe is not None:
        if base or weights or method or blocks or component or extra_keys or missing_keys or overrides:
            raise UserError("--recipe says what is merged and how; give it alone, with --out and --dry-run")
        show_bytes(recipes.repeat_merge(recipe, out, dry_run))
    elif base is None or not experts or weights is None:
        raise UserError("expected BASE, at least one EXPERT and --weights, or --recipe")
    else:
        named = {"method": method, "component": component, "extra_keys": extra_keys, "missing_keys": missing_keys}
        settings = _settings(named, weights, blocks or [], overrides)
        found = [find_model(str(expert)) or expert for expert in experts]
        show_bytes(recipes.merge_models(base, found, settings, out, dry_run))
    if not dry_run:
        console.print(f"merged model: {out}")


def masks(
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="What a run or deme merge merged, with its record")],
    out: Annotated[Path, typer.Option(help="New folder")],
    pattern: Annotated[
        str, typer.Option(metavar="mask|sign", help="Masks of the merge, or signs of the experts' task vectors")
    ] = "mask",
) -> None:
    """Write a merge's experts as one bit an entry, and a mixture that draws with each on its own timesteps.

    Example: `deme masks runs/fashion-quick/merged --out masks`
    """
    from ..merging.masks import PATTERNS, write_masks

    if pattern not in PATTERNS:
        raise UserError(f"--pattern is {pattern!r}, expected {' or '.join(PATTERNS)}")
    show_bytes(write_masks(merged, out, pattern))
    console.print(f"mixture: {out / 'mixture.yaml'}")


def info(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Pipeline, network folder, file, LoRA or mixture")],
) -> None:
    """Say what a model's files hold and how it was merged, or check a mixture's and say which network runs where.

    Example: `deme info fashion-ddpm`
    """
    from ..merging.described import describe_model
    from ..storage.reading import is_document

    if is_document(str(model)):
        from ..models.mixture import describe_mixture

        lines = describe_mixture(model)
    else:
        lines = describe_model(model)
    for line in lines:
        console.print(line)


def _settings(named: dict[str, str | None], weights: str, blocks: list[str], overrides: list[str] | None) -> "Merge":
    from ..config import Merge, validate
    from ..merging.rules import check_method, check_read

    patterns = [pattern for pattern, _ in map(_block, blocks)]
    if twice := [p for i, p in enumerate(patterns) if p in patterns[:i]]:
        raise UserError(f"--block {twice[0]!r} is given twice, expected weights of each pattern once")
    given = {
        **{name: value for name, value in named.items() if value is not None},
        "weights": _numbers("--weights", weights),
        "blocks": dict(_block(b) for b in blocks),
    }
    settings = validate(Merge, given, "merge", overrides)
    check_method(settings.method)
    check_read(settings.method, [override.partition("=")[0] for override in overrides or []])
    return settings


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(w) for w in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {text!r}, expected numbers separated by commas, such as 0.5,1.2") from None


def _block(text: str) -> tuple[str, list[float]]:
    pattern, _, numbers = text.rpartition("=")
    return pattern, _numbers("--block", numbers)
