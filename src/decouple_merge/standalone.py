"""The verbs that need no run: sample any model."""

from pathlib import Path

import torch

from .config import Sample, load_config
from .models import Base, load_base, load_network, new_network
from .plan import check, default_device
from .results import denoiser_of, write_images
from .sample import Denoiser, denoiser, sample_images, sampling_copy
from .tensors import PROJECTIONS_FILE


def open_model(model: str, device: torch.device) -> tuple[Base, Denoiser]:
    """Open a pipeline, or the ensemble of a run folder."""
    settings = Sample()
    if (Path(model) / "config.yaml").exists():
        plan = check(load_config(Path(model) / "config.yaml"), Path(model))
        return plan.base, denoiser_of(plan, "ensemble", device)
    base = load_base(model)
    if (Path(model) / PROJECTIONS_FILE).exists():
        network = new_network(base, "trunk")
        network.load_state_dict(load_network(Path(model)))
    else:
        network = base.network
    return base, denoiser(sampling_copy(network, settings, device))


def sample_model(model: str, out: Path, num_images: int, seed: int, num_steps: int, sampler: str) -> None:
    """Draw images from a pipeline, or from a run's ensemble, as ``<seed>.png``."""
    device = default_device()
    base, network = open_model(model, device)
    settings = Sample(sampler=sampler, num_steps=num_steps)
    seeds = list(range(seed, seed + num_images))
    write_images(sample_images(network, base, seeds, settings, device), seeds, out)
