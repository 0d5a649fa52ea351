"""A run with everything its config names opened and checked, before any compute is spent."""

import math
from pathlib import Path

import torch

from ..config import Config, Training
from ..data.batches import Examples
from ..data.captions import captions_as_prompts, load_captions
from ..data.images import Images
from ..data.labels import LabelledImages
from ..data.latents import Latents
from ..data.prompts import load_prompts
from ..data.sources import load_images
from ..data.split import split
from ..diffusion.timesteps import TimestepRange
from ..evaluation.checks import check_evaluate, check_num_references, check_watched
from ..executors import check_executor, distributed
from ..executors.devices import check_memory, default_device
from ..merging.arithmetic import Tensors
from ..models.base import Base, load_base
from ..models.parts import check_caption_dropout, texts_to_encode
from ..models.ranges import ranges_of, with_density
from ..models.run_experts import load_expert
from ..sampling.checks import check_sample
from ..sampling.sampler import check_prompts
from ..searching.checks import check_search
from ..searching.learned import layer_patterns
from ..storage.copies import check_url
from ..storage.files import write_json
from ..storage.run_folder import Run
from ..training.checks import check_finetune, check_training
from ..training.made_from import check_unchanged
from .located import located
from .manifest import check_owner, claim, manifest
from .planned import Plan
from .provenance import check_stages, trainings_made_from
from .reported import report_references
from .work import work_of

# A process of Python that does nothing.
MIN_PROCESS_BYTES = 10_000_000
# In place of patterns: one for each layer.
LAYERS = "layers"


def check(config: Config, out: Path, base: Base | None = None) -> Plan:
    """Open and check everything a run needs; computes and writes nothing.

    Args:
        base: the config's, where it is opened already.

    Raises:
        UserError: base, data, ranges, sampler, metrics or seeds are wrong, or ``out`` is no place for a run.
    """
    config = located(config)
    check_owner(Run(out), config, [config.base, config.data.source])
    check_executor(config.executor)
    if config.results is not None:
        check_url(config.results, out)
    if base is None:
        base = with_density(load_base(config.base, config.finetune.experts == "denoisers"), config.finetune)
    ranges = ranges_of(base, config.finetune)
    config = with_layers(config, base)
    check_sample(base, config.sample)
    check_sample(base, config.sample, config.search.num_steps)
    check_sample(base, config.report_sample)
    check_evaluate(config, base)
    check_distance(config, config.finetune, base)
    check_finetune(config.finetune, base, default_device())
    if config.distil is not None:
        check_training(config.distil, base, default_device())
        check_distance(config, config.distil, base)
    _check_sizes(config, base)
    check_search(config.search, base, config.num_combined)
    images = load_images(config.data, base.channels, base.image_size)
    split(images, config.data)
    check_num_references(config, len(images), len(report_references(config, base, images)[1]))
    return image_plan(config, out, base, tuple(ranges), images)


def with_layers(config: Config, base: Base) -> Config:
    """Put a pattern for each layer where the search asks for weights of every layer."""
    if config.search.blocks != [LAYERS]:
        return config
    blocks = layer_patterns(base.network.state_dict())
    return config.model_copy(update={"search": config.search.model_copy(update={"blocks": blocks})})


def _check_sizes(config: Config, base: Base) -> None:
    """Require that what is drawn and loaded at once fits in memory; ``check_finetune`` asks it of trainings."""
    drawn = min(config.sample.batch_size, max(config.search.num_images, config.evaluate.num_images))
    check_memory("sample.batch_size", drawn, 2 * 4 * math.prod(base.shape), default_device())
    check_memory("data.num_workers", config.data.num_workers, MIN_PROCESS_BYTES, torch.device("cpu"))


def image_plan(config: Config, out: Path, base: Base, ranges: tuple[TimestepRange, ...], images: Images) -> Plan:
    """Make a plan from what was opened, with the images' captions where the base is told something."""
    if base.encoders is None:
        check_prompts(base, config.text.prompts is not None)
        return Plan(config, Run(out), base, images, ranges, images, [])
    captions = load_captions(images, config.data, base.encoders.classes)
    return captioned_plan(config, out, base, ranges, images, captions)


def captioned_plan(
    config: Config, out: Path, base: Base, ranges: tuple[TimestepRange, ...], images: Images, captions: list[str]
) -> Plan:
    """Make the plan of a text-to-image or class-conditional base from what was opened."""
    assert base.encoders is not None
    prompts = load_prompts(config.text) or captions_as_prompts(captions)
    texts_to_encode(base.encoders, prompts, config.text)
    check_caption_dropout(base.encoders, config.data.caption_dropout)
    examples: Examples = (
        Latents(base.encoders, images, captions, base.image_size, config.data, default_device())
        if base.family.is_latent
        else LabelledImages(base.encoders, images, captions)
    )
    return Plan(config, Run(out), base, examples, ranges, images, prompts)


def prepare(config: Config, out: Path, wait: bool = False) -> Plan:
    """Check everything, then make the run folder with its config and manifest; joins what torchrun started.

    A folder that has them already gets those of now: what it holds was made from the same.

    Args:
        wait: where the config changes, until no other process works on the folder, instead of refusing.

    Raises:
        UserError: as ``check``, or a stage that the folder holds was made from something else.
    """
    return begin(check(config, out), wait)


def begin(plan: Plan, wait: bool = False) -> Plan:
    """Make the run folder of what was checked; arguments and errors as of ``prepare``."""
    distributed.join()
    check_stages(plan)
    with distributed.first_goes_first():
        claim(plan.run, plan.config, manifest(plan.config, plan.base, plan.images), wait)
        if plan.prompts:
            write_json(plan.run.prompts, {"prompts": plan.prompts})
        write_json(plan.run.work, work_of(plan))
    return plan


def check_distance(config: Config, settings: Training, base: Base) -> None:
    """Require that a training can be watched by the distance it asks for, if it does."""
    if settings.distance is not None:
        check_sample(base, config.sample, settings.distance.num_steps)
        check_watched(settings.distance, config.evaluate)


def load_experts(plan: Plan) -> list[Tensors]:
    """Read a run's experts.

    Raises:
        UserError: one is missing, damaged, or was made from something else.
    """
    folders = [plan.run.expert(i) for i in range(len(plan.ranges))]
    experts = [load_expert(folder, plan.base, own) for folder, own in zip(folders, plan.ranges, strict=True)]
    now = trainings_made_from(plan)
    for folder in folders:
        check_unchanged(folder, now[f"experts/{folder.name}"])
    return experts
