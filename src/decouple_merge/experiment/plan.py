"""A run with everything its config names opened and checked, before any compute is spent."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import Config, Evaluate, Search, Training, dump_config, load_config
from ..data.batches import Examples
from ..data.captions import load_captions
from ..data.images import Images
from ..data.latents import Latents
from ..data.prompts import load_prompts
from ..data.sources import load_images
from ..data.split import split
from ..diffusion.timesteps import TimestepRange, choose_ranges
from ..evaluation.alignment import holds_image_text, load_image_text
from ..evaluation.features import METRICS, check_metrics, weights_of
from ..executors.devices import default_device
from ..merging.arithmetic import Tensors
from ..merging.keys import check_same_keys, group_keys
from ..models.base import Base, load_base, load_network, make_scheduler, num_parameters
from ..models.encoders import load_encoder, load_text_encoder
from ..models.ensemble import load_expert
from ..models.lora import check_lora
from ..models.parts import check_classes
from ..models.projection import check_placement
from ..sampling.sampler import Denoiser, Prompts, ensemble_denoiser, open_prompts
from ..searching.levels import check_weights, levels
from ..seeds import generator
from ..storage.files import write_json, write_text
from ..storage.provenance import git_commit
from ..storage.run_folder import Run
from .memory import describe_memory

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
    base = load_base(config.base)
    ranges = choose_ranges(base.num_train_timesteps, config.finetune.num_ranges, config.finetune.ranges)
    for num_steps in {config.sample.num_steps, config.search.num_steps or config.sample.num_steps}:
        make_scheduler(base, config.sample.sampler, num_steps, config.sample.timestep_spacing)
    check_extractors([*config.evaluate.metrics, config.search.metric], config.evaluate)
    with_texts = [m for m in config.evaluate.metrics if METRICS[m] == "clip_text"]
    if with_texts and (base.encoders is None or base.encoders.classes):
        raise ValueError(f"evaluate.metrics has {with_texts[0]}, but {config.base} reads no texts; take another metric")
    check_distance(config, config.finetune, base)
    check_precision(config.finetune)
    check_optimizer(config.finetune)
    check_weights(config.search, len(config.search.checkpoints) or len(ranges))
    check_placement(base.network, config.finetune.projection.placement)
    if config.finetune.lora is not None:
        check_lora(base.network, config.finetune.lora)
    group_keys(list(base.network.state_dict()), config.search.blocks)
    load_checkpoints(config.search, base)
    check_owner(Run(out), config)
    images = load_images(config.data, base.channels, base.image_size)
    split(images, config.data)
    if base.encoders is None:
        return Plan(config, Run(out), base, images, tuple(ranges), images, [])
    captions = load_captions(images, config.data, base.encoders.classes)
    return captioned_plan(config, out, base, tuple(ranges), images, captions)


def captioned_plan(
    config: Config, out: Path, base: Base, ranges: tuple[TimestepRange, ...], images: Images, captions: list[str]
) -> Plan:
    """Make the plan of a text-to-image base from what was opened."""
    assert base.encoders is not None
    # The data may be sorted, and a set of seeds asks for some of the captions only.
    order = torch.randperm(len(captions), generator=generator("prompts")).tolist()
    prompts = load_prompts(config.text) or [captions[i] for i in order]
    check_classes(base.encoders, [*prompts, config.text.negative_prompt])
    latents = Latents(base.encoders, images, captions, base.image_size, config.data, default_device())
    return Plan(config, Run(out), base, latents, ranges, images, prompts)


def prepare(config: Config, out: Path) -> Plan:
    """Check everything, then make the run folder with its config and manifest.

    Raises:
        ValueError: as ``check``.
    """
    plan = check(config, out)
    claim(plan.run, config, manifest(config, plan.base, plan.images))
    return plan


def check_precision(settings: Training) -> None:
    """Refuse fp16 training on a CPU, where Accelerate would silently train in float32."""
    if settings.mixed_precision == "fp16" and default_device().type == "cpu":
        raise ValueError(
            "mixed_precision is fp16, which needs a GPU, and this machine has none: set it to bf16 or fp32"
        )


def check_extractors(metrics: list[str], settings: Evaluate) -> None:
    """Require that metrics exist and that the networks which they are measured on can be loaded."""
    check_metrics(metrics, settings.inception_weights, settings.encoders)
    for extractor in dict.fromkeys(METRICS[m] for m in metrics) if settings.encoders else ():
        if (path := weights_of(extractor, None, settings.encoders)) is not None:
            if extractor == "clip_text" and holds_image_text(str(path)):
                load_image_text(Path(path))
                continue
            load_encoder(extractor, str(path))
            if extractor == "clip_text":
                load_text_encoder(str(path))


def check_distance(config: Config, settings: Training, base: Base) -> None:
    """Require that a training can be watched by the distance it asks for, if it does."""
    if settings.distance is not None:
        make_scheduler(base, config.sample.sampler, settings.distance.num_steps, config.sample.timestep_spacing)
        check_extractors([settings.distance.metric], config.evaluate)


def check_optimizer(settings: Training) -> None:
    """Require that the optimiser is installed."""
    if settings.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ValueError(
            "optimizer is adamw8bit, which needs bitsandbytes, and that isn't installed: pip install "
            "'decouple-merge[8bit]', or set it to adamw"
        )


def check_owner(run: Run, config: Config) -> None:
    """Require that a run folder is new, or holds the same config."""
    if run.config.exists():
        old = load_config(run.config).model_dump(mode="json")
        differing = sorted(_differing_keys(old, config.model_dump(mode="json")))
        if differing:
            raise ValueError(
                f"{run.folder} belongs to another config, which differs in {', '.join(differing)}; "
                "give another --out, or remove the folder"
            )
    elif run.folder.exists() and any(p for p in run.folder.iterdir() if not p.name.startswith(".")):
        raise ValueError(f"{run.folder} is not empty and not a run folder (no config.yaml); give another --out")


def claim(run: Run, config: Config, record: dict[str, Any]) -> None:
    """Make the run folder, with config and manifest; an older run of the same config keeps its own."""
    if not run.config.exists():
        write_text(run.config, dump_config(config))
    if not run.manifest.exists():
        write_json(run.manifest, record)


def _differing_keys(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differing_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix


def manifest(config: Config, base: Base, images: Examples) -> dict[str, Any]:
    return {
        "versions": {
            "decouple_merge": __version__,
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "python": platform.python_version(),
        },
        "git": git_commit(),
        "device": str(default_device()),
        "base": {"name": config.base, "sha256": base.sha256},
        "data": {"source": config.data.source, "num_images": len(images), "sha256": images.sha256},
        "seeds": {
            "training": config.seed,
            "search": [config.search.first_seed, config.all_search_seeds.stop - 1],
            "report": [config.report_seeds.start, config.report_seeds.stop - 1],
        },
    }


def load_experts(plan: Plan) -> list[Tensors]:
    """Read a run's experts.

    Raises:
        ValueError: one is missing, damaged, or was finetuned from another base.
    """
    return [load_expert(plan.run.expert(i), plan.base) for i in range(len(plan.ranges))]


def load_checkpoints(settings: Search, base: Base) -> list[Tensors]:
    """Read the checkpoints that a search combines in place of the experts.

    Raises:
        ValueError: one is missing, damaged, or doesn't fit the base.
    """
    found = []
    for name in settings.checkpoints:
        if not Path(name).exists():
            raise ValueError(f"search.checkpoints: {name} doesn't exist; expected pipelines, folders or weight files")
        found.append(load_network(Path(name)))
        check_same_keys(base.network.state_dict(), found[-1], name)
    return found


def describe(config: Config, out: Path) -> Iterator[str]:
    """Say what memory a config needs, before anything is loaded; check it as ``run`` would and say what it will do.

    Computes and writes nothing.
    """
    yield from describe_memory(config)
    plan = check(config, out)
    finetune, evaluate, num = config.finetune, config.evaluate, len(plan.ranges)
    base, size = plan.base, plan.base.image_size
    yield f"base {config.base}: {num_parameters(base.network):,} parameters, {size} x {size}"
    yield f"data {config.data.source}: {len(plan.images):,} images"
    if plan.prompts:
        yield f"prompts: {len(plan.prompts):,}, guidance {config.text.guidance_scale:g}"
    yield (
        f"experts: {num} x {finetune.num_updates} updates of {finetune.batch_size * finetune.accumulation} images on "
        + ", ".join(map(str, plan.ranges))
        + (f"; baseline: {num * finetune.num_updates} updates" if finetune.baseline else "")
    )
    yield (
        f"search: {config.search.strategy}, up to "
        + ", then ".join(
            f"{level.num_candidates} x {len(level.seeds)} images of {level.num_steps or config.sample.num_steps} steps"
            for level in levels(config, len(config.search.checkpoints) or num)
        )
    )
    yield (
        f"evaluation: {evaluate.num_seed_sets} x {evaluate.num_images} images a model, {config.sample.sampler} "
        f"{config.sample.num_steps}, {', '.join(evaluate.metrics)}"
    )
    yield f"run folder: {out}"
