"""Experts as teachers: what a merged model is pulled towards, each on its own range."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from ..diffusion.timesteps import TimestepRange, range_index
from ..merging.arithmetic import Tensors
from ..models.base import Base
from ..models.network import predict


@dataclass(frozen=True)
class Distillation:
    """A training that begins at a merge, and whose targets are the experts' outputs instead of the data's.

    L = ‖f_i(x_t, t) - f(x_t, t)‖² with i the expert whose range holds t: of the mixture of experts what one network of
    its size can hold (Hinton et al. 2015, for denoisers).

    Attributes:
        start: weights that the training begins with, under the base's keys.
        teachers: a network for each range, on the device of the training.
        made_from: says in records what start and teachers are.
    """

    start: Tensors
    teachers: Sequence[nn.Module]
    ranges: Sequence[TimestepRange]
    made_from: dict[str, Any]

    @torch.no_grad()
    def target(
        self, base: Base, x_t: Float[Tensor, "batch ..."], t: Real[Tensor, " batch"], condition: dict[str, Tensor]
    ) -> Float[Tensor, "batch ..."]:
        """Compute for each image what the expert of its timestep says of it; float32."""
        places = torch.tensor([range_index(list(self.ranges), each) for each in t.tolist()], device=t.device)
        target = torch.zeros_like(x_t, dtype=torch.float32)
        for index in places.unique().tolist():
            own = places == index
            inputs = {name: value[own] for name, value in condition.items()}
            target[own] = predict(base, self.teachers[index], x_t[own], t[own], **inputs).float()
        return target
