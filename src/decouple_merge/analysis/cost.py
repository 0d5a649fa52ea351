"""What analyses will cost, from how long one batch takes."""

import time
from dataclasses import dataclass

import torch

from ..diffusion.timesteps import TimestepRange
from ..models.network import predict
from ..seeds import generator
from ..training.gradient import frozen_copy, loss_and_gradients, noisy_batch, with_leaves
from .duration import duration
from .subject import Cost, Subject

# What nobody minds to wait for an estimate.
MOMENT_SECONDS = 3.0


@dataclass(frozen=True)
class Speed:
    """Seconds that the network takes for one image."""

    forward_seconds: float
    backward_seconds: float

    def seconds(self, cost: Cost) -> float:
        """Estimate how long an analysis takes."""
        return cost.num_forward * self.forward_seconds + cost.num_backward * self.backward_seconds


def measure_speed(subject: Subject) -> Speed:
    """Time one image with gradients and one without; a whole batch, too, where that takes no more than a moment."""
    first = _measure(subject, 1)
    if (first.forward_seconds + first.backward_seconds) * subject.batch_size > MOMENT_SECONDS:
        return first
    return _measure(subject, subject.batch_size)


def _measure(subject: Subject, size: int) -> Speed:
    base, device = subject.base, subject.device
    everything = TimestepRange(0, base.num_train_timesteps)
    batch = noisy_batch(base, subject.images(size), everything, generator("speed"))
    network = frozen_copy(base, [], device)
    tensors, leaves = with_leaves({k: v.to(device) for k, v in base.network.state_dict().items()})
    x, t = batch.x_t.to(device), batch.t.to(device)
    condition = {name: value.to(device) for name, value in batch.condition.items()}

    @torch.no_grad()
    def forward() -> None:
        float(predict(base, network, x, t, **condition).sum())

    def backward() -> None:
        loss_and_gradients(base, network, tensors, leaves, batch, torch.ones(1), device)

    seconds = []
    for call in (forward, backward):
        call()
        started = time.monotonic()
        call()
        seconds.append((time.monotonic() - started) / size)
    return Speed(*seconds)


def describe(name: str, cost: Cost, speed: Speed) -> str:
    """Say in one line what an analysis will cost."""
    parts = [f"{cost.num_backward:,} images with gradients"] if cost.num_backward else []
    parts += [f"{cost.num_forward:,} images through the network"] if cost.num_forward else []
    parts += [f"{cost.num_bytes / 1e9:.2g} GB"] if cost.num_bytes else []
    return f"{name}: {', '.join([*parts, f'about {duration(speed.seconds(cost))}'])}"
