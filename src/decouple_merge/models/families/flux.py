"""FLUX.1: a transformer on packed latents, told σ, T5's states, CLIP's pooled one, and where distilled a guidance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor

from ...diffusion.timesteps import exact
from ..family import Encoders
from .flow_transformer import SizedByVae, as_vector, last_linear
from .tiny import tiny_t5_parts, tiny_text_parts, tiny_vae

# What a guidance-distilled network is told in training, as diffusers' own scripts do.
TRAINING_GUIDANCE = 3.5


class Flux(SizedByVae):
    """FluxPipeline. A guidance-distilled one, dev, is told ``text.guidance_scale``; schnell has no guidance."""

    pipelines = ("FluxPipeline",)
    network = FluxTransformer2DModel
    text_encoders = ("text_encoder", "text_encoder_2")
    guidance = "embedded"

    def guidance_of(self, config: Any) -> str | None:
        return self.guidance if config.guidance_embeds else None

    def fits(self, config: Any, vae: dict[str, Any], texts: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        pooled, states = texts[0].get("hidden_size"), texts[1].get("d_model")
        reads = "its transformer reads {}"
        return [
            (f"vae writes latents of {{}} channels, {reads}", vae.get("latent_channels"), _channels(config)),
            (f"text_encoder writes a pooled state of width {{}}, {reads}", pooled, config.pooled_projection_dim),
            (f"text_encoder_2 writes states of width {{}}, {reads}", states, config.joint_attention_dim),
        ]

    def shape(self, network: Any, encoders: Encoders | None) -> tuple[int, ...]:
        assert encoders is not None
        assert encoders.latent_size is not None
        return _channels(network.config), encoders.latent_size, encoders.latent_size

    @torch.no_grad()
    def encode_texts(self, pipeline: Any, texts: Sequence[str]) -> dict[str, Float[Tensor, "n ..."]]:
        states, pooled, _ = pipeline.encode_prompt(list(texts), device=pipeline.device)
        rows = {"encoder_hidden_states": states, "pooled_projections": pooled}
        is_told = pipeline.transformer.config.guidance_embeds
        return rows | ({"guidance": torch.full((len(texts),), TRAINING_GUIDANCE)} if is_told else {})

    def predict(self, network: Any, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        states = condition["encoder_hidden_states"]
        output = network(
            hidden_states=pack(x),
            timestep=as_vector(t) / 1000,
            img_ids=positions(height // 2, width // 2).to(x),
            txt_ids=torch.zeros(states.shape[1], 3).to(states),
            return_dict=False,
            **condition,
        )[0]
        return unpack(output, height, width)

    def timestep_of(self, given: Tensor) -> Tensor:
        # Stock pipelines round it to the network's dtype. A step on an edge is to stay in the range above.
        lost = torch.finfo(given.dtype).eps / 2 if given.dtype in (torch.bfloat16, torch.float16) else 0.0
        return exact(given) * (1 + lost) * 1000

    def output_layers(self, network: Any) -> dict[str, Any]:
        """Find the last layer of each block: of its feed-forward branch, or of both branches at once."""
        double = {f"transformer_blocks.{i}": last_linear(b.ff.net) for i, b in enumerate(network.transformer_blocks)}
        single = {f"single_transformer_blocks.{i}": b.proj_out for i, b in enumerate(network.single_transformer_blocks)}
        return double | single

    def save_tiny(self, folder: Path) -> Path:
        return save_flux(folder)


def _channels(config: Any) -> int:
    return config.in_channels // 4


def pack(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens d"]:
    """Make a token of each 2×2 latents: channels outermost, then rows, then columns."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Float[Tensor, "n tokens d"], height: int, width: int) -> Float[Tensor, "n c h w"]:
    """Invert ``pack``."""
    n, _, channels = tokens.shape
    cut = tokens.reshape(n, height // 2, width // 2, channels // 4, 2, 2)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(n, channels // 4, height, width)


def positions(height: int, width: int) -> Float[Tensor, "tokens 3"]:
    """List for each token 0, its row and its column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def tiny_flux(**changes: Any) -> FluxTransformer2DModel:
    """Build a FluxTransformer2DModel with embedded guidance, for latents of 4 channels."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    return FluxTransformer2DModel(**(arguments | changes))


def save_flux(folder: Path, transformer: FluxTransformer2DModel | None = None, **scheduler: Any) -> Path:
    """Save a FluxPipeline of random parts: 16×16 images, letters as vocabulary, a shift by the number of tokens."""
    from transformers import CLIPTextModel, T5EncoderModel

    torch.manual_seed(1)
    tokenizer, first = tiny_text_parts(folder, 16)
    tokenizer_2, second = tiny_t5_parts(32)
    vae: Any = tiny_vae(scaling_factor=0.36, shift_factor=0.12)
    pipeline: Any = diffusers.FluxPipeline(
        FlowMatchEulerDiscreteScheduler(**({"shift": 3.0, "use_dynamic_shifting": True} | scheduler)),
        vae.eval(),
        CLIPTextModel(first).eval(),
        tokenizer,
        T5EncoderModel(second).eval(),
        tokenizer_2,
        transformer or tiny_flux(),
    )
    pipeline.save_pretrained(folder)
    return folder
