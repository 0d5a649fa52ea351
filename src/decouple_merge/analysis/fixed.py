"""Images and noise that are the same at every timestep and every point of a landscape."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Real
from torch import Tensor

from ..data.batches import model_input
from ..models.base import Base
from ..models.network import cast_inputs
from ..seeds import generator
from ..training.gradient import NoisyBatch, dtype_of
from .subject import Subject


@dataclass(frozen=True)
class FixedImages:
    """Clean images or latents, the noise that each of them gets, and the network's other inputs, [n, ...]."""

    base: Base
    x0: Float[Tensor, "n ..."]
    noise: Float[Tensor, "n ..."]
    condition: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.x0)

    def part(self, first: int, last: int) -> "FixedImages":
        """Take images first to last - 1."""
        condition = {name: value[first:last] for name, value in self.condition.items()}
        return FixedImages(self.base, self.x0[first:last], self.noise[first:last], condition)

    def batches(self, t: Real[Tensor, " n"], batch_size: int) -> Iterator[NoisyBatch]:
        """Mix each image with its noise at its timestep."""
        process = self.base.process
        for i in torch.arange(len(self)).split(batch_size):
            x0, noise = self.x0[i], self.noise[i]
            condition = {name: value[i] for name, value in self.condition.items()}
            yield NoisyBatch(process.mix(x0, noise, t[i]), t[i], process.target(x0, noise, t[i]), condition)


def fixed_images(subject: Subject, num: int) -> FixedImages:
    """Take the first training images, and draw latents and noise by the seed of the settings."""
    seed, dtype = subject.settings.seed, dtype_of(subject.base)
    x0, condition = model_input(subject.images(num), generator(seed, "analysis latents"))
    noise = torch.randn(x0.shape, generator=generator(seed, "analysis noise"))
    return FixedImages(subject.base, x0.to(dtype), noise.to(dtype), cast_inputs(condition, dtype))
