"""The one place where the stages meet: the whole job."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UserError
from ..executors import distributed
from ..merging.arithmetic import task_vector_norms
from ..reporting.page import write_report
from ..sampling.shares import unlike_shares
from ..searching.trial import Trial
from ..storage.copies import copy_changed
from ..storage.locks import enter, hold
from ..storage.run_folder import Run
from ..training.records import StepRecord
from .combined import load_combined
from .distilling import distil
from .finetuning import fill_caches, finetune_experts
from .manifest import check_claimed
from .pictures import draw_samples
from .plan import prepare
from .planned import Plan
from .results import Row, evaluate_run
from .selection import search_weights

# What the verbs yield: a line for the user, progress, a metrics record, a row of the result table.
Event = str | StepRecord | Trial | dict[str, Any] | Row


def run(config: Config, out: Path, wait: bool = False, page: bool = True) -> Iterator[Event]:
    """Do the whole job: finetune, search, export, evaluate, report. What is finished already is not done again.

    Of the processes that torchrun started, the first goes on alone after the trainings, and the others end.

    Args:
        wait: until no other process works on the folder, instead of refusing.
        page: write ``report.html`` at the end.
    """
    lock = Run(out).lock("run")
    yield from enter(lock, wait)
    plan = prepare(config, out, wait)
    yield from unlike_shares(plan.base, plan.ranges, plan.config.sample)
    with hold(lock, "deme run", wait):
        check_claimed(plan.run, plan.config)
        # Before any compute: a place that can't be written is found now.
        yield from copy_results(plan)
        if distributed.is_first():
            yield from fill_caches(plan)
        yield from draw_samples(plan)
        yield from finetune_experts(plan, wait=wait)
        is_first = distributed.is_first()
        distributed.leave()
        if not is_first:
            return
        yield from _or_later(copy_results(plan))
        yield from draw_samples(plan)
        if config.search.over != "nothing":
            norms = task_vector_norms(plan.base.network.state_dict(), load_combined(plan))
            yield "task vector norms: " + ", ".join(f"{n:.3f}" for n in norms)
            yield from search_weights(plan)
            yield from distil(plan)
            yield from _or_later(copy_results(plan))
        yield from report(plan)
        if page:
            yield f"report: {write_report([plan.run.folder])}"
        yield from copy_results(plan)


def copy_results(plan: Plan) -> Iterator[str]:
    """Copy what the run folder holds to the config's ``results``, if it has one; yields a line.

    Raises:
        UserError: it can't be written there.
    """
    if (url := plan.config.results) is not None and distributed.is_first():
        names = list(copy_changed(plan.run.folder, url))
        yield f"results: {len(names)} files copied to {url}"


def _or_later(lines: Iterator[str]) -> Iterator[str]:
    """Copy between stages: what can't be copied now stops no compute, and is copied after the next."""
    try:
        yield from lines
    except UserError as error:
        yield f"warning: {error}"


def report(plan: Plan) -> Iterator[str | dict[str, Any] | Row]:
    """Draw every model of the result table, and score it; of a run whose search is done."""
    # First: numbers may take hours, and a run that has them all has its figure.
    yield from draw_samples(plan)
    yield from evaluate_run(plan)
