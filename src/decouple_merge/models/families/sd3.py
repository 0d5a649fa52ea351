"""Stable Diffusion 3 and 3.5: a transformer on latents, told the states of three text encoders and two pooled ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor

from .flow_transformer import FlowTransformer, as_vector, last_linear
from .tiny import tiny_t5_parts, tiny_text_parts, tiny_vae


class StableDiffusion3(FlowTransformer):
    """StableDiffusion3Pipeline. Its T5, the third text encoder, may be missing: zeros stand for its states."""

    pipelines = ("StableDiffusion3Pipeline",)
    network = SD3Transformer2DModel
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_text_encoders = ("text_encoder_3",)

    def fits(self, config: Any, vae: dict[str, Any], texts: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        pooled = sum(text.get("projection_dim", 0) for text in texts[:2])
        what = "text_encoder + text_encoder_2 writes pooled embeddings of width {}, its transformer reads {}"
        found = [*super().fits(config, vae, texts), (what, pooled, config.pooled_projection_dim)]
        if len(texts) > 2:
            what = "text_encoder_3 writes embeddings of width {}, its transformer reads {}"
            found.append((what, texts[2].get("d_model"), config.joint_attention_dim))
        return found

    def num_tokens(self, network: Any, shape: tuple[int, ...]) -> int:
        return (shape[-2] // network.config.patch_size) * (shape[-1] // network.config.patch_size)

    @torch.no_grad()
    def encode_texts(self, pipeline: Any, texts: Sequence[str]) -> dict[str, Float[Tensor, "n ..."]]:
        states, _, pooled, _ = pipeline.encode_prompt(
            list(texts), None, None, device=pipeline.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def predict(self, network: Any, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(hidden_states=x, timestep=as_vector(t), return_dict=False, **condition)[0]

    def output_layers(self, network: Any) -> dict[str, Any]:
        """Find the last layer of each block's feed-forward branch."""
        return {f"transformer_blocks.{i}": last_linear(b.ff.net) for i, b in enumerate(network.transformer_blocks)}

    def save_tiny(self, folder: Path) -> Path:
        return save_sd3(folder)


def tiny_sd3(**changes: Any) -> SD3Transformer2DModel:
    """Build an SD3Transformer2DModel for latents of 4 channels and 8×8."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 40,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**(arguments | changes))


def save_sd3(folder: Path, has_t5: bool = True, **scheduler: Any) -> Path:
    """Save a StableDiffusion3Pipeline of random parts: 16×16 images, letters as vocabulary, shift 3.

    Args:
        has_t5: one without a T5 stock diffusers loads only where it is told that there is none.
    """
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    torch.manual_seed(1)
    tokenizer, first = tiny_text_parts(folder, 16, num_hidden_layers=2, projection_dim=16)
    tokenizer_2, second = tiny_text_parts(folder, 24, num_hidden_layers=2, projection_dim=24)
    tokenizer_3, third = tiny_t5_parts(48)
    vae: Any = tiny_vae(scaling_factor=1.5, shift_factor=0.06)
    pipeline: Any = diffusers.StableDiffusion3Pipeline(
        tiny_sd3(),
        FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae.eval(),
        CLIPTextModelWithProjection(first).eval(),
        tokenizer,
        CLIPTextModelWithProjection(second).eval(),
        tokenizer_2,
        T5EncoderModel(third).eval() if has_t5 else None,
        tokenizer_3 if has_t5 else None,
    )
    pipeline.save_pretrained(folder)
    return folder
