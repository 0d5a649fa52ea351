"""Draw images with any diffusers scheduler, from one network or from the ensemble of experts."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from .config import Sample
from .data import to_pixels
from .models import Base, make_scheduler, predict
from .timesteps import TimestepRange, check_ranges, range_index

Denoiser = Callable[[Tensor, Any], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sampling_copy(network: nn.Module, settings: Sample, device: torch.device) -> nn.Module:
    """Copy a network in the precision it will sample in, compiled where the settings ask for it."""
    copied = copy.deepcopy(network).to(device, DTYPES[settings.precision]).requires_grad_(False).eval()
    if settings.compile:
        copied.compile()
    return copied


def denoiser(network: nn.Module) -> Denoiser:
    """Wrap a network so that noisy images go in and its prediction comes out in float32."""
    dtype = next(network.parameters()).dtype
    return lambda x, t: predict(network, x.to(dtype), t).float()


def ensemble(networks: Sequence[nn.Module], ranges: Sequence[TimestepRange], num_train_timesteps: int) -> Denoiser:
    """Combine experts into one denoiser that runs the expert whose range holds t (DeMe, Eq. 7).

    Dispatch is on t, never on the step's index, so that it is right for every sampler and number of steps.

    Raises:
        ValueError: the ranges are no partition of [0, T), or their number is not that of the experts.
    """
    check_ranges(list(ranges), num_train_timesteps)
    if len(networks) != len(ranges):
        raise ValueError(f"{len(networks)} experts for {len(ranges)} ranges, expected one each")
    denoisers = [denoiser(network) for network in networks]
    # Some samplers visit fractional timesteps up to T - 1.
    return lambda x, t: denoisers[range_index(list(ranges), int(t))](x, t)


@torch.no_grad()
def sample_images(
    model: Denoiser,
    base: Base,
    seeds: Sequence[int],
    settings: Sample,
    device: torch.device,
    num_steps: int | None = None,
) -> Iterator[UInt8[Tensor, "batch c h w"]]:
    """Draw one image for each seed; yields uint8 batches in the order of the seeds.

    Image i depends only on seed i: initial and step noise come from a generator of its own. The last batch is
    filled up before it goes through the network, so that every image meets the same kernels; another batch size
    may pick others, which moves a value by rounding.

    Args:
        model: maps (x_t float32, t) to the network's prediction.
        num_steps: instead of the settings'.
    """
    shape = (base.channels, base.image_size, base.image_size)
    steps = num_steps or settings.num_steps
    size = min(settings.batch_size, len(seeds))
    for first in range(0, len(seeds), size):
        batch = list(seeds[first : first + size])
        padded = batch + batch[-1:] * (size - len(batch))
        generators = [torch.Generator().manual_seed(seed) for seed in padded]
        # Multistep samplers keep a history: each batch has its own scheduler.
        scheduler = make_scheduler(base, settings.sampler, steps, settings.timestep_spacing)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra: dict[str, Any] = {"generator": generators} if takes_generator else {}
        x = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            prediction = model(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(prediction, t, x, return_dict=False, **extra)[0]
        yield to_pixels(x[: len(batch)]).cpu()
