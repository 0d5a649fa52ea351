"""A training watched by a distance: of images drawn with the weights as they are trained."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from ..config import Distance, Training
from ..diffusion.routing import RangeRouter
from ..diffusion.timesteps import TimestepRange
from ..evaluation.extractors import Extractor
from ..evaluation.metrics import METRICS
from ..evaluation.references import Reference, open_compared
from ..evaluation.score import score
from ..executors.devices import default_device
from ..executors.distributed import is_first, together
from ..merging.arithmetic import Tensors
from ..models.ensemble import TimestepEnsemble
from ..sampling.sampler import denoiser, sample_images, sampling_copy, sampling_network
from ..training.loop import train
from ..training.made_from import images_of_update, num_ranks
from ..training.records import StepRecord
from ..training.trainer import Task
from .costs import told
from .planned import DISTILLED, Plan
from .reported import report_references
from .teachers import distillation_of


def compared_of(plan: Plan, extractor: str) -> tuple[Extractor, Reference]:
    """Open a feature network and what the images of a run's trainings and search are compared with."""
    config = plan.config
    return open_compared(extractor, config.evaluate, config.data.source, plan.references, default_device())


def reported_with(plan: Plan, extractor: str) -> tuple[Extractor, Reference]:
    """Open a feature network and what the images of a run's report are compared with."""
    name, images = report_references(plan.config, plan.base, plan.references)
    return open_compared(extractor, plan.config.evaluate, name, images, default_device())


def training_distance(plan: Plan, own: TimestepRange, settings: Distance) -> Callable[[Tensors], float]:
    """Make the function that scores weights while they are trained on a range.

    It draws with them on their range and with the base on the others, always from the same initial noise. Neither the
    weights nor any global random state are changed.

    Args:
        own: in timesteps; all of them for the baseline.
    """
    config, base, device = plan.config, plan.base, default_device()
    # Every call has a network of its own, and compiling it takes longer than drawing so few images.
    drawing = config.sample.model_copy(update={"num_steps": settings.num_steps, "compile": False})
    compared = compared_of(plan, METRICS[settings.metric].extractor)
    prompts = plan.open_prompts(device)
    edges = sorted({0, own.low, own.high, base.num_train_timesteps})
    ranges = [TimestepRange(low, high) for low, high in pairwise(edges)]
    others = sampling_copy(base.network, drawing, device) if len(ranges) > 1 else base.network

    def distance(weights: Tensors) -> float:
        trained = sampling_network(base, weights, drawing, device)
        router = RangeRouter(ranges, base.num_train_timesteps, [int(r != own) for r in ranges])
        networks = [trained, others][: router.num_networks]
        model = denoiser(base, TimestepEnsemble(networks, router, base.timestep_of))
        seeds = config.distance_seeds[: settings.num_images]
        batches = sample_images(model, base, seeds, drawing, device, prompts=prompts)
        return score(batches, [settings.metric], [compared])[settings.metric]

    return distance


def global_batch(settings: Training) -> str:
    """Say how many images an update sees."""
    num, size, accumulation = num_ranks(settings), settings.batch_size, settings.accumulation
    return (
        f"an update sees {num} process{'es' if num > 1 else ''} × batch_size {size} × accumulation {accumulation} = "
        f"{images_of_update(settings)} images"
    )


def train_watched(plan: Plan, task: Task, settings: Training, folder: Path) -> Iterator[StepRecord]:
    """Train the base of a run on a task, in as many processes as the settings say.

    The distance is measured where they ask for it.
    """
    yield from together(_train_watched, (plan, task, settings, folder), settings.num_ranks)


def _train_watched(plan: Plan, task: Task, settings: Training, folder: Path) -> Iterator[StepRecord]:
    distance = training_distance(plan, task.own, settings.distance) if settings.distance and is_first() else None
    config, distillation = plan.config, distillation_of(plan) if task.name == DISTILLED else None
    records = train(plan.base, plan.images, config.data, task, settings, config.seed, folder, distance, distillation)
    yield from told(plan.run.progress(task.name), records)
