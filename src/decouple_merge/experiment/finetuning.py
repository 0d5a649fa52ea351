"""The experts of a run, and the baseline that they are compared with."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..config import Finetune
from ..data.latents import Latents
from ..errors import UserError
from ..evaluation.metrics import METRICS
from ..executors import run_all
from ..executors.distributed import check_shared, first_goes_first, is_first, world_size
from ..storage.locks import enter, hold
from ..training.made_from import is_finished
from ..training.records import StepRecord
from ..training.trainer import Task
from .costs import timed
from .given import write_given
from .manifest import check_claimed
from .planned import Plan
from .trainings import expert_training, trainings
from .watch import compared_of, global_batch, train_watched


def finetune_experts(plan: Plan, only: int | None = None, wait: bool = False) -> Iterator[str | StepRecord]:
    """Finetune the experts, or one of them, and the baseline where the config asks for it.

    The processes that torchrun started train each of them together, one after the other; otherwise ``num_processes``
    of the config train side by side, an expert each. Several calls may finetune an expert each, too; all are one's.

    Args:
        wait: until no other process works on the same, instead of refusing.

    Raises:
        UserError: there is no range of that index, or another process works on the same.
    """
    if plan.config.finetune.experts == "denoisers":
        yield from write_given(plan)
        return
    check_range(plan, only)
    wanted = trainings(plan) if only is None else [expert_training(plan, only)]
    calls = [(plan, *training) for training in wanted]
    locks = [plan.run.lock("run")] if only is None else []
    locks += [plan.run.lock(call[1].name) for call in calls if not is_finished(call[-1])]
    with ExitStack() as held:
        for lock in locks:
            yield from enter(lock, wait)
            held.enter_context(hold(lock, "deme finetune", wait))
        check_claimed(plan.run, plan.config)
        yield from timed(plan.run, "finetune", _finetune(plan, calls))


def check_range(plan: Plan, only: int | None) -> None:
    """Require that there is a range of an index, before anything is written.

    Raises:
        UserError: there is none.
    """
    if only is not None and not 0 <= only < len(plan.ranges):
        raise UserError(f"--range is {only}, and the range doesn't exist: expected 0 to {len(plan.ranges) - 1}")


def fill_caches(plan: Plan) -> Iterator[str]:
    """Encode images and texts that trainings read from the cache, where some are left to do."""
    if isinstance(plan.images, Latents) and not all(is_finished(folder) for *_, folder in trainings(plan)):
        yield from plan.images.fill()


def _finetune(plan: Plan, calls: list[tuple[Plan, Task, Finetune, Path]]) -> Iterator[str | StepRecord]:
    """Do the trainings that aren't finished, by now."""
    distance = plan.config.finetune.distance
    for *_, folder in calls:
        if is_finished(folder) and is_first():
            shutil.rmtree(folder / "state", ignore_errors=True)
    unfinished: list[tuple[Any, ...]] = [call for call in calls if not is_finished(call[-1])]
    check_shared(plan.run.folder, f"{len(unfinished)} unfinished trainings")
    if unfinished:
        # Before several processes ask for them at once.
        with first_goes_first():
            yield from fill_caches(plan)
            if distance is not None and is_first():
                compared_of(plan, METRICS[distance.metric].extractor)
        yield global_batch(plan.config.finetune)
    if world_size() > 1:
        yield from run_all(train_watched, unfinished, 1)
    else:
        yield from run_all(train_watched, unfinished, *plan.config.where, folder=plan.run.folder)
