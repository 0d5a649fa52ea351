"""UNet2DModel on pixels, alone or told a class: DDPMPipeline, DDIMPipeline, PNDMPipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor

from ...errors import UserError
from ...merging.card import EXAMPLE, TASK
from ..family import Encoders, Family
from ..unet_blocks import unet_channels, unet_output_layers
from .unet_pruning import fill_narrow, narrow_network

# Of a base from nothing.
SCHEDULERS: dict[str, Any] = {
    "DDPMScheduler": DDPMScheduler,
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
}


class UNet(Family):
    """A UNet2DModel and a scheduler.

    One with ``num_class_embeds`` is told a class; the captions of its data are its classes' numbers. It has no null
    class, so that there is no guidance and no caption is dropped. No pipeline of diffusers draws with it: where it is
    exported its UNet2DModel takes ``class_labels``.
    """

    pipelines = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
    network = UNet2DModel
    component = "unet"
    flows = "too"

    def find_encoders(self, name: str, folder: Path, network: Any) -> Encoders | None:
        config = network.config
        if config.class_embed_type is not None:
            raise UserError(
                f"base {name!r}: its unet has class_embed_type {config.class_embed_type!r}, expected none: classes are "
                "numbers below num_class_embeds"
            )
        if config.num_class_embeds is None:
            return None
        channels, _, side = self.shape(network, None)
        classes = {str(i): i for i in range(config.num_class_embeds)}
        return Encoders(self, folder, channels, side, classes=classes)

    def output_layers(self, network: Any) -> dict[str, Any]:
        return unet_output_layers(network)

    def trunk_channels(self, network: Any) -> dict[str, int]:
        return unet_channels(network)

    def narrow(self, network: Any, keep: float) -> Any:
        return narrow_network(network, keep)

    def fill_narrow(self, network: Any, narrow: Any, products: Mapping[str, Tensor]) -> None:
        fill_narrow(network, narrow, products)

    def usage(self, encoders: Encoders | None) -> tuple[str, str]:
        if encoders is None:
            return TASK, EXAMPLE
        return (
            "class-conditional-image-generation",
            "# No pipeline of diffusers draws classes with a UNet2DModel: in the scheduler's loop, for each x and t,\n"
            "prediction = pipeline.unet(x, t, class_labels=torch.tensor([0])).sample",
        )

    def save_tiny(self, folder: Path) -> Path:
        pipeline: Any = DDPMPipeline(tiny_unet(), DDPMScheduler(num_train_timesteps=40))
        pipeline.save_pretrained(folder)
        return folder


def create_pipeline(model: dict[str, Any], scheduler: dict[str, Any]) -> Any:
    """Make an untrained UNet2DModel in a DDPMPipeline from diffusers' own arguments.

    Args:
        scheduler: those of a DDPMScheduler, or of the flow's where ``_class_name`` says so.
    """
    arguments = dict(scheduler)
    name = arguments.pop("_class_name", "DDPMScheduler")
    if name not in SCHEDULERS:
        raise UserError(f"_class_name is {name!r}, expected one of {', '.join(SCHEDULERS)}")
    # It samples flows as they are: of a scheduler it asks for timesteps and steps alone.
    return DDPMPipeline(UNet2DModel(**model), SCHEDULERS[name](**arguments))


def tiny_unet(**changes: Any) -> UNet2DModel:
    """Build a UNet2DModel of a few thousand parameters, 8×8 grey unless told otherwise."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**(arguments | changes))
