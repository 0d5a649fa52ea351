"""The one place where the stages meet: the whole job, its parts, and pretraining."""

import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from ..analysis.figures import sample_grid, training_curve
from ..config import Config, Pretrain, Training
from ..data.captions import load_captions
from ..data.latents import Latents
from ..data.sources import load_images
from ..data.split import split
from ..diffusion.timesteps import TimestepRange, split_timesteps
from ..evaluation.features import METRICS
from ..executors.devices import default_device
from ..executors.local import run_all
from ..merging.arithmetic import task_vector_norms
from ..models.base import Base, create_base, export_pipeline, load_base, save_pipeline
from ..models.parts import create_vae, vae_downscale
from ..models.text_encoders import create_text_encoder, create_tokenizer
from ..searching.trial import Trial
from ..storage.files import read_records, read_tensors, write_records
from ..storage.run_folder import Run
from ..training.checks import check_training
from ..training.parts import train_text_encoder, train_vae
from ..training.trainer import StepRecord, Task, is_main_process, main_process_first, train
from .manifest import check_owner, claim, manifest
from .plan import (
    BASELINE,
    Plan,
    captioned_plan,
    check_distance,
    load_experts,
    prepare,
)
from .results import Row, evaluate_run, report_models
from .selection import search_weights
from .watch import compared_of, training_distance

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
                compared_of(plan, METRICS[settings.distance.metric])
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
    change = 100 * (mean[last] / mean[start] - 1)
    return f"validation loss {mean[start]:.6f} at update {start}, {mean[last]:.6f} at {last}: {change:+.2f} %"


def _from_nothing(config: Config, settings: Pretrain, out: Path) -> Plan:
    """Make an untrained base and open its data."""
    base = create_base(settings.model, settings.scheduler, config.seed)
    _check(config, settings, base)
    images = load_images(config.data, base.channels, base.image_size)
    split(images, config.data)
    claim(Run(out), config, manifest(config, base, images))
    return Plan(config, Run(out), base, images, _ranges(settings, base), images, [])


def _text_from_nothing(config: Config, settings: Pretrain, out: Path) -> Generator[str, None, Plan]:
    """Make a text-to-image base whose denoiser is untrained: train the parts around it."""
    assert settings.vae is not None
    assert settings.text_encoder is not None
    data, seed, device = config.data, config.seed, default_device()
    vae, size = create_vae(settings.vae.model, seed), settings.model.get("sample_size")
    if not isinstance(size, int):
        raise ValueError(f"pretrain.model.sample_size is {size!r}, expected the side of the latents, one integer")
    images = load_images(data, vae.config["in_channels"], size * vae_downscale(vae.config))
    split(images, data)
    captions = load_captions(images, data)
    tokenizer = create_tokenizer(captions, settings.text_encoder.vocab_size)
    text_encoder = create_text_encoder(tokenizer, settings.text_encoder.model, seed)
    parts = {"vae": vae, "tokenizer": tokenizer, "text_encoder": text_encoder}
    base = create_base(settings.model, settings.scheduler, seed, parts)
    _check(config, settings, base)
    claim(Run(out), config, manifest(config, base, images))
    with main_process_first():
        yield from train_vae(vae, images, data, settings.vae, seed, out / "parts", device)
        yield from train_text_encoder(
            tokenizer, text_encoder, images, captions, data, settings.text_encoder, seed, out / "parts", device
        )
        if is_main_process():
            save_pipeline(base, out / "parts" / "pipeline")
        base = load_base(str(out / "parts" / "pipeline"))
        plan = captioned_plan(config, out, base, _ranges(settings, base), images, captions)
        assert isinstance(plan.images, Latents)
        yield from plan.images.fill()
    return plan


def _check(config: Config, settings: Pretrain, base: Base) -> None:
    check_training(settings, default_device())
    check_distance(config, settings, base)


def _ranges(settings: Pretrain, base: Base) -> tuple[TimestepRange, ...]:
    return tuple(split_timesteps(base.num_train_timesteps, settings.num_ranges))


def pretrain(config: Config, out: Path) -> Iterator[Event]:
    """Train a base from nothing; leaves a stock pipeline and its training curve in ``out/pipeline``.

    Of a text-to-image base the VAE is trained first, then the text encoder, and on their latents and embeddings, which
    are cached, the denoiser.
    """
    settings = config.pretrain
    if settings is None:
        raise ValueError("the config has no section pretrain, which holds the model's and the training's settings")
    check_owner(Run(out), config)
    if settings.vae is None:
        plan = _from_nothing(config, settings, out)
    else:
        plan = yield from _text_from_nothing(config, settings, out)
    base, ranges = plan.base, plan.ranges
    task = Task("pretrain", TimestepRange(0, base.num_train_timesteps), ranges)
    yield from _train(plan, task, settings, out / "training")
    if is_main_process():
        weights, _ = read_tensors(out / "training" / "model.safetensors")
        pipeline, log = out / "pipeline", read_records(out / "training" / "log.jsonl")
        export_pipeline(base, weights, pipeline, None, None)
        write_records(pipeline / "training-curve.jsonl", log)
        training_curve(log, ranges, pipeline / "training-curve.png")
        yield convergence(log)
        yield f"pipeline: {out / 'pipeline'}"
