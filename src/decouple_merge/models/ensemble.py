"""Several networks as one denoiser: a module that takes the place of a network in a stock diffusers pipeline."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.routing import Router
from ..errors import UserError
from ..merging.keys import check_same_keys
from ..storage.files import read_ahead

Shapes = dict[str, torch.Size]


class TimestepEnsemble(nn.Module):
    """Networks as one denoiser, which runs for t those that a router names (DeMe, Eq. 7).

    It is called as one of them is, and answers to what pipelines read of a network, so that it can take its place:
    ``pipeline.unet = ensemble``, or ``pipeline.transformer``. Dispatch is on t, never on the step's index, so that it
    is right for every sampler and number of steps. A batch may hold several t: every network that one of them asks for
    runs on the whole batch, and each image gets its own share of the outputs.

    Args:
        networks: by the router's numbers.
        router: says which networks run for a timestep, and with which shares.
        timestep_of: maps what a network is given as ``timestep`` to one that the router knows, ``Base.timestep_of``.
        weights: by the same numbers, tensors with the network's keys, on the CPU or memory-mapped. Then one network is
            in memory at a time: another's weights are copied over it when t asks for that one. Networks of one
            architecture are to be the same module. A sampler goes through the ranges once, so that a batch of images
            costs as many copies as there are ranges. Meanwhile the next one's files are read into the system's cache.

    Raises:
        UserError: there is another number of networks than the router names, or weights don't fit their network.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        router: Router,
        timestep_of: Callable[[Tensor], Tensor],
        weights: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        if not len(networks) == (len(networks) if weights is None else len(weights)) == router.num_networks:
            raise UserError(f"{len(networks)} networks for the {router.num_networks} of the router, expected one each")
        for index, tensors in enumerate(weights or ()):
            check_same_keys(networks[index].state_dict(), tensors, f"network {index}")
        self.networks, self.router, self.weights = nn.ModuleList(networks), router, weights
        self.timestep_of = timestep_of
        self.held: int | None = None
        self._shapes = {m: {k: p.shape for k, p in m.named_parameters()} for m in dict.fromkeys(networks)}
        if weights is not None:
            self._leave_only(networks[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the networks for ``timestep``, the second argument: a number, or a tensor [] or [batch].

        Raises:
            UserError: no range holds a timestep, or the parts of one image have several that ask for other networks.
        """
        timestep = self.timestep_of(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]))
        routes = {t: self.router.route(t) for t in timestep.unique().tolist()}
        # One that is held comes first: in a band two take turns at every step.
        asked = sorted({n for route in routes.values() for n, _ in route}, key=lambda n: (n != self.held, n))
        latest = min(routes)
        if len(asked) == 1:
            return self._network(asked[0], latest)(*args, **kwargs)
        if timestep.ndim > 1:
            raise UserError(
                f"found timesteps {tuple(timestep.shape)} that ask for {len(asked)} networks, expected one for each "
                "image"
            )
        each = [dict(routes[t]) for t in timestep.reshape(-1).tolist()]
        outputs = []
        for number in asked:
            share = torch.tensor([of.get(number, 0.0) for of in each], device=timestep.device)
            outputs.append((self._network(number, latest)(*args, **kwargs), share))
        return _mixed(outputs)

    def _network(self, number: int, t: int | float) -> nn.Module:
        if self.weights is not None and number != self.held:
            self._hold(number)
            if (after := self.router.following(t)) is not None:
                read_ahead(getattr(self.weights[after], "paths", ()))
        return self.networks[number]

    @torch.no_grad()
    def _hold(self, number: int) -> None:
        assert self.weights is not None
        # Stopped in the middle, the network is a mixture, and none is held.
        self.held, network = None, self.networks[number]
        self._leave_only(network)
        for key, value in network.state_dict().items():
            value.copy_(self.weights[number][key])
        self.held = number

    def _leave_only(self, network: nn.Module) -> None:
        """Give back the memory of all parameters but those of one network, which has room for them afterwards."""
        for module, shapes in self._shapes.items():
            for key, parameter in module.named_parameters():
                wanted = shapes[key] if module is network else torch.Size([0])
                if parameter.shape != wanted:
                    parameter.data = parameter.data.new_empty(wanted)

    # What the pipelines of diffusers read of a denoiser, in which all networks agree.
    @property
    def config(self) -> Any:
        return self.networks[0].config

    @property
    def in_channels(self) -> int:
        return self.config.in_channels

    @property
    def add_embedding(self) -> Any:
        return self.networks[0].add_embedding

    def cache_context(self, name: str, **step: Any) -> AbstractContextManager[None]:
        """Cache nothing between steps: the next one may be another network's."""
        return nullcontext()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _mixed(outputs: Sequence[tuple[Any, Tensor]]) -> Any:
    """Sum what networks put out, each image's by its shares [batch] or [1]: tensors, and lists with one for each image.

    Fields of an output may be both; what is neither is the first network's.
    """
    first = outputs[0][0]
    if isinstance(first, Tensor):
        total: Any = 0
        for found, share in outputs:
            factor = share.to(found.device).view(-1, *[1] * (found.dim() - 1))
            # What a network says of an image without a share may be NaN.
            total = total + torch.where(factor > 0, factor * found, 0)
        return total.to(first.dtype)
    if isinstance(first, list):
        return [
            _mixed([(found[i][None], share.expand(len(first))[i : i + 1]) for found, share in outputs])[0]
            for i in range(len(first))
        ]
    if isinstance(first, tuple):
        return tuple(_mixed([(found[i], share) for found, share in outputs]) for i in range(len(first)))
    if isinstance(first, Mapping):
        kind: Any = type(first)
        return kind(**{key: _mixed([(found[key], share) for found, share in outputs]) for key in first})
    return first
