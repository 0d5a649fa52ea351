"""The verbs that need no run: sample any model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..config import Sample, Text, load_config
from ..data.prompts import load_prompts
from ..executors.devices import default_device
from ..executors.local import run_all, shares
from ..experiment.plan import check
from ..experiment.results import denoiser_of, write_images
from ..models.base import Base, load_base
from ..models.network import load_network, new_network
from ..storage.tensors import PROJECTIONS_FILE
from .sampler import Denoiser, Prompts, check_prompts, denoiser, sample_images, sampling_copy, seed_batches


def open_model(
    model: str, device: torch.device, seeds: range, settings: Sample, text: Text | None = None
) -> tuple[Base, Denoiser, Prompts | None]:
    """Open a pipeline, or the ensemble of a run folder, with the prompts for it.

    Args:
        seeds: of the images that are to be drawn; the first has the first prompt of a file.
        settings: in which precision the network samples, and whether it is compiled.
        text: prompts and guidance of a text-to-image model; what it doesn't set is a run's own.

    Raises:
        ValueError: the model is none, or is text-to-image and has no prompts, or has prompts and isn't.
    """
    text = text or Text()
    prompts = load_prompts(text)
    if (Path(model) / "config.yaml").exists():
        plan = check(load_config(Path(model) / "config.yaml"), Path(model))
        both = plan.config.text.model_copy(update=text.model_dump(include=text.model_fields_set))
        prompts = load_prompts(both) or plan.prompts
        found = _open_prompts(plan.base, prompts, both, device, seeds, seeds.start if text.prompts else 0)
        plan = replace(plan, config=plan.config.model_copy(update={"sample": settings}))
        return plan.base, denoiser_of(plan, "ensemble", device), found
    base = load_base(model)
    found = _open_prompts(base, prompts, text, device, seeds, seeds.start)
    if (Path(model) / PROJECTIONS_FILE).exists():
        network = new_network(base, "trunk")
        network.load_state_dict(load_network(Path(model)))
    else:
        network = base.network
    return base, denoiser(base, sampling_copy(network, settings, device)), found


def _open_prompts(
    base: Base, prompts: list[str], text: Text, device: torch.device, seeds: range, first_seed: int
) -> Prompts | None:
    check_prompts(base, bool(prompts))
    if base.encoders is None:
        return None
    return Prompts(base.encoders, prompts, text, device, first_seed=first_seed, seeds=seeds)


def sample_model(
    model: str,
    out: Path,
    num_images: int | None,
    seed: int,
    num_steps: int,
    sampler: str,
    text: Text | None = None,
    batch_size: int | None = None,
    num_processes: int = 1,
) -> None:
    """Draw images from a pipeline, or from a run's ensemble, as ``<seed>.png``.

    Args:
        num_images: where not given, one for each prompt of a text-to-image model.
        text: prompts and guidance of such a model; what it doesn't set is a run's own.
        num_processes: share the batches, each with the model in its memory; the images are those of one process.

    Raises:
        ValueError: as ``open_model``, or neither the number nor prompts are given.
    """
    num = num_images or _num_prompts(model, text)
    if num == 0:
        raise ValueError(f"{model}: no prompts say how many images there are; give --num-images, or --prompts")
    settings = Sample(sampler=sampler, num_steps=num_steps)
    if batch_size is not None:
        settings = settings.model_copy(update={"batch_size": batch_size})
    seeds = range(seed, seed + num)
    num_batches = len(seed_batches(seeds, settings.batch_size))
    calls = [(model, out, seeds, settings, text, share) for share in shares(num_batches, num_processes)]
    for _ in run_all(_draw, calls, num_processes):
        pass


def _num_prompts(model: str, text: Text | None) -> int:
    given = load_prompts(text or Text())
    if not given and (Path(model) / "config.yaml").exists():
        given = check(load_config(Path(model) / "config.yaml"), Path(model)).prompts
    return len(given)


def _draw(model: str, out: Path, seeds: range, settings: Sample, text: Text | None, share: slice) -> Iterator[int]:
    """Write the images of some batches; yields how many there are."""
    device = default_device()
    base, network, prompts = open_model(model, device, seeds, settings, text)
    names = [seed for batch in seed_batches(seeds, settings.batch_size)[share] for seed in batch]
    write_images(sample_images(network, base, seeds, settings, device, prompts=prompts, share=share), names, out)
    yield len(names)
