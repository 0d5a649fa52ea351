"""The blocks of diffusers' U-Nets: which layer writes each one's output, and how many channels that has."""

from typing import Any

from torch import nn


def unet_blocks(network: Any) -> dict[str, Any]:
    """List down, mid and up blocks by name, in the order of the forward pass."""
    blocks = {f"down_blocks.{i}": b for i, b in enumerate(network.down_blocks)}
    if getattr(network, "mid_block", None) is not None:
        blocks["mid_block"] = network.mid_block
    return blocks | {f"up_blocks.{i}": b for i, b in enumerate(network.up_blocks)}


def unet_channels(network: Any) -> dict[str, int]:
    """Say the channels of each block's output."""
    widths = list(network.config.block_out_channels)
    channels = {f"down_blocks.{i}": w for i, w in enumerate(widths)}
    channels["mid_block"] = widths[-1]
    channels |= {f"up_blocks.{i}": w for i, w in enumerate(reversed(widths))}
    return {name: channels[name] for name in unet_blocks(network)}


def output_layer(block: Any) -> Any:
    """Find the layer that writes a block's output.

    That is the resampler's layer where there is one; else the output projection of the last attention or transformer
    where one comes last; else the last convolution of the last resnet's residual branch.
    """
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


def unet_output_layers(network: Any) -> dict[str, nn.Module]:
    """Find the layer that writes each block's output."""
    return {name: output_layer(block) for name, block in unet_blocks(network).items()}
