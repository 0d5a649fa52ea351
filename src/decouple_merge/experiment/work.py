"""What a run has to do, in counts: what its progress is measured by."""

from typing import Any

from ..config import Distil, Finetune, Training
from ..evaluation.records import content_of
from ..executors.distributed import world_size
from ..searching.levels import levels
from ..training.made_from import images_of_update
from ..training.trainer import Task
from .planned import Plan
from .reported import compared_fields, report_models
from .trainings import distilled_training, trainings

# Of the network for an image of an update: forward, and backward at twice the cost; a teacher looks at it once more.
UPDATE_PASSES, TEACHER_PASSES = 3, 1


def work_of(plan: Plan) -> dict[str, Any]:
    """List what a run does: its trainings, the levels of its search, the sets of images that its models draw.

    A *pass* is the network called for one image.
    """
    config, evaluate = plan.config, plan.config.evaluate
    every = levels(config, config.num_combined) if config.search.over != "nothing" else []
    firsts = [evaluate.first_seed + i * evaluate.num_images for i in range(evaluate.num_seed_sets)]
    distilled = distilled_training(plan)
    return _trained(plan, [*trainings(plan), *([distilled] if distilled else [])]) | {
        "levels": [
            {
                "name": level.name,
                "num_candidates": level.num_candidates,
                "num_images": len(level.seeds),
                "num_steps": level.num_steps or config.sample.num_steps,
            }
            for level in every
        ],
        "search_metric": config.search.metric,
        "models": report_models(plan),
        "metrics": evaluate.metrics,
        "compared": {
            metric: fields | {"reference": content_of(fields["reference"])}
            for metric, fields in compared_fields(plan).items()
        },
        "sets": [[first, first + evaluate.num_images - 1] for first in firsts],
        "num_steps": config.report_sample.num_steps,
    }


def pretraining_work(plan: Plan, training: tuple[Task, Training, Any]) -> dict[str, Any]:
    """List what ``deme pretrain`` does once the parts around its denoiser are there."""
    nothing: dict[str, Any] = {"levels": [], "search_metric": "", "models": [], "metrics": [], "sets": []}
    return _trained(plan, [training]) | nothing | {"num_steps": 0}


def _trained(plan: Plan, every: Any) -> dict[str, Any]:
    is_guided = bool(plan.prompts) and plan.config.text.guidance_scale > 1
    return {
        # The processes of torchrun train one model after the other.
        "num_at_once": 1 if world_size() > 1 else plan.config.num_processes,
        "passes_per_step": 1 + is_guided,
        "ranges": [[r.low, r.high] for r in plan.ranges],
        "trainings": [
            {
                "name": task.name,
                "folder": folder.relative_to(plan.run.folder).as_posix(),
                "own": [task.own.low, task.own.high],
                "num_updates": settings.num_updates,
                "num_images": images_of_update(settings),
                "num_passes": UPDATE_PASSES + TEACHER_PASSES * _has_teacher(settings),
            }
            for task, settings, folder in every
        ],
    }


def _has_teacher(settings: Training) -> bool:
    return isinstance(settings, Distil) or (isinstance(settings, Finetune) and settings.consistency_weight > 0)
