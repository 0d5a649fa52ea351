"""Stable Diffusion XL: told the states of two text encoders, a pooled one, and how the image was cut."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from .stable_diffusion import StableDiffusion, tiny_text_unet
from .tiny import tiny_text_parts, tiny_vae

# Heights and widths of the original and of the target, and where it was cut.
NUM_SIZES = 6
ADDED_INPUTS = ("text_embeds", "time_ids")


class StableDiffusionXL(StableDiffusion):
    """StableDiffusionXLPipeline."""

    pipelines = ("StableDiffusionXLPipeline",)
    text_encoders = ("text_encoder", "text_encoder_2")
    addition_embed_type = "text_time"
    sizes_input = "time_ids"

    def fits(self, config: Any, vae: dict[str, Any], texts: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        width = config.projection_class_embeddings_input_dim - NUM_SIZES * config.addition_time_embed_dim
        what = f"{self.text_encoders[-1]} writes pooled embeddings of width {{}}, its unet reads {{}}"
        return [*super().fits(config, vae, texts), (what, texts[-1].get("projection_dim"), width)]

    @torch.no_grad()
    def encode_texts(self, pipeline: Any, texts: Sequence[str]) -> dict[str, Float[Tensor, "n ..."]]:
        states, _, pooled, _ = self.encode_prompt(pipeline, texts)
        rows = {"encoder_hidden_states": states, "text_embeds": pooled}
        if pipeline.config.get("force_zeros_for_empty_prompt"):
            for row in rows.values():
                row[[i for i, text in enumerate(texts) if not text]] = 0
        return rows

    def predict(self, network: Any, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        added = {name: condition[name] for name in ADDED_INPUTS}
        others = {name: value for name, value in condition.items() if name not in added}
        return network(x, t, return_dict=False, **others, added_cond_kwargs=added)[0]

    def save_tiny(self, folder: Path) -> Path:
        return save_sdxl(folder)


def tiny_sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    """Build a UNet2DConditionModel with SDXL's inputs: two text encoders' states, pooled embeddings, sizes."""
    arguments: dict[str, Any] = {
        "cross_attention_dim": 16 + 24,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    }
    return tiny_text_unet(**(arguments | changes))


def save_sdxl(
    folder: Path,
    unet: UNet2DConditionModel | None = None,
    pooled_width: int = 20,
    zeros: bool = True,
    vae: dict[str, Any] | None = None,
    **scheduler: Any,
) -> Path:
    """Save a StableDiffusionXLPipeline of random parts: 16×16 images, letters as vocabulary, T = 40."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    tokenizer, first = tiny_text_parts(folder, 16, num_hidden_layers=2)
    # As OpenCLIP's, it is padded with another token than CLIP's.
    tokenizer_2, second = tiny_text_parts(folder, 24, num_hidden_layers=2, projection_dim=pooled_width)
    tokenizer_2.pad_token = "a"
    arguments = {"num_train_timesteps": 40, "beta_schedule": "scaled_linear", "steps_offset": 1}
    autoencoder: Any = tiny_vae(**(vae or {}))
    pipeline: Any = diffusers.StableDiffusionXLPipeline(
        autoencoder.eval(),
        CLIPTextModel(first).eval(),
        CLIPTextModelWithProjection(second).eval(),
        tokenizer,
        tokenizer_2,
        unet or tiny_sdxl_unet(),
        EulerDiscreteScheduler(**(arguments | scheduler)),
        force_zeros_for_empty_prompt=zeros,
    )
    pipeline.save_pretrained(folder)
    return folder
