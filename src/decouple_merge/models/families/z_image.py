"""Z-Image: a transformer told 1 - σ, whose output is the negative velocity, on lists of latents and of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ...diffusion.timesteps import exact
from ..family import Encoders
from .flow_transformer import SizedByVae, as_vector
from .tiny import tiny_qwen_parts, tiny_vae

# Tokens of a text at most, as the pipeline's own default.
MAX_TOKENS = 512


class ZImage(SizedByVae):
    """ZImagePipeline. Its own guidance_scale is ours less 1: 0 is none."""

    pipelines = ("ZImagePipeline",)
    network = ZImageTransformer2DModel
    text_encoders = ("text_encoder",)

    def fits(self, config: Any, vae: dict[str, Any], texts: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        what = "text_encoder writes embeddings of width {}, its transformer reads {}"
        return [*super().fits(config, vae, texts), (what, texts[0].get("hidden_size"), config.cap_feat_dim)]

    def shape(self, network: Any, encoders: Encoders | None) -> tuple[int, ...]:
        assert encoders is not None
        assert encoders.latent_size is not None
        return network.config.in_channels, encoders.latent_size, encoders.latent_size

    @torch.no_grad()
    def encode_texts(self, pipeline: Any, texts: Sequence[str]) -> dict[str, Float[Tensor, "n ..."]]:
        """Encode texts, which have as many states as tokens; zeros fill them up, and a mask says which are theirs."""
        found, _ = pipeline.encode_prompt(list(texts), pipeline.device, do_classifier_free_guidance=False)
        rows = torch.stack([pad(states, (0, 0, 0, MAX_TOKENS - len(states))) for states in found])
        lengths = torch.tensor([len(states) for states in found])
        mask = torch.arange(MAX_TOKENS) < lengths[:, None]
        return {"cap_feats": rows, "cap_mask": mask.to(rows)}

    def predict(self, network: Any, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        texts = [row[mask > 0.5] for row, mask in zip(condition["cap_feats"], condition["cap_mask"], strict=True)]
        # Latents have a dimension of frames.
        output = network(list(x[:, :, None]), (1000 - as_vector(t)) / 1000, texts, return_dict=False)[0]
        return -torch.stack(list(output)).squeeze(2)

    def timestep_of(self, given: Tensor) -> Tensor:
        return (1 - exact(given)) * 1000

    def output_layers(self, network: Any) -> dict[str, Any]:
        """Find the last layer of each block's feed-forward branch."""
        groups = ("noise_refiner", "context_refiner", "layers")
        return {f"{g}.{i}": block.feed_forward.w2 for g in groups for i, block in enumerate(getattr(network, g))}

    def save_tiny(self, folder: Path) -> Path:
        return save_z_image(folder)


def tiny_z_image(**changes: Any) -> ZImageTransformer2DModel:
    """Build a ZImageTransformer2DModel for latents of 4 channels."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [1024, 16, 16],
    }
    return ZImageTransformer2DModel(**(arguments | changes))


def save_z_image(folder: Path, **scheduler: Any) -> Path:
    """Save a ZImagePipeline of random parts: 16×16 images, letters as vocabulary, shift 3."""
    from transformers import Qwen3Model

    torch.manual_seed(1)
    tokenizer, config = tiny_qwen_parts(16)
    vae: Any = tiny_vae(scaling_factor=0.36, shift_factor=0.12)
    pipeline: Any = diffusers.ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae.eval(),
        Qwen3Model(config).eval(),
        tokenizer,
        tiny_z_image(),
    )
    pipeline.save_pretrained(folder)
    return folder
