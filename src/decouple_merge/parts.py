"""The parts of a latent pipeline around its denoiser: whether they fit, the VAE, the text encoder."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

# Its class is known by name: importing it imports transformers, which takes seconds.
TEXT_TO_IMAGE = "StableDiffusionPipeline"
# Inputs of a UNet2DConditionModel that we have nothing to give for.
OTHER_INPUTS = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


@dataclass(frozen=True)
class Encoders:
    """The parts of a text-to-image pipeline around its denoiser, which stay on disk until they are loaded.

    Attributes:
        folder: the pipeline's.
        channels: of images.
        downscale: pixels of an image for each of its latents, along a side.
    """

    folder: Path
    channels: int
    downscale: int


def load_parts(folder: Path, *parts: str) -> Any:
    """Load a pipeline, and of a text-to-image one only the parts that are named."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    left_out = {}
    if index.get("_class_name") == TEXT_TO_IMAGE:
        left_out = {name: None for name, value in index.items() if isinstance(value, list) and name not in parts}
    return DiffusionPipeline.from_pretrained(folder, **left_out)


def find_encoders(name: str, folder: Path, network: Any) -> Encoders:
    """Read the configs of a text-to-image pipeline's other parts, and require that they fit the network."""
    found = {}
    for part, file in (("vae", "config"), ("text_encoder", "config"), ("tokenizer", "tokenizer_config")):
        path = folder / part / f"{file}.json"
        if not path.is_file():
            raise ValueError(f"base {name!r}: there is no {path}, expected {TEXT_TO_IMAGE} with all of its parts")
        found[part] = json.loads(path.read_text(encoding="utf-8"))
    vae, text_encoder, config = found["vae"], found["text_encoder"], network.config
    if vae.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"base {name!r}: its vae is {vae.get('_class_name')}, expected AutoencoderKL")
    for what, number, expected in (
        ("vae writes latents of {} channels, its unet reads {}", vae.get("latent_channels"), config.in_channels),
        (
            "text_encoder writes embeddings of width {}, its unet reads {}",
            text_encoder.get("hidden_size"),
            config.cross_attention_dim,
        ),
    ):
        if number != expected:
            raise ValueError(f"base {name!r}: its {what.format(number, expected)}; give parts that belong together")
    others = [key for key in OTHER_INPUTS if config.get(key) is not None]
    if others:
        raise ValueError(f"base {name!r}: its unet needs more than a text ({', '.join(others)}), which isn't supported")
    return Encoders(folder, vae["out_channels"], 2 ** (len(vae["block_out_channels"]) - 1))


def load_vae(encoders: Encoders, device: torch.device) -> Any:
    """Load the VAE of a text-to-image pipeline, in float32."""
    vae = load_parts(encoders.folder, "vae").vae.float().requires_grad_(False).eval().to(device)
    # Images one after the other: decoding takes far more memory than denoising.
    vae.enable_slicing()
    return vae


@torch.no_grad()
def encode_images(vae: Any, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 2 z hz wz"]:
    """Encode images in [-1, 1] to mean and log-variance of their latents, in the scale that the denoiser works in."""
    found, scale = vae.encode(images).latent_dist, vae.config.scaling_factor
    return torch.stack([found.mean * scale, found.logvar + 2 * math.log(scale)], 1)


@torch.no_grad()
def decode_latents(vae: Any, latents: Float[Tensor, "n z hz wz"]) -> Float[Tensor, "n c h w"]:
    """Decode latents to images, about in [-1, 1]."""
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def load_text_encoder(encoders: Encoders, device: torch.device) -> Any:
    """Load the tokenizer and the text encoder, as a pipeline without its other parts.

    Raises:
        ValueError: the tokenizer is another text encoder's.
    """
    pipeline = load_parts(encoders.folder, "tokenizer", "text_encoder")
    config, tokenizer = pipeline.text_encoder.config, pipeline.tokenizer
    for what, found, most in (
        ("has a vocabulary of", len(tokenizer), config.vocab_size),
        ("pads to a length of", tokenizer.model_max_length, config.max_position_embeddings),
    ):
        if found > most:
            raise ValueError(
                f"{encoders.folder}: its tokenizer {what} {found}, its text_encoder reads {most}; give parts that "
                "belong together"
            )
    pipeline.text_encoder.float().requires_grad_(False).eval()
    return pipeline.to(device)


@torch.no_grad()
def encode_texts(text_encoder: Any, texts: Sequence[str]) -> Float[Tensor, "n l d"]:
    """Encode texts as the pipeline itself does; what is longer than its text encoder reads is cut off."""
    return text_encoder.encode_prompt(list(texts), text_encoder.device, 1, do_classifier_free_guidance=False)[0]


def encoder_sha256(encoders: Encoders, *parts: str) -> str:
    """Hash the files of some parts of a text-to-image pipeline, configs included."""
    digest = hashlib.sha256()
    for path in sorted(p for part in parts for p in (encoders.folder / part).rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(encoders.folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
