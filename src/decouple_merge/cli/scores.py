"""The verbs of numbers: ``evaluate`` and ``stats``."""

from pathlib import Path
from typing import Annotated

import typer

from .console import console, show
from .options import Guidance, NegativePrompt, NumProcesses, PromptFile, Template, text_values

InceptionWeights = Annotated[Path | None, typer.Option(help="For fid, kid and other metrics of Inception")]
DinoV2 = Annotated[str | None, typer.Option("--dinov2", help="Folder or hub name, for fd_dinov2 and others")]
Clip = Annotated[str | None, typer.Option(help="Folder or hub name, for clip_score, cmmd, fd_clip and others")]


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL_OR_IMAGES", help="Pipeline, or images in any form data.source takes"),
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
    seed: Annotated[int, typer.Option(min=0, help="Of the first image, which has the first prompt")] = 0,
    num_steps: Annotated[int | None, typer.Option(min=1, help="50 where not given")] = None,
    sampler: Annotated[str | None, typer.Option(help="Any diffusers scheduler by name, DDIM where not given")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a value of the protocol")
    ] = None,
    out: Annotated[Path, typer.Option(help="Records are appended here")] = Path("metrics.jsonl"),
    inception_weights: InceptionWeights = None,
    dinov2: DinoV2 = None,
    clip: Clip = None,
    prompts: PromptFile = None,
    template: Template = None,
    negative_prompt: NegativePrompt = None,
    guidance: Guidance = None,
    num_processes: NumProcesses = 1,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Metrics files or runs to compare instead, each as PATH or PATH:MODEL"),
    ] = None,
) -> None:
    """Score a model or images against a reference; the records go to a metrics file.

    Example: `deme evaluate models/fashion-ddpm --reference fashion-mnist --num-images 500`

    As papers do it: `deme evaluate runs/sd14/merged --protocol coco-30k --reference val2014 --prompts
    captions_val2014.json --clip laion/CLIP-ViT-g-14-laion2B-s12B-b42K --inception-weights pt_inception.pth`
    """
    if compare is not None:
        from ..evaluation.compare import compare as compare_records

        show(compare_records(*compare))
        return
    if model is None:
        raise ValueError("expected MODEL_OR_IMAGES, or --compare A B")
    from ..config import load_protocol
    from ..evaluation.scoring import evaluate_model

    given = {
        "metrics": metrics.split(",") if metrics else None,
        "num_images": num_images,
        "sample": {"sampler": sampler, "num_steps": num_steps},
        "text": text_values(prompts, template, negative_prompt, guidance),
    }
    settings = load_protocol(protocol, given, overrides)
    show(
        evaluate_model(
            model,
            reference,
            settings.metrics,
            settings.num_images,
            seed,
            out,
            inception_weights,
            given_encoders(dinov2, clip),
            settings.sample,
            text=settings.text,
            num_processes=num_processes,
            image_size=settings.image_size,
            num_reference_images=settings.num_reference_images,
        )
    )


def stats(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="In any form data.source takes")],
    out: Annotated[Path, typer.Option(metavar="REF.npz")],
    metric: Annotated[str, typer.Option(help="The metric whose features are meant")] = "fd_effnetlite0",
    inception_weights: InceptionWeights = None,
    dinov2: DinoV2 = None,
    clip: Clip = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Cut images to a square and resize them first")] = None,
) -> None:
    """Write reference statistics (mu, sigma) that other FID tools read too.

    Example: `deme stats fashion-mnist --out fashion.npz`
    """
    from ..evaluation import scoring

    scoring.write_reference(images, out, metric, inception_weights, given_encoders(dinov2, clip), image_size)
    console.print(f"statistics: {out}")


def given_encoders(dinov2: str | None, clip: str | None) -> dict[str, str]:
    return {name: path for name, path in (("dinov2", dinov2), ("clip", clip)) if path is not None}
