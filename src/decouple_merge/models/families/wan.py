"""Wan 2.1 and 2.2: one transformer on latents of videos, or two that share the noise levels; images are one frame."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor, nn

from ...diffusion.timesteps import TimestepRange
from ...errors import UserError
from ..family import Encoders, load_parts
from .flow_transformer import SizedByVae, as_vector, last_linear
from .tiny import tiny_umt5_parts

# Tokens of a text, as many as the pipeline itself asks for.
MAX_TOKENS = 512


class Wan(SizedByVae):
    """WanPipeline. Wan 2.2's ``transformer`` is for t >= 1000·boundary_ratio, its ``transformer_2`` for the rest.

    Together they are one denoiser, a function of x and t, and stay two in what is written. The denoiser's inputs and
    outputs here have no axis of frames: it is added where a network or the VAE is called.
    """

    pipelines = ("WanPipeline",)
    network = WanTransformer3DModel
    second_component = "transformer_2"
    text_encoders = ("text_encoder",)
    vae = "AutoencoderKLWan"
    has_even_levels = False
    # The side of 480p, at which the first of these models were trained.
    default_size = 480

    def joined(self, name: str, networks: dict[str, Any], index: dict[str, Any]) -> Any:
        first, second = networks[self.component], networks.get("transformer_2")
        ratio = index.get("boundary_ratio")
        if index.get("expand_timesteps"):
            raise UserError(
                f"base {name!r} has expand_timesteps, a timestep for each token, as Wan 2.2's 5B model takes it, which "
                "is not supported; expected a text-to-video model of Wan 2.1, or of Wan 2.2 with two transformers"
            )
        if (second is None) != (ratio is None):
            found = "no transformer_2" if second is None else "a transformer_2 that is never used"
            raise UserError(
                f"base {name!r} has the boundary_ratio {ratio} in model_index.json and {found}; expected both, as Wan "
                "2.2 has them, or none, as Wan 2.1"
            )
        if second is None:
            return first
        if not (isinstance(ratio, int | float) and 0 < ratio < 1):
            raise UserError(f"base {name!r}: its boundary_ratio is {ratio!r}, expected a number between 0 and 1")
        differing = [key for key in first.config if _setting(first, key) != _setting(second, key)]
        if differing:
            raise UserError(
                f"base {name!r}: {differing[0]} of its transformer is {first.config[differing[0]]!r}, of its "
                f"transformer_2 {second.config.get(differing[0])!r}; expected two of one architecture"
            )
        return TwoTransformers(first, second, float(ratio))

    def turns(self, pipeline: Any) -> dict[str, TimestepRange]:
        ratio, num = pipeline.config.get("boundary_ratio"), pipeline.scheduler.config.num_train_timesteps
        if ratio is None:
            return {}
        edge = ratio * num
        return {"transformer_2": TimestepRange(0, edge), "transformer": TimestepRange(edge, num)}

    def parted(self, network: Any) -> dict[str, Any]:
        if isinstance(network, TwoTransformers):
            return {"transformer": network.transformer, "transformer_2": network.transformer_2}
        return {self.component: network}

    def fits(self, config: Any, vae: dict[str, Any], texts: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        reads = "its transformer reads {}"
        return [
            (f"vae writes latents of {{}} channels, {reads}", vae.get("z_dim", 16), config.in_channels),
            (f"text_encoder writes states of width {{}}, {reads}", texts[0].get("d_model"), config.text_dim),
        ]

    def other_inputs(self, config: Any) -> list[str]:
        return [key for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len") if config.get(key) is not None]

    def downscale(self, vae: dict[str, Any]) -> int:
        return vae.get("scale_factor_spatial", 8)

    def shape(self, network: Any, encoders: Encoders | None) -> tuple[int, ...]:
        assert encoders is not None
        assert encoders.latent_size is not None
        return network.config.in_channels, encoders.latent_size, encoders.latent_size

    def num_tokens(self, network: Any, shape: tuple[int, ...]) -> int | None:
        # The pipeline tells its scheduler nothing.
        return None

    def posterior(self, vae: Any, images: Float[Tensor, "n c h w"]) -> tuple[Tensor, Tensor]:
        found = vae.encode(images[:, :, None]).latent_dist
        return found.mean.squeeze(2), found.logvar.squeeze(2)

    def reconstruct(self, vae: Any, latents: Float[Tensor, "n z hz wz"]) -> Float[Tensor, "n c h w"]:
        return vae.decode(latents[:, :, None], return_dict=False)[0].squeeze(2)

    def load_texts(self, folder: Path, parts: Sequence[str]) -> Any:
        return load_parts(folder, *parts)

    @torch.no_grad()
    def encode_texts(self, pipeline: Any, texts: Sequence[str]) -> dict[str, Float[Tensor, "n ..."]]:
        states, _ = pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS, device=pipeline.device
        )
        return {"encoder_hidden_states": states}

    def predict(self, network: Any, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        output = network(hidden_states=x[:, :, None], timestep=as_vector(t), return_dict=False, **condition)[0]
        return output.squeeze(2)

    def output_layers(self, network: Any) -> dict[str, Any]:
        """Find the last layer of each block's feed-forward branch."""
        found: dict[str, Any] = {}
        for name, each in self.parted(network).items():
            prefix = f"{name}." if isinstance(network, TwoTransformers) else ""
            found |= {f"{prefix}blocks.{i}": last_linear(block.ffn.net) for i, block in enumerate(each.blocks)}
        return found

    def usage(self, encoders: Encoders | None) -> tuple[str, str]:
        size = encoders.image_size if encoders else self.default_size
        call = f'pipeline("a prompt", height={size}, width={size}, num_frames=1, output_type="pil")'
        return "text-to-video", f'{call}.frames[0][0].save("image.png")'

    def save_tiny(self, folder: Path) -> Path:
        return save_wan(folder)


def _setting(network: Any, key: str) -> Any:
    return None if key.startswith("_") else network.config.get(key)


class TwoTransformers(nn.Module):
    """Two transformers as one denoiser: each image goes through the one that its timestep belongs to.

    Args:
        transformer: for t >= 1000·boundary_ratio, much noise.
        transformer_2: for the timesteps below.
    """

    # A backward pass may leave one of the two out.
    has_unused_parameters = True

    def __init__(self, transformer: Any, transformer_2: Any, boundary_ratio: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.boundary = 1000 * boundary_ratio

    @property
    def config(self) -> Any:
        """What both have in common."""
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again for the backward pass."""
        for each in (self.transformer, self.transformer_2):
            each.enable_gradient_checkpointing()

    def forward(
        self,
        hidden_states: Float[Tensor, "n c f h w"],
        timestep: Float[Tensor, " n"],
        encoder_hidden_states: Float[Tensor, "n l d"],
        **others: Any,
    ) -> tuple[Tensor]:
        """Run a network on the images that are its, of which there may be none."""
        is_noisy = timestep >= self.boundary
        output: Tensor | None = None
        for network, own in ((self.transformer, is_noisy), (self.transformer_2, ~is_noisy)):
            if not own.any():
                continue
            found = network(hidden_states[own], timestep[own], encoder_hidden_states[own], **others)[0]
            output = found.new_zeros(len(own), *found.shape[1:]) if output is None else output
            output = output.index_put((own,), found)
        assert output is not None
        return (output,)


def tiny_wan(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """Build a WanTransformer3DModel for latents of 4 channels."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**(arguments | changes))


def save_wan(
    folder: Path, boundary_ratio: float | None = 0.875, scheduler: Any = None, transformer_2: Any = None
) -> Path:
    """Save a WanPipeline of random parts: 16×16 images, letters as vocabulary, shift 3.

    Args:
        boundary_ratio: None saves one transformer, as Wan 2.1 has.
        scheduler: where another than Euler's is wanted.
        transformer_2: where another than a random one is wanted.
    """
    from transformers import UMT5EncoderModel

    second = None if boundary_ratio is None else transformer_2 or tiny_wan(1)
    first = tiny_wan()
    torch.manual_seed(1)
    tokenizer, config = tiny_umt5_parts(16)
    vae: Any = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 1.0, 2.0],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    pipeline: Any = diffusers.WanPipeline(
        tokenizer,
        UMT5EncoderModel(config).eval(),
        vae.eval(),
        scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        first,
        second,
        boundary_ratio=boundary_ratio,
    )
    pipeline.save_pretrained(folder)
    path = folder / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 16}))
    return folder
