"""The verbs of numbers: ``evaluate`` and ``stats``."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .console import console, show
from .options import Address, Executor, PromptFile, chosen

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change anything else, see docs/evaluation.md")
]


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL_OR_IMAGES", help="Pipeline, run, mixture, or images as data.source takes them"),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="REF", help="Images, a model, or statistics of deme stats, pytorch-fid or ADM")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cifar10-50k, lsun-50k, coco-30k, imagenet-names or partiprompts"),
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Separated by commas; fd_effnetlite0 where not given")] = None,
    num_images: Annotated[
        int | None, typer.Option(min=2, help="5000 of a model, all of images, where not given")
    ] = None,
    prompts: PromptFile = None,
    overrides: Set = None,
    executor: Executor = None,
    address: Address = None,
    out: Annotated[Path, typer.Option(help="Records are appended here")] = Path("metrics.jsonl"),
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Metrics files or runs to compare instead, each as PATH or PATH:MODEL"),
    ] = None,
) -> None:
    """Score a model or images against a reference; the records go to a metrics file.

    Example: `deme evaluate fashion-ddpm --reference fashion-mnist --num-images 500`

    As papers do it, but for the settings: `deme evaluate runs/sd14/merged --protocol coco-30k --reference val2014
    --prompts captions_val2014.json --set clip=laion/CLIP-ViT-g-14-laion2B-s12B-b42K
    --set inception_weights=pt_inception.pth --set sample.num_steps=20 --set text.guidance_scale=5 --set seed=1000`
    """
    if compare and not (model or reference):
        from ..evaluation.compare import compare as compare_records

        show(map(str, compare_records(*compare)))
        return
    if compare or model is None:
        raise UserError("expected MODEL_OR_IMAGES, or --compare A B, one of them")
    from ..config import load_protocol
    from ..evaluation.evaluate import evaluate_model

    given = {
        "metrics": None if metrics is None else [metric.strip() for metric in metrics.split(",")],
        "num_images": num_images,
        "text": {"prompts": prompts},
    }
    show(evaluate_model(model, reference, load_protocol(protocol, given, chosen(overrides, executor, address)), out))


def stats(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="In any form data.source takes")],
    out: Annotated[Path, typer.Option(metavar="REF.npz")],
    metric: Annotated[str, typer.Option(help="The metric whose features are meant")] = "fd_effnetlite0",
    overrides: Set = None,
) -> None:
    """Write reference statistics (mu, sigma) that other FID tools read too.

    Example: `deme stats fashion-mnist --out fashion.npz`

    For the FID, of images cut to a square and resized: `deme stats val2014 --out coco-256.npz --metric fid
    --set image_size=256 --set inception_weights=pt_inception.pth`
    """
    from ..config import Stats, validate
    from ..evaluation.references import write_reference

    write_reference(images, out, metric, validate(Stats, {}, "deme stats", overrides))
    console.print(f"statistics: {out}")
