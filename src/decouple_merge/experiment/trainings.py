"""The trainings of a run: what each is of, with which settings, and where."""

from pathlib import Path

from ..config import Distil, Finetune, Projection
from ..diffusion.timesteps import TimestepRange
from ..training.trainer import Task
from .planned import BASELINE, DISTILLED, Plan

# A task with its settings and the folder of its result.
Training = tuple[Task, Finetune, Path]
DistilledTraining = tuple[Task, Distil, Path]


def expert_task(plan: Plan, index: int) -> Task:
    """Say what an expert is trained on."""
    return Task(f"expert-{index}", plan.ranges[index], plan.ranges)


def expert_training(plan: Plan, index: int) -> Training:
    """Say what an expert is trained on, with which settings, and where."""
    return expert_task(plan, index), plan.config.finetune, plan.run.expert(index)


def trainings(plan: Plan) -> list[Training]:
    """List what a run trains: the baseline if any, which takes longest, and experts if it has some of its own."""
    finetune = plan.config.finetune
    if finetune.experts == "denoisers":
        return []
    num = len(plan.ranges) if plan.config.search.combines_experts else 0
    experts = [expert_training(plan, index) for index in range(num)]
    if not finetune.baseline:
        return experts
    return [(_whole_task(plan, BASELINE), _baseline_settings(plan), plan.run.baseline(BASELINE)), *experts]


def distilled_training(plan: Plan) -> DistilledTraining | None:
    """Say how the merged model is pulled towards the experts; None where the config doesn't ask for it."""
    settings = plan.config.distil
    return None if settings is None else (_whole_task(plan, DISTILLED), settings, plan.run.distilling)


def _whole_task(plan: Plan, name: str) -> Task:
    return Task(name, TimestepRange(0, plan.base.num_train_timesteps), plan.ranges)


def _baseline_settings(plan: Plan) -> Finetune:
    """Give the baseline equal compute, as many updates as all experts together, and none of what makes an expert."""
    changes = {"global_prob": 0.0, "consistency_weight": 0.0, "projection": Projection(placement="none")}
    num_updates = plan.config.finetune.num_updates * len(plan.ranges)
    return plan.config.finetune.model_copy(update={"num_updates": num_updates, **changes})
