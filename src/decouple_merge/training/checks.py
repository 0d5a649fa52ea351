"""What a training's section asks of the machine and of the network, checked before anything is computed."""

import math
from importlib.util import find_spec

import torch

from ..config import Finetune, Training
from ..diffusion.timesteps import TimestepRange
from ..diffusion.weightings import check_weighting
from ..errors import UserError, not_installed
from ..executors.devices import check_memory
from ..models.base import Base
from ..models.lora import check_lora
from ..models.projection import check_placement
from ..models.ranges import clusters_of, ranges_of


def check_training(settings: Training, base: Base, device: torch.device) -> None:
    """Require that this machine has what a training asks for, and that the loss is defined on the base's schedule.

    Raises:
        UserError: the precision needs a GPU, the optimiser or the tracker isn't installed, the weighting has no finite
            weights, the schedule can't be cut into the clusters that are balanced, or memory can't hold a batch.
    """
    check_weighting(settings.weighting, settings.weighting_options, base.process)
    _check_clusters(settings, base, base.process.split(1))
    _check_precision(settings, device)
    _check_optimizer(settings)
    _check_sharding(settings)
    _check_compile(settings)
    _check_tracker(settings)
    # Images, noise and their mixture, in float32.
    check_memory("batch_size", settings.batch_size, 3 * 4 * math.prod(base.shape), device)


def check_finetune(settings: Finetune, base: Base, device: torch.device) -> None:
    """Require that a base's experts can be trained on this machine.

    Raises:
        UserError: as ``check_training``, or the network has no place for the projections or the adapters.
    """
    check_training(settings, base, device)
    if settings.global_prob == 0:
        _check_clusters(settings, base, ranges_of(base, settings))
    check_placement(base.network, base.family, settings.projection.placement)
    if settings.lora is not None:
        check_lora(base.network, settings.lora)


def _check_clusters(settings: Training, base: Base, ranges: list[TimestepRange]) -> None:
    """Require that each range can be cut into the clusters whose losses are balanced, if some are."""
    balancing = settings.balancing
    if balancing is None or not balancing.cuts_batches:
        return
    for own in ranges:
        clusters_of(base.process, own, balancing, balancing.num_clusters)


def _check_precision(settings: Training, device: torch.device) -> None:
    """Refuse fp16 training on a CPU, where it is slower than float32 and needs a scale that bf16 does not."""
    if settings.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision is fp16, which needs a GPU, and this machine has none: set it to bf16 or fp32")


def _check_optimizer(settings: Training) -> None:
    """Require that the optimiser is installed."""
    if settings.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise not_installed("optimizer adamw8bit", "bitsandbytes", "8bit", "set it to adamw")


def _check_sharding(settings: Training) -> None:
    """Refuse what needs whole tensors on each process, or was never tried on parts of them."""
    method = settings.balancing.method if settings.balancing else ""
    found = {
        "compile is true": settings.compile,
        f"optimizer is {settings.optimizer}": settings.optimizer != "adamw",
        "mixed_precision is fp16": settings.mixed_precision == "fp16",
        f"balancing is {method}": method in ("ant_nash", "pcgrad"),
    }
    if settings.sharding == "full" and any(found.values()):
        first = next(what for what, is_so in found.items() if is_so)
        raise UserError(f"sharding is full and {first}, which don't go together: change one of them")


def _check_compile(settings: Training) -> None:
    """Refuse several backward passes over one compiled forward pass, which frees what they need."""
    if settings.compile and settings.balancing is not None and settings.balancing.method in ("ant_nash", "pcgrad"):
        raise UserError(
            f"compile is true and balancing is {settings.balancing.method}, which takes a gradient for each cluster: "
            "set compile to false"
        )


def _check_tracker(settings: Training) -> None:
    """Require that the tracker is installed."""
    if settings.tracker == "none" or find_spec(settings.tracker) is not None:
        return
    if settings.tracker == "tensorboard":
        raise not_installed("tracker tensorboard", "tensorboard", "tensorboard", "set it to none")
    raise UserError(
        f"tracker is {settings.tracker}, which isn't installed: pip install {settings.tracker}, or set it to none"
    )
