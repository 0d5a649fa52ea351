"""The command ``deme``: each verb is one function of ``workflow``. Heavy imports stay inside the handlers."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..experiment.results import Row

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
# Without a terminal a console is 80 columns wide, too few for the result table.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 110)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config, see configs/")]
Out = Annotated[Path | None, typer.Option(help="Run folder; runs/<config name> where not given")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a value of the config")]


def _load(config: Path, out: Path | None, overrides: list[str] | None) -> tuple[Any, Path]:
    from ..config import load_config

    return load_config(config, overrides), out or Path("runs") / config.stem


def _show(events: Iterable[Any]) -> None:
    """Print events as they come, and the rows of the result table together at the end."""
    from .progress import show

    rows = show(events, console)
    if rows:
        console.print(result_table(rows))


def _show_bytes(events: Iterable[Any]) -> None:
    """Print lines as they come, and the bytes written so far with their rate."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("merge", total=None)
        for event in events:
            if isinstance(event, str):
                console.print(event)
            else:
                progress.update(bar, completed=event.num_done, total=event.num_bytes)


def result_table(rows: "list[Row]") -> Table:
    """Lay out the result table, with each mean's ratio to the pretrained model's."""
    distances = ("fd_", "kd_", "fid", "kid", "sfid", "cmmd")
    only_distances = all(r.metric.startswith(distances) for r in rows)
    title = "distance to the reference (smaller is better)" if only_distances else "results"
    table = Table(title=title, min_width=100)
    for column in ("model", "parameters", "metric", "mean", "spread over seed sets", "/ pretrained"):
        table.add_column(column, justify="left" if column in ("model", "metric") else "right", no_wrap=True)
    first = {r.metric: r.mean for r in rows if r.model == "pretrained"}
    for row in rows:
        ratio = f"{row.mean / first[row.metric]:.3f}" if first.get(row.metric) else ""
        table.add_row(row.model, f"{row.num_parameters:,}", row.metric, f"{row.mean:.4g}", f"{row.spread:.2g}", ratio)
    return table


@app.command()
def run(
    config: ConfigFile,
    out: Out = None,
    overrides: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done")] = False,
) -> None:
    """Do the whole job: finetune the experts, search the weights, export the merged model, evaluate.

    Run it again to resume: what is finished is not done twice.

    Example: `deme run configs/fashion-quick.yaml`
    """
    from ..experiment import plan, workflow

    settings, folder = _load(config, out, overrides)
    if dry_run:
        _show(plan.describe(settings, folder))
        return
    _show(workflow.run(settings, folder))
    console.print(f"merged model: {folder / 'merged'}")


@app.command()
def finetune(
    config: ConfigFile,
    out: Out = None,
    overrides: Set = None,
    only: Annotated[int | None, typer.Option("--range", metavar="I", help="Only the expert of this range")] = None,
) -> None:
    """Finetune the experts, or one of them.

    Example: `deme finetune configs/fashion-quick.yaml --range 2`
    """
    from ..experiment import plan, workflow

    _show(workflow.finetune_experts(plan.prepare(*_load(config, out, overrides)), only))


@app.command()
def search(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with finished experts")],
    worker: Annotated[
        bool, typer.Option("--worker", help="Evaluate candidates of a search that runs elsewhere")
    ] = False,
) -> None:
    """Search the merging weights of a run's experts and export the best merge.

    Example: `deme search runs/fashion-quick`
    """
    from ..config import load_config
    from ..experiment import plan, selection

    opened = plan.prepare(load_config(run_folder / "config.yaml"), run_folder)
    if worker:
        _show(selection.help_search(opened))
        return
    _show(selection.search_weights(opened))
    console.print(f"merged model: {run_folder / 'merged'}")


@app.command()
def fisher(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with finished experts")],
    num_batches: Annotated[int, typer.Option(min=1, help="For each expert, of finetune.batch_size images")] = 10,
) -> None:
    """Write the diagonal Fisher information of a run's experts, for `deme merge --method fisher`.

    Example: `deme fisher runs/fashion-quick`
    """
    from ..config import load_config
    from ..experiment import plan
    from ..experiment.fisher import write_fishers

    _show(write_fishers(plan.prepare(load_config(run_folder / "config.yaml"), run_folder), num_batches))


@app.command()
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
        _show_bytes(recipes.repeat_merge(recipe, out, dry_run))
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
        _show_bytes(recipes.merge_models(base, experts, validate(Merge, settings, "merge"), out, dry_run))
    if not dry_run:
        console.print(f"merged model: {out}")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(w) for w in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}, expected numbers separated by commas, such as 0.5,1.2") from None


def _block(text: str) -> tuple[str, list[float]]:
    pattern, _, numbers = text.rpartition("=")
    return pattern, _numbers("--block", numbers)


@app.command()
def info(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Pipeline, network folder, file or LoRA")],
) -> None:
    """Say what a model's files hold, and how it was merged.

    Example: `deme info models/fashion-ddpm`
    """
    from ..merging import recipes

    for line in recipes.describe_model(model):
        console.print(line)


PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="One prompt a line, PartiPrompts' .tsv, .json of names or of COCO"),
]
NegativePrompt = Annotated[str | None, typer.Option(help="What guidance leads away from")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale, 7.5 where not given; 1 is none")]


Template = Annotated[str | None, typer.Option(metavar="TEXT", help="What is asked for, {} being the file's prompt")]


def _text(
    prompts: Path | None, template: str | None, negative_prompt: str | None, guidance: float | None
) -> dict[str, Any]:
    given = {
        "prompts": prompts,
        "template": template,
        "negative_prompt": negative_prompt,
        "guidance_scale": guidance,
    }
    return {key: value for key, value in given.items() if value is not None}


NumProcesses = Annotated[
    int,
    typer.Option(min=1, help="Share the batches; GPUs are taken in turn. Images and numbers are those of one process"),
]


@app.command()
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
    from ..sampling import standalone

    text = validate(Text, _text(prompts, template, negative_prompt, guidance), "prompts")
    standalone.sample_model(model, out, num_images, seed, num_steps, sampler, text, batch_size, num_processes)
    console.print(f"images: {out}")


InceptionWeights = Annotated[Path | None, typer.Option(help="For fid, kid and other metrics of Inception")]
DinoV2 = Annotated[str | None, typer.Option("--dinov2", help="Folder or hub name, for fd_dinov2 and others")]
Clip = Annotated[str | None, typer.Option(help="Folder or hub name, for clip_score, cmmd, fd_clip and others")]


def _encoders(dinov2: str | None, clip: str | None) -> dict[str, str]:
    return {name: path for name, path in (("dinov2", dinov2), ("clip", clip)) if path is not None}


@app.command()
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

        _show(compare_records(*compare))
        return
    if model is None:
        raise ValueError("expected MODEL_OR_IMAGES, or --compare A B")
    from ..config import load_protocol
    from ..evaluation.scoring import evaluate_model

    given = {
        "metrics": metrics.split(",") if metrics else None,
        "num_images": num_images,
        "sample": {"sampler": sampler, "num_steps": num_steps},
        "text": _text(prompts, template, negative_prompt, guidance),
    }
    settings = load_protocol(protocol, given, overrides)
    _show(
        evaluate_model(
            model,
            reference,
            settings.metrics,
            settings.num_images,
            seed,
            out,
            inception_weights,
            _encoders(dinov2, clip),
            settings.sample,
            text=settings.text,
            num_processes=num_processes,
            image_size=settings.image_size,
            num_reference_images=settings.num_reference_images,
        )
    )


@app.command()
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

    scoring.write_reference(images, out, metric, inception_weights, _encoders(dinov2, clip), image_size)
    console.print(f"statistics: {out}")


@app.command()
def pretrain(config: ConfigFile, out: Out = None, overrides: Set = None) -> None:
    """Train a base model from nothing; run it again to resume.

    Example: `deme pretrain configs/fashion-base.yaml`
    """
    from ..experiment import workflow

    _show(workflow.pretrain(*_load(config, out, overrides)))


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit status 2."""
    try:
        app(standalone_mode=True)
    except ValueError as error:
        print("deme: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        from ..storage.files import is_disk_full

        if not is_disk_full(error):
            raise
        print("deme: the disk is full; make room and run the same command again to go on", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("deme: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
