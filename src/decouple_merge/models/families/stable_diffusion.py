"""Stable Diffusion: a UNet2DConditionModel on latents, told the states of one text encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from ...errors import UserError
from ..family import Encoders
from ..unet_blocks import unet_channels, unet_output_layers
from .latent import Latent
from .tiny import tiny_text_parts, tiny_vae

# Inputs of a UNet2DConditionModel that there is nothing to give for.
OTHER_INPUTS = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


class StableDiffusion(Latent):
    """StableDiffusionPipeline.

    Attributes:
        addition_embed_type: what the network is told besides.
    """

    pipelines: tuple[str, ...] = ("StableDiffusionPipeline",)
    network = UNet2DConditionModel
    component = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    addition_embed_type: str | None = None

    def fits(self, config: Any, vae: dict[str, Any], texts: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        width = sum(text.get("hidden_size", 0) for text in texts)
        what = f"{' + '.join(self.text_encoders)} writes embeddings of width {{}}, its unet reads {{}}"
        return [*super().fits(config, vae, texts), (what, width, config.cross_attention_dim)]

    def other_inputs(self, config: Any) -> list[str]:
        others = [key for key in OTHER_INPUTS if config.get(key) is not None]
        differs = config.get("addition_embed_type") != self.addition_embed_type
        return [*others, "addition_embed_type"] if differs else others

    @torch.no_grad()
    def encode_texts(self, pipeline: Any, texts: Sequence[str]) -> dict[str, Float[Tensor, "n ..."]]:
        return {"encoder_hidden_states": self.encode_prompt(pipeline, texts)[0]}

    def encode_prompt(self, pipeline: Any, texts: Sequence[str]) -> tuple[Any, ...]:
        """Have the pipeline encode texts, without guidance."""
        arguments = {"device": pipeline.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        return pipeline.encode_prompt(list(texts), **arguments)

    def output_layers(self, network: Any) -> dict[str, Any]:
        return unet_output_layers(network)

    def trunk_channels(self, network: Any) -> dict[str, int]:
        return unet_channels(network)

    def usage(self, encoders: Encoders | None) -> tuple[str, str]:
        return "text-to-image", 'pipeline("a prompt", num_inference_steps=50).images[0].save("image.png")'

    def save_tiny(self, folder: Path) -> Path:
        return save_stable_diffusion(folder)


def create_pipeline(model: dict[str, Any], scheduler: dict[str, Any], parts: dict[str, Any]) -> Any:
    """Make an untrained UNet2DConditionModel in a StableDiffusionPipeline from diffusers' own arguments.

    Args:
        parts: vae, tokenizer and text_encoder; the channels of latents and the width of texts are theirs.
    """
    channels, width = parts["vae"].config.latent_channels, parts["text_encoder"].config.hidden_size
    own = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": width}
    if twice := [key for key in own if key in model]:
        raise UserError(f"{twice[0]} is {model[twice[0]]!r}, which the VAE and the text encoder decide: leave it out")
    network = UNet2DConditionModel(**model, **own)
    return diffusers.StableDiffusionPipeline(
        **parts,
        unet=network,
        scheduler=PNDMScheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_text_unet(**changes: Any) -> UNet2DConditionModel:
    """Build a UNet2DConditionModel of some ten thousand parameters, for latents of 4 channels and 8×8."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(arguments | changes))


def save_stable_diffusion(
    folder: Path,
    unet: UNet2DConditionModel | None = None,
    width: int = 16,
    latent_channels: int = 4,
    parts_dtype: torch.dtype = torch.float32,
    vocabulary_size: int | None = None,
    **scheduler: Any,
) -> Path:
    """Save a StableDiffusionPipeline of random parts: 16×16 images, letters as vocabulary, T = 40."""
    # Imported here, since this takes seconds that who draws nothing needn't pay.
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    tokenizer, text_config = tiny_text_parts(folder, width, vocabulary_size)
    vae: Any = tiny_vae(latent_channels)
    arguments = {"num_train_timesteps": 40, "beta_schedule": "scaled_linear", "steps_offset": 1, "skip_prk_steps": True}
    pipeline: Any = diffusers.StableDiffusionPipeline(
        vae.eval().to(parts_dtype),
        CLIPTextModel(text_config).eval().to(parts_dtype),
        tokenizer,
        unet or tiny_text_unet(),
        PNDMScheduler(**(arguments | scheduler)),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
