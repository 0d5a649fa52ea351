"""The verbs of a config or a run folder: ``run``, ``finetune``, ``prune``, ``search``, ``distil``, …."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .console import console, show
from .options import Address, Executor, chosen

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config, or the name of one that we ship")]
Out = Annotated[Path | None, typer.Option(help="Run folder; runs/NAME of the config where not given")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until no other process works on the folder")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the config")]


def run(
    config: ConfigFile,
    out: Out = None,
    overrides: Set = None,
    executor: Executor = None,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done")] = False,
    wait: Wait = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Don't write report.html at the end")] = False,
) -> None:
    """Do the whole job: finetune the experts, search the weights, export the merged model, evaluate, report.

    Run it again to resume: what is finished is not done twice.

    Example: `deme run fashion-quick`
    """
    settings, folder = _load(config, out, chosen(overrides, executor, address))
    # A mistake in the config is told before seconds of imports.
    from ..experiment import workflow
    from ..experiment.dry_run import describe

    if dry_run:
        show(describe(settings, folder))
        return
    show(workflow.run(settings, folder, wait, page=not no_report), folder)
    if (folder / "merged").exists():
        console.print(f"merged model: {folder / 'merged'}")


def finetune(
    config: ConfigFile,
    out: Out = None,
    overrides: Set = None,
    executor: Executor = None,
    address: Address = None,
    only: Annotated[int | None, typer.Option("--range", metavar="I", help="Only the expert of this range")] = None,
    wait: Wait = False,
) -> None:
    """Finetune the experts, or one of them.

    Example: `deme finetune fashion-quick --range 2`
    """
    settings, folder = _load(config, out, chosen(overrides, executor, address))
    from ..experiment import finetuning, plan

    checked = plan.check(settings, folder)
    finetuning.check_range(checked, only)
    show(finetuning.finetune_experts(plan.begin(checked, wait), only, wait), folder)


def prune(
    config: ConfigFile,
    index: Annotated[int, typer.Option("--range", metavar="I", help="The range whose loss says what matters")],
    keep: Annotated[float, typer.Option(help="Share of the channels that is kept at every level, such as 0.7")],
    out: Annotated[Path, typer.Option(help="Folder of the pruned pipeline")],
    overrides: Set = None,
    num_batches: Annotated[int, typer.Option(min=1, help="Of finetune.batch_size images, for the importance")] = 10,
) -> None:
    """Make a config's base narrower for one of its ranges, by the importance of channels to the range's own loss.

    The result is a pipeline that stock diffusers loads, to be finetuned on the range.

    Example: `deme prune fashion-quick --range 0 --keep 0.7 --out pruned/0`
    """
    from ..config import load_config
    from ..experiment.pruning import prune_base

    show(prune_base(load_config(config, overrides), index, keep, out, num_batches))


def search(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with finished experts")],
    worker: Annotated[
        bool, typer.Option("--worker", help="Evaluate candidates of a search that runs elsewhere")
    ] = False,
    wait: Wait = False,
) -> None:
    """Search the merging weights of a run's experts and export the best merge.

    Example: `deme search runs/fashion-quick`
    """
    config = _config_of(run_folder)
    from ..experiment import plan, selection

    opened = plan.prepare(config, run_folder)
    if worker:
        show(selection.help_search(opened))
        return
    show(selection.search_weights(opened, wait), run_folder)
    console.print(f"merged model: {run_folder / 'merged'}")


def distil(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with a merged model")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the section distil")
    ] = None,
    wait: Wait = False,
) -> None:
    """Pull a run's merged model towards its experts, each on its own timesteps, in a few hundred updates.

    Example: `deme distil runs/fashion-quick --set num_updates=300`
    """
    first = [] if _config_of(run_folder).distil else ["distil={}"]
    # The whole config is checked: it is what the run folder will hold.
    config = _config_of(run_folder, [*first, *(f"distil.{override}" for override in overrides or [])])
    from ..experiment import distilling, plan

    checked = plan.check(config, run_folder)
    distilling.check_merged(checked)
    show(distilling.distil(plan.begin(checked), wait), run_folder)
    console.print(f"distilled model: {run_folder / 'distilled'}")


def fisher(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with finished experts")],
    num_batches: Annotated[int, typer.Option(min=1, help="For each expert, of finetune.batch_size images")] = 10,
    wait: Wait = False,
) -> None:
    """Write the diagonal Fisher information of a run's experts, which a merge with `--method fisher` takes.

    Example: `deme fisher runs/fashion-quick`
    """
    config = _config_of(run_folder)
    from ..experiment import plan
    from ..experiment.fisher import write_fishers

    show(write_fishers(plan.prepare(config, run_folder), num_batches, wait))


def gram(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with finished experts")],
    num_batches: Annotated[int, typer.Option(min=1, help="For each expert, of finetune.batch_size images")] = 10,
    wait: Wait = False,
) -> None:
    """Write the inner products of what a run's experts see, which a merge with `--method regmean` takes.

    Example: `deme gram runs/fashion-quick`
    """
    config = _config_of(run_folder)
    from ..experiment import plan
    from ..experiment.gram import write_grams

    show(write_grams(plan.prepare(config, run_folder), num_batches, wait))


def analyze(
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folder; several with --over")],
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Such as task-vectors; all where not given")
    ] = None,
    over: Annotated[
        str | None, typer.Option(metavar="KEY", help="Compare several runs over a setting, as finetune.num_ranges")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the section analyze")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say only what it would cost")] = False,
    wait: Wait = False,
) -> None:
    """Compute the tables and figures that show why a run's merge works.

    Run it again to resume: what is finished is not done twice. A comparison of several lies in the first one's folder.

    Example: `deme analyze runs/fashion-quick --only task-vectors`
    """
    from ..config import Analyze, validate

    folder, *others = run_folders
    if bool(others) != (over is not None):
        found = f"{len(run_folders)} runs and {'no ' if over is None else ''}--over"
        raise UserError(f"found {found}: several runs are compared over a setting; give one run alone, or both")
    for each in run_folders:
        _config_of(each)
    from ..experiment import analyses

    opened = analyses.open_run(folder, dry_run)
    values = opened.config.analyze.model_dump(exclude_unset=True)
    chosen = [*(overrides or []), *([f"sensitivity.over={over}"] if over else [])]
    settings = validate(Analyze, values, "--set of deme analyze", chosen)
    names = only or (["sensitivity"] if others else [])
    show(analyses.analyze(opened, names, settings, dry_run, wait, others))


def study(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML study, or the name of one that we ship")],
    out: Annotated[Path | None, typer.Option(help="Folder of the study; runs/NAME of its file where not given")] = None,
    overrides: Set = None,
    executor: Executor = None,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what it would take")] = False,
    wait: Wait = False,
) -> None:
    """Run every arm of a study on every training seed; the tables compare them by every judge.

    Run it again to resume: what is finished is not done twice, and what arms share is done once.

    Example: `deme study study-fashion --dry-run`
    """
    from ..config import load_study

    settings = load_study(study_file, chosen(overrides, executor, address))
    from ..experiment.study import run_study
    from ..experiment.study_plan import describe_study

    folder = out or Path("runs") / study_file.stem
    show(describe_study(settings, folder) if dry_run else run_study(settings, folder, wait))


def pretrain(config: ConfigFile, out: Out = None, overrides: Set = None, wait: Wait = False) -> None:
    """Train a base model from nothing; run it again to resume.

    Example: `deme pretrain fashion-base`
    """
    settings, folder = _load(config, out, overrides)
    from ..experiment import pretraining

    show(pretraining.pretrain(settings, folder, wait), folder)


def _config_of(run_folder: Path, overrides: list[str] | None = None) -> Any:
    from ..config import load_config
    from ..storage.run_folder import Run, check_run

    check_run(run_folder)
    return load_config(Run(run_folder).config, overrides)


def _load(config: Path, out: Path | None, overrides: list[str] | None) -> tuple[Any, Path]:
    from ..config import load_config

    return load_config(config, overrides), out or Path("runs") / config.stem
