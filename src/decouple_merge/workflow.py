"""The one place where the stages meet: the whole job, its parts, and pretraining."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import Config, Training
from .data import check_held_out, load_images
from .executors import run_all
from .features import METRICS
from .figures import sample_grid, training_curve
from .finetune import StepRecord, Task, is_main_process, main_process_first, train
from .latents import Latents
from .models import create_base, export_pipeline
from .objective import load_compared, training_distance
from .plan import (
    BASELINE,
    Plan,
    check_distance,
    check_optimizer,
    check_owner,
    check_precision,
    claim,
    default_device,
    load_experts,
    manifest,
    prepare,
)
from .results import Row, evaluate_run, report_models
from .runs import Run, read_records, read_tensors, write_records
from .selection import search_weights
from .study import Trial
from .timesteps import TimestepRange, split_timesteps
from .weights import task_vector_norms

# What the verbs yield: a line for the user, progress, a metrics record, a row of the result table.
Event = str | StepRecord | Trial | dict[str, Any] | Row


def _expert_task(plan: Plan, index: int) -> Task:
    settings = plan.config.finetune
    return Task(
        f"expert-{index}",
        plan.ranges[index],
        plan.ranges,
        settings.global_prob,
        settings.consistency_weight,
        settings.projection.placement,
        settings.projection.learning_rate_scale,
    )


def _baseline_task(plan: Plan) -> Task:
    return Task(BASELINE, TimestepRange(0, plan.base.num_train_timesteps), plan.ranges)


def _train(plan: Plan, task: Task, settings: Training, folder: Path) -> Iterator[StepRecord]:
    with main_process_first():
        distance = training_distance(plan, task.own, settings.distance) if settings.distance else None
    yield from train(plan.base, plan.images, plan.config.data, task, settings, plan.config.seed, folder, distance)


def finetune_experts(plan: Plan, only: int | None = None) -> Iterator[str | StepRecord]:
    """Finetune the experts, or one of them, and the baseline where the config asks for it.

    Raises:
        ValueError: there is no range of that index.
    """
    settings, num = plan.config.finetune, len(plan.ranges)
    if only is not None and not 0 <= only < num:
        raise ValueError(f"range {only} doesn't exist, expected 0 to {num - 1}")
    calls: list[tuple[Any, ...]] = [
        (plan, _expert_task(plan, i), settings, plan.run.expert(i)) for i in range(num) if only in (None, i)
    ]
    if settings.baseline and only is None:
        # Equal compute: as many updates as all experts together. It is the longest, so it starts first.
        longer = settings.model_copy(update={"num_updates": settings.num_updates * num})
        calls.insert(0, (plan, _baseline_task(plan), longer, plan.run.baseline(BASELINE)))
    unfinished = []
    for call in calls:
        if (call[3] / "model.safetensors").exists():
            shutil.rmtree(call[3] / "state", ignore_errors=True)
        else:
            unfinished.append(call)
    if unfinished:
        # Before several processes ask for them at once.
        with main_process_first():
            if isinstance(plan.images, Latents):
                yield from plan.images.fill()
            if settings.distance is not None:
                load_compared(plan, METRICS[settings.distance.metric], default_device())
    yield from run_all(_train, unfinished, plan.config.num_processes)


def run(config: Config, out: Path) -> Iterator[Event]:
    """Do the whole job: finetune, search, export, evaluate. What is finished already is not done again."""
    plan = prepare(config, out)
    yield from finetune_experts(plan)
    norms = task_vector_norms(plan.base.network.state_dict(), load_experts(plan))
    yield "task vector norms: " + ", ".join(f"{n:.3f}" for n in norms)
    yield from search_weights(plan)
    yield from evaluate_run(plan)
    sample_grid({m: plan.run.samples(m) for m in report_models(plan)}, plan.run.sample_figure)


def convergence(log: list[dict[str, Any]]) -> str:
    """Say by how much the mean validation loss fell in the last fifth of a training's updates."""
    mean = {r["update"]: sum(r["validation"]) / len(r["validation"]) for r in log}
    last = max(mean)
    start = max(u for u in mean if u <= last * 0.8 or u == min(mean))
    fall = 100 * (1 - mean[last] / mean[start])
    return f"validation loss {mean[start]:.6f} at update {start}, {mean[last]:.6f} at {last}: {fall:.2f} % lower"


def pretrain(config: Config, out: Path) -> Iterator[Event]:
    """Train a base from nothing; leaves a stock pipeline and its training curve in ``out/pipeline``."""
    settings = config.pretrain
    if settings is None:
        raise ValueError("the config has no section pretrain, which holds the model's and the training's settings")
    base = create_base(settings.model, settings.scheduler, config.seed)
    check_precision(settings)
    check_distance(config, settings, base)
    check_optimizer(settings)
    check_owner(Run(out), config)
    images = load_images(config.data, base.channels, base.image_size)
    check_held_out(images, config.data)
    claim(Run(out), config, manifest(config, base, images))
    ranges = tuple(split_timesteps(base.num_train_timesteps, settings.num_ranges))
    task = Task("pretrain", TimestepRange(0, base.num_train_timesteps), ranges)
    plan = Plan(config, Run(out), base, images, ranges, images, [])
    yield from _train(plan, task, settings, out / "training")
    if is_main_process():
        weights, _ = read_tensors(out / "training" / "model.safetensors")
        pipeline, log = out / "pipeline", read_records(out / "training" / "log.jsonl")
        export_pipeline(base, weights, pipeline, None, None)
        write_records(pipeline / "training-curve.jsonl", log)
        training_curve(log, ranges, pipeline / "training-curve.png")
        yield convergence(log)
        yield f"pipeline: {out / 'pipeline'}"
