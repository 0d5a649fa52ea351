"""A run with everything its config names opened and checked, before any compute is spent."""

from dataclasses import dataclass
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
from ..executors.devices import default_device
from ..merging.arithmetic import Tensors
from ..models.base import Base, load_base
from ..models.ensemble import load_expert
from ..models.parts import check_caption_dropout, texts_to_encode
from ..models.ranges import ranges_of, with_density
from ..sampling.checks import check_sample
from ..sampling.sampler import Denoiser, Prompts, check_prompts, ensemble_denoiser, open_prompts
from ..searching.checks import check_search
from ..storage.files import write_json
from ..storage.run_folder import Run
from ..training.checks import check_finetune
from .located import located
from .manifest import check_owner, claim, manifest
from .reported import report_references

BASELINE = "baseline-finetuned"


@dataclass
class Plan:
    """A config with everything it names opened and checked.

    Attributes:
        images: what is trained on; for a text-to-image base the images' latents, with their captions.
        references: what the images of a model are compared with.
        prompts: what a text-to-image model is asked for; empty for others.
    """

    config: Config
    run: Run
    base: Base
    images: Examples
    ranges: tuple[TimestepRange, ...]
    references: Images
    prompts: list[str]

    def open_prompts(self, device: torch.device) -> Prompts | None:
        """Load what a text-to-image model needs to draw a run's images; None for other models."""
        return open_prompts(self.base, self.prompts, self.config.text, device, self.config.data.cache_precision)

    def ensemble(self, experts: list[Tensors], device: torch.device) -> Denoiser:
        """Combine the experts as a run samples from them."""
        return ensemble_denoiser(self.base, self.ranges, experts, self.config.sample, device)


def check(config: Config, out: Path) -> Plan:
    """Open and check everything a run needs; computes and writes nothing.

    Raises:
        ValueError: base, data, ranges, sampler, metrics or seeds are wrong, or ``out`` belongs to another config.
    """
    config = located(config)
    check_owner(Run(out), config, [config.base, config.data.source])
    check_executor(config.executor)
    base = with_density(load_base(config.base, config.finetune.experts == "denoisers"), config.finetune)
    ranges = ranges_of(base, config.finetune)
    check_sample(base, config.sample)
    check_sample(base, config.sample, config.search.num_steps)
    check_evaluate(config, base)
    check_distance(config, config.finetune, base)
    check_finetune(config.finetune, base, default_device())
    check_search(config.search, base, config.num_combined)
    images = load_images(config.data, base.channels, base.image_size)
    split(images, config.data)
    check_num_references(config, len(images), len(report_references(config, base, images)[1]))
    return image_plan(config, out, base, tuple(ranges), images)


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


def prepare(config: Config, out: Path) -> Plan:
    """Check everything, then make the run folder with its config and manifest; joins what torchrun started.

    Raises:
        ValueError: as ``check``.
    """
    plan = check(config, out)
    distributed.join()
    with distributed.first_goes_first():
        claim(plan.run, plan.config, manifest(plan.config, plan.base, plan.images))
        if plan.prompts:
            write_json(plan.run.prompts, {"prompts": plan.prompts})
    return plan


def check_distance(config: Config, settings: Training, base: Base) -> None:
    """Require that a training can be watched by the distance it asks for, if it does."""
    if settings.distance is not None:
        check_sample(base, config.sample, settings.distance.num_steps)
        check_watched(settings.distance, config.evaluate)


def load_experts(plan: Plan) -> list[Tensors]:
    """Read a run's experts.

    Raises:
        ValueError: one is missing, damaged, or was finetuned from another base.
    """
    return [load_expert(plan.run.expert(i), plan.base, own) for i, own in enumerate(plan.ranges)]
