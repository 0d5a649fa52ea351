"""The experts of a run, and the baseline that they are compared with."""

import shutil
from collections.abc import Iterator

from ..config import Finetune, Projection
from ..data.latents import Latents
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..evaluation.metrics import METRICS
from ..executors import run_all
from ..training.acceleration import main_process_first
from ..training.records import StepRecord
from ..training.trainer import Task
from .plan import BASELINE, Plan
from .watch import compared_of, train_watched


def expert_task(plan: Plan, index: int) -> Task:
    """Say what an expert is trained on."""
    return Task(f"expert-{index}", plan.ranges[index], plan.ranges)


def _baseline_task(plan: Plan) -> Task:
    return Task(BASELINE, TimestepRange(0, plan.base.num_train_timesteps), plan.ranges)


def _baseline_settings(plan: Plan) -> Finetune:
    """Give the baseline equal compute, as many updates as all experts together, and none of what makes an expert."""
    changes = {"global_prob": 0.0, "consistency_weight": 0.0, "projection": Projection(placement="none")}
    num_updates = plan.config.finetune.num_updates * len(plan.ranges)
    return plan.config.finetune.model_copy(update={"num_updates": num_updates, **changes})


def finetune_experts(plan: Plan, only: int | None = None) -> Iterator[str | StepRecord]:
    """Finetune the experts, or one of them, and the baseline where the config asks for it.

    Raises:
        UserError: there is no range of that index.
    """
    settings, num = plan.config.finetune, len(plan.ranges)
    if only is not None and not 0 <= only < num:
        raise UserError(f"range {only} doesn't exist, expected 0 to {num - 1}")
    calls = [(plan, expert_task(plan, i), settings, plan.run.expert(i)) for i in range(num) if only in (None, i)]
    if settings.baseline and only is None:
        # It is the longest, so it starts first.
        calls.insert(0, (plan, _baseline_task(plan), _baseline_settings(plan), plan.run.baseline(BASELINE)))
    unfinished = []
    for call in calls:
        folder = call[-1]
        if (folder / "model.safetensors").exists():
            shutil.rmtree(folder / "state", ignore_errors=True)
        else:
            unfinished.append(call)
    if unfinished:
        # Before several processes ask for them at once.
        with main_process_first():
            if isinstance(plan.images, Latents):
                yield from plan.images.fill()
            if settings.distance is not None:
                compared_of(plan, METRICS[settings.distance.metric].extractor)
    yield from run_all(train_watched, unfinished, plan.config.num_processes, plan.config.executor)
