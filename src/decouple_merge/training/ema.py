"""The exponential moving average of the trained parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..config import Ema
from ..executors.sharding import own_part


def ema_decay(update: int, max_decay: float, power: float) -> float:
    """Compute the EMA decay min(max_decay, 1 - (1 + s)^-power) of update s (0-based)."""
    return min(max_decay, 1 - (1 + update) ** -power)


class AveragedParameters:
    """Follow parameters with their exponential moving average, which starts at their values.

    Of parameters that are shared out among processes, each follows its part.

    Attributes:
        values: one for each parameter, in their order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: Ema) -> None:
        self.parameters, self.settings = parameters, settings
        self.values = [p.detach().clone() for p in parameters]

    def _data(self) -> list[Tensor]:
        # Asked for each time: an optimiser may give a parameter another tensor.
        return [own_part(p.data) for p in self.parameters]

    def _averages(self) -> list[Tensor]:
        return [own_part(value) for value in self.values]

    def follow(self, update: int) -> None:
        """Move the average towards the parameters after an update (0-based)."""
        decay = ema_decay(update, self.settings.max_decay, self.settings.power)
        torch._foreach_lerp_(self._averages(), self._data(), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the network with the average; the parameters get their own values back, bit for bit."""
        kept = [p.clone() for p in self._data()]
        torch._foreach_copy_(self._data(), self._averages())
        try:
            yield
        finally:
            torch._foreach_copy_(self._data(), kept)
