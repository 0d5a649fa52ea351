"""Channel-wise projections P(F) = W·F (DeMe, section 3.2): attach to a network, fold away."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize


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


def _blocks(network: Any) -> dict[str, Any]:
    """List down, mid and up blocks, or those of a transformer, by name, in the order of the forward pass."""
    if hasattr(network, "transformer_blocks"):
        return {f"transformer_blocks.{i}": b for i, b in enumerate(network.transformer_blocks)}
    blocks = {f"down_blocks.{i}": b for i, b in enumerate(network.down_blocks)}
    if getattr(network, "mid_block", None) is not None:
        blocks["mid_block"] = network.mid_block
    return blocks | {f"up_blocks.{i}": b for i, b in enumerate(network.up_blocks)}


def output_layer(block: Any) -> Any:
    """Find the layer that writes a block's output.

    That is the resampler's layer where there is one; else the output projection of the last attention or transformer
    where one comes last; else the last convolution of the last resnet's residual branch. Of a transformer's block it is
    the last layer of the feed-forward branch.
    """
    if hasattr(block, "ff"):
        return next(layer for layer in reversed(block.ff.net) if isinstance(layer, nn.Linear))
    for resampler in reversed(
        [*(getattr(block, "downsamplers", None) or []), *(getattr(block, "upsamplers", None) or [])]
    ):
        layer = getattr(resampler, "conv", None)
        if isinstance(layer, nn.Conv2d):
            return layer
        if isinstance(getattr(resampler, "conv2", None), nn.Conv2d):
            return resampler.conv2
    attentions = list(getattr(block, "attentions", None) or [])
    # The mid block runs resnet, attention, resnet; the others end in attention.
    if attentions and len(attentions) == len(block.resnets):
        if hasattr(attentions[-1], "to_out"):
            return attentions[-1].to_out[0]
        if hasattr(attentions[-1], "proj_out"):
            return attentions[-1].proj_out
    return block.resnets[-1].conv2


def check_placement(network: nn.Module, placement: str) -> None:
    """Require that a network can have projections so placed.

    Raises:
        ValueError: the placement is none of folded, trunk and none, or trunk for a transformer.
    """
    if placement not in ("folded", "trunk", "none"):
        raise ValueError(f"projection placement is {placement!r}, expected folded, trunk or none")
    if placement == "trunk" and hasattr(network, "transformer_blocks"):
        raise ValueError(
            f"projection placement is trunk, the paper's layout for the feature maps of U-Nets, and the network is a "
            f"{type(network).__name__}; expected folded or none"
        )


def attach_projections(network: nn.Module, placement: str) -> None:
    """Put a projection at the output of every block, in place; at the identity nothing changes.

    ``folded`` left-multiplies the kernel and bias of the block's output layer. ``trunk`` is the paper's layout:
    a layer after the block, on the trunk only, so that skips carry un-projected features. ``none`` does nothing.

    Raises:
        ValueError: as ``check_placement``.
    """
    check_placement(network, placement)
    if placement == "none":
        return
    for name, block in _blocks(network).items():
        if placement == "trunk":
            block.projection = ChannelProjection(_block_channels(network)[name])
            block.register_forward_hook(_project_trunk)
            continue
        layer = output_layer(block)
        projection = ChannelProjection(layer.weight.shape[0])
        parametrize.register_parametrization(layer, "weight", _LeftMultiply(projection))
        if layer.bias is not None:
            parametrize.register_parametrization(layer, "bias", _LeftMultiply(projection))


def _block_channels(network: Any) -> dict[str, int]:
    widths = list(network.config.block_out_channels)
    channels = {f"down_blocks.{i}": w for i, w in enumerate(widths)}
    channels["mid_block"] = widths[-1]
    return channels | {f"up_blocks.{i}": w for i, w in enumerate(reversed(widths))}


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
