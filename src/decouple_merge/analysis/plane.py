"""The denoising loss on a plane of weights: the same images, noise and timesteps at every point."""

from collections.abc import Generator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..diffusion.losses import per_sample_mse
from ..merging.arithmetic import Tensors
from ..models.network import predict
from ..training.gradient import frozen_copy
from .fixed import FixedImages
from .subject import Progress, Subject


class Plane:
    """The loss at θ + a·d₁ + b·d₂ on each range.

    Every image has one timestep of each range; they are spread evenly over it.

    Args:
        origin: θ; its keys are the base's, and those of trunk projections.
        directions: d₁ and d₂, float32; a key that is missing is not moved.
    """

    def __init__(self, subject: Subject, origin: Tensors, directions: Sequence[Tensors], images: FixedImages) -> None:
        self.subject, self.images = subject, images
        self.network = frozen_copy(subject.base, [origin], subject.device)
        self.origin = {k: v.to(subject.device) for k, v in origin.items()}
        self.directions = [{k: v.to(subject.device) for k, v in d.items()} for d in directions]
        self.t = [subject.base.process.spread(own, len(images)) for own in subject.ranges]

    @torch.no_grad()
    def losses(self, a: float, b: float) -> Float[Tensor, " ranges"]:
        """Compute the mean of ‖target - f(x_t, t)‖² on each range at one point, float64."""
        first, second = self.directions
        for key, value in self.network.state_dict().items():
            moved = self.origin[key]
            for step, direction in ((a, first), (b, second)):
                if key in direction and step:
                    moved = moved + step * direction[key]
            value.copy_(moved)
        return torch.tensor([self._loss(t) for t in self.t], dtype=torch.float64)

    def _loss(self, t: Tensor) -> float:
        total, device = 0.0, self.subject.device
        for batch in self.images.batches(t, self.subject.batch_size):
            condition = {name: value.to(device) for name, value in batch.condition.items()}
            output = predict(self.subject.base, self.network, batch.x_t.to(device), batch.t.to(device), **condition)
            total += float(per_sample_mse(output, batch.target.to(device)).cpu().double().sum())
        return total / len(t)

    def grid(
        self, name: str, key: str, axis: np.ndarray, done: int, total: int
    ) -> Generator[Progress, None, Float[Tensor, "a b ranges"]]:
        """Compute the losses at every point of a grid; yields how far the analysis is.

        Args:
            key: of the parts that are kept, one for each row.
            axis: the values of a, and of b.
            done, total: points of the analysis, before this grid and of all.
        """
        rows = []
        for index, a in enumerate(axis):
            yield Progress(name, done + index * len(axis), total)
            rows.append(self.subject.kept.tensor(f"{key}-{index:03}", self._row, float(a), axis))
        return torch.stack(rows)

    def _row(self, a: float, axis: np.ndarray) -> Tensor:
        return torch.stack([self.losses(a, float(b)) for b in axis])


def draw_shares(subject: Subject) -> np.ndarray:
    """Say what share of the training's draws each range has, by which the loss over all timesteps is their mean."""
    shares = np.array([subject.base.process.share(own) for own in subject.ranges])
    return shares / shares.sum()
