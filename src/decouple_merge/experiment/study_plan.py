"""What a study will take, in hours, images and disk: counted from its plans and a short piece of each kind of work."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Study
from ..data.batches import training_batches
from ..data.latents import Latents
from ..evaluation.extractors import load_extractor, weights_of
from ..evaluation.metrics import extractors_of
from ..executors.devices import default_device, synchronize
from ..models.network import num_parameters
from ..sampling.sampler import denoiser, sampling_copy
from ..searching.levels import levels
from ..storage.study_folder import StudyFolder
from ..training.made_from import images_of_update, is_finished
from ..training.trainer import Trainer
from .planned import Plan, Plans
from .reported import report_models
from .sharing import drawing_key
from .study import open_plans, pieces
from .trainings import DistilledTraining, Training, distilled_training

# What a piece is timed on, after one to warm up.
NUM_TIMED_UPDATES, NUM_TIMED_IMAGES = 4, 64


# A training with a teacher, and one without.
Kinds = dict[bool, tuple[Plan, Training | DistilledTraining]]


@dataclass
class Work:
    """What is left of a study, in images.

    Attributes:
        trained: images that updates see, in trainings without and with a teacher.
        steps: images × steps of the sampler.
        features: images that each feature network sees.
        num_files: of weights that trainings and runs leave.
    """

    trained: dict[bool, int]
    steps: int
    drawn: int
    features: dict[str, int]
    num_trainings: int
    num_runs: int
    num_files: int


def count_work(plans: Plans, folder: StudyFolder) -> tuple[Work, Kinds]:
    """Count what is left, shared work once; returns with it a training of each kind to time."""
    work, kinds, known = Work({}, 0, 0, {}, 0, 0, 0), Kinds(), set[str]()
    of_folder = {plan.run.folder: plan for plan in plans.values()}
    for piece in pieces(plans, folder):
        plan, config = of_folder[piece.run], piece.config
        if piece.task is not None:
            _, settings, _ = training = piece.training(plan)
            _train(work, kinds, plan, training, settings.consistency_weight > 0)
            continue
        work.num_runs += 1
        work.num_files += config.search.over != "nothing"
        distilled = distilled_training(plan)
        if distilled is not None and not is_finished(distilled[-1]):
            work.num_files += 1
            _train(work, kinds, plan, distilled, False)
        for level in levels(config, config.num_combined) if config.num_combined else []:
            num = level.num_candidates * len(level.seeds)
            _draw(work, num, level.num_steps or config.sample.num_steps, [config.search.metric])
        for model in report_models(plan):
            key = drawing_key(plan, model) or f"{plan.run.folder} {model}"
            if key not in known:
                known.add(key)
                num = config.evaluate.num_images * config.evaluate.num_seed_sets
                _draw(work, num, config.report_sample.num_steps, config.evaluate.metrics)
    return work, kinds


def _train(work: Work, kinds: Kinds, plan: Plan, training: Training | DistilledTraining, has_teacher: bool) -> None:
    _, settings, _ = training
    kinds.setdefault(has_teacher, (plan, training))
    num = settings.num_updates * images_of_update(settings)
    work.trained[has_teacher] = work.trained.get(has_teacher, 0) + num
    work.num_trainings += 1
    work.num_files += 1 + (settings.num_updates // settings.keep_every if settings.keep_every else 0)


def _draw(work: Work, num_images: int, num_steps: int, metrics: list[str]) -> None:
    work.drawn += num_images
    work.steps += num_images * num_steps
    for name in extractors_of(metrics):
        work.features[name] = work.features.get(name, 0) + num_images


def describe_study(study: Study, out: Path) -> Iterator[str]:
    """Check every run of a study, and say what is left of it and what that will take; writes nothing.

    Raises:
        UserError: as ``open_plans``.
    """
    folder = StudyFolder(out)
    plans = open_plans(study, folder)
    work, kinds = count_work(plans, folder)
    yield f"study: {len(study.arms)} arms x {len(study.seeds)} seeds: {', '.join(study.arms)}"
    num_trained = sum(work.trained.values())
    yield f"left: {work.num_runs} of {len(plans)} runs, {work.num_trainings} trainings of {num_trained:,} images"
    yield f"left: {work.drawn:,} images to draw, {work.steps:,} steps of the sampler"
    plan = next(iter(plans.values()))
    judges = dict.fromkeys(m for p in plans.values() for m in p.config.evaluate.metrics)
    yield f"judges: {', '.join(judges)}"
    size = 4 * num_parameters(plan.base.network)
    state = study.num_processes * 5 * size
    yield (
        f"disk: about {(size * work.num_files + state) / 1e9:.2f} GB of weights, "
        f"{state / 1e9:.2f} GB of it until trainings are finished"
    )
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // study.num_processes))
    try:
        yield from _describe_time(study, work, kinds, plan)
    finally:
        torch.set_num_threads(num_threads)
    yield f"folder: {out}"


def _describe_time(study: Study, work: Work, kinds: Kinds, plan: Plan) -> Iterator[str]:
    if work.num_runs == 0:
        return
    if isinstance(plan.images, Latents):
        yield "hours: unknown, since latents are cached only when the study starts"
        return
    parts = {
        "training": sum(work.trained[kind] * _seconds_to_train(*each) for kind, each in kinds.items()),
        "drawing": work.steps * _seconds_to_step(plan),
        "features": sum(num * _seconds_to_see(plan, name) for name, num in work.features.items()),
    }
    hours = {name: seconds / 3600 / study.num_processes for name, seconds in parts.items()}
    yield (
        f"hours: about {sum(hours.values()):.1f} = "
        + " + ".join(f"{name} {value:.1f}" for name, value in hours.items())
        + f", timed just now on one process and divided by num_processes, {study.num_processes}"
    )


def _seconds_to_train(plan: Plan, training: Training | DistilledTraining) -> float:
    """Time an image of an update, in memory."""
    task, settings, _ = training
    trainer, total = Trainer(plan.base, task, settings, plan.config.seed), NUM_TIMED_UPDATES + 1
    num = total * settings.accumulation
    batches = training_batches(plan.images, plan.config.data, settings.batch_size, plan.config.seed, 0, num)
    trainer.update(batches)
    return _seconds(lambda: trainer.update(batches), NUM_TIMED_UPDATES) / settings.batch_size / settings.accumulation


def _seconds_to_step(plan: Plan) -> float:
    """Time a step of the sampler for one image, with its guidance."""
    device, config = default_device(), plan.config
    model = denoiser(plan.base, sampling_copy(plan.base.network, config.sample, device))
    seeds = config.search_seeds[: config.sample.batch_size]
    x, prompts = torch.zeros(len(seeds), *plan.base.shape, device=device), plan.open_prompts(device)
    if prompts is not None:
        model = prompts.guide(model, seeds)
    with torch.no_grad():
        model(x, 0)
        return _seconds(lambda: model(x, 0), 2) / len(x)


def _seconds_to_see(plan: Plan, name: str) -> float:
    """Time a feature network on one image."""
    extractor = load_extractor(name, default_device(), weights_of(name, plan.config.evaluate))
    images = plan.references.stack(list(range(min(NUM_TIMED_IMAGES, len(plan.references)))))
    extractor.extract(images)
    return _seconds(lambda: extractor.extract(images), 1) / len(images)


def _seconds(work: Callable[[], object], times: int) -> float:
    started = time.monotonic()
    for _ in range(times):
        work()
    synchronize(default_device())
    return (time.monotonic() - started) / times
