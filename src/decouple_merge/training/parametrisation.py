"""How a network is parametrised while it is trained: by all its weights, or by adapters beside them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..config import Finetune, Lora, Projection, Training
from ..models.base import Base
from ..models.lora import attach_lora, lora_factors, unadapted_state_dict, without_lora
from ..models.network import new_network
from ..models.projection import folded_state_dict, projection_parameters

Tensors = dict[str, Tensor]


class AllWeights:
    """All weights are trained, and with them channel projections: folded into layers, on the trunk, or none."""

    def __init__(self, projection: Projection) -> None:
        self.projection = projection

    def network(self, base: Base) -> nn.Module:
        """Copy the base's network, on the CPU, and attach what is trained; its output is the base's at first."""
        return new_network(base, self.projection.placement)

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """List what is trained in groups, each with the ``scale`` of its learning rate."""
        scaled = {id(p): p for p in projection_parameters(network)}
        others = [p for p in network.parameters() if p.requires_grad and id(p) not in scaled]
        groups = [
            {"params": others, "scale": 1.0},
            {"params": list(scaled.values()), "scale": self.projection.learning_rate_scale},
        ]
        return [g for g in groups if g["params"]]

    def teacher(self, base: Base, network: nn.Module) -> nn.Module:
        """Make a copy of the base's network, on the CPU, that stays what it is."""
        return new_network(base).requires_grad_(False).eval()

    def stock_weights(self, network: nn.Module, parameters: Tensors) -> Tensors:
        """Compute the weights under the base's keys, with other values of the trained parameters."""
        return folded_state_dict(network, parameters)

    def adapter(self, base: Base, network: nn.Module, parameters: Tensors) -> Tensors:
        """Name the factors of the adapter: there is none."""
        return {}


class LowRank:
    """Only the factors of low-rank adapters are trained; the teacher is the same network without them.

    Args:
        key: of the random stream that the factors are drawn from.
    """

    def __init__(self, lora: Lora, *key: int | str) -> None:
        self.lora, self.key = lora, key

    def network(self, base: Base) -> nn.Module:
        """Copy the base's network, on the CPU, and put adapters beside its layers, which change nothing yet."""
        network = new_network(base)
        attach_lora(network, self.lora, *self.key)
        return network

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """List what is trained, all with the same learning rate."""
        return [{"params": [p for p in network.parameters() if p.requires_grad], "scale": 1.0}]

    def teacher(self, base: Base, network: nn.Module) -> Callable[..., Any]:
        """Make a function that calls the network without its adapters."""

        def bare(*args: Any, **kwargs: Any) -> Any:
            network.eval()
            with without_lora(network):
                output = network(*args, **kwargs)
            network.train()
            return output

        return bare

    def stock_weights(self, network: nn.Module, parameters: Tensors) -> Tensors:
        """Compute the weights under the base's keys, with other values of the trained parameters."""
        return unadapted_state_dict(network, parameters)

    def adapter(self, base: Base, network: nn.Module, parameters: Tensors) -> Tensors:
        """Name the factors as diffusers loads them, with other values of the trained parameters."""
        return lora_factors(network, base.family, parameters)


Parametrisation = AllWeights | LowRank


def parametrisation_of(settings: Training, name: str, seed: int) -> Parametrisation:
    """Choose the parametrisation that a training's settings ask for; a base from nothing has its weights alone."""
    if not isinstance(settings, Finetune):
        return AllWeights(Projection(placement="none"))
    if settings.lora is not None:
        return LowRank(settings.lora, seed, name, "lora")
    return AllWeights(settings.projection)
