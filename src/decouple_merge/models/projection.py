"""Channel-wise projections P(F) = W·F (DeMe, section 3.2): attach to a network, fold away."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import UserError
from .family import Family


class ChannelProjection(nn.Module):
    """Multiply the channels of a feature map by W ∈ R^{C×C}, the identity at first, no bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(channels))

    def forward(self, feature_map: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        return nn.functional.conv2d(feature_map, self.weight[:, :, None, None].to(feature_map.dtype))


class _LeftMultiply(nn.Module):
    """Parametrise a kernel or bias K [C, ...] as W·K; kernel and bias of a layer share W."""

    def __init__(self, projection: ChannelProjection) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, kernel: Tensor) -> Tensor:
        return (
            (self.projection.weight @ kernel.flatten(1)).view_as(kernel)
            if kernel.dim() > 1
            else self.projection.weight @ kernel
        )


def check_placement(network: nn.Module, family: Family, placement: str) -> None:
    """Require that a network can have projections so placed.

    Raises:
        UserError: the placement is none of folded, trunk and none, or trunk for a transformer.
    """
    if placement not in ("folded", "trunk", "none"):
        raise UserError(f"projection placement is {placement!r}, expected folded, trunk or none")
    if placement == "trunk" and not family.trunk_channels(network):
        raise UserError(
            f"projection placement is trunk, the paper's layout for the feature maps of U-Nets, and the network is a "
            f"{type(network).__name__}; expected folded or none"
        )


def attach_projections(network: nn.Module, family: Family, placement: str) -> None:
    """Put a projection at the output of every block, in place; at the identity nothing changes.

    ``folded`` left-multiplies the kernel and bias of the block's output layer. ``trunk`` is the paper's layout:
    a layer after the block, on the trunk only, so that skips carry un-projected features. ``none`` does nothing.

    Raises:
        UserError: as ``check_placement``.
    """
    check_placement(network, family, placement)
    if placement == "trunk":
        for name, channels in family.trunk_channels(network).items():
            block: Any = network.get_submodule(name)
            block.projection = ChannelProjection(channels)
            block.register_forward_hook(_project_trunk)
    elif placement == "folded":
        for layer in family.output_layers(network).values():
            projection = ChannelProjection(layer.weight.shape[0])
            parametrize.register_parametrization(layer, "weight", _LeftMultiply(projection))
            if layer.bias is not None:
                parametrize.register_parametrization(layer, "bias", _LeftMultiply(projection))


def _project_trunk(block: Any, _: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (block.projection(output[0]), *output[1:])
    return block.projection(output)


def projection_parameters(network: nn.Module) -> list[nn.Parameter]:
    """List the matrices W, each once."""
    return [p for m in network.modules() if isinstance(m, ChannelProjection) for p in m.parameters()]


def folded_state_dict(network: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the weights without folded projections: W·K in place of K and W, under the stock keys.

    Args:
        network: a network with projections attached; not modified.
        parameters: values for its named parameters, for example their average.

    Returns:
        The stock keys; with the trunk placement also ``<block>.projection.weight``.
    """
    state = {**network.state_dict(), **parameters}
    folded = {}
    for key, value in state.items():
        if ".parametrizations." not in key:
            folded[key] = value
        elif key.endswith(".original"):
            layer, name = key.removesuffix(".original").split(".parametrizations.")
            matrix = state[f"{layer}.parametrizations.weight.0.projection.weight"]
            folded[f"{layer}.{name}"] = (
                (matrix @ value.flatten(1)).view_as(value) if value.dim() > 1 else matrix @ value
            )
    return folded
