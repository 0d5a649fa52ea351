"""The parts of a latent pipeline around its denoiser: whether they fit, the VAE, the text encoders, the classes."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

# The text encoders of each latent pipeline; one without is told a class. They are known by name: importing them imports
# transformers, which takes seconds.
LATENT: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
    "DiTPipeline": (),
}
# Inputs of a UNet2DConditionModel that we have nothing to give for.
OTHER_INPUTS = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
# SDXL's: heights and widths of the original and of the target, and where it was cut.
NUM_SIZES = 6


@dataclass(frozen=True)
class Encoders:
    """The parts of a latent pipeline around its denoiser, which stay on disk until they are loaded.

    Attributes:
        folder: the pipeline's.
        channels: of images.
        image_size: height and width of images.
        text_encoders: by their names in the pipeline.
        is_sized: the denoiser is also told the size of the original image and how it was cut (Podell et al. 2023).
        zeros_for_empty: the empty text has embeddings of zeros, as SDXL was trained.
        classes: of a class-conditional pipeline, name or number to class; the empty text is the null class, by which
            classes are dropped in training and which guidance leads away from.
    """

    folder: Path
    channels: int
    image_size: int
    text_encoders: tuple[str, ...] = ("text_encoder",)
    is_sized: bool = False
    zeros_for_empty: bool = False
    classes: dict[str, int] | None = None

    @property
    def text_parts(self) -> list[str]:
        """List text encoders and tokenizers."""
        return [part for name in self.text_encoders for part in (_tokenizer_of(name), name)]


def _tokenizer_of(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def read_index(folder: Path) -> dict[str, Any]:
    """Read a pipeline's model_index.json; empty where there is none."""
    path = folder / "model_index.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_parts(folder: Path, *parts: str) -> Any:
    """Load a pipeline, and of a latent one only the parts that are named."""
    index, left_out = read_index(folder), {}
    if index.get("_class_name") in LATENT:
        left_out = {name: None for name, value in index.items() if isinstance(value, list) and name not in parts}
    return DiffusionPipeline.from_pretrained(folder, **left_out)


def find_encoders(name: str, folder: Path, network: Any) -> Encoders:
    """Read the configs of a latent pipeline's other parts, and require that they fit the network."""
    index, config = read_index(folder), network.config
    kind = index["_class_name"]
    texts = LATENT[kind]

    def read(part: str, file: str = "config") -> dict[str, Any]:
        path = folder / part / f"{file}.json"
        if not path.is_file():
            raise ValueError(f"base {name!r}: there is no {path}, expected {kind} with all of its parts")
        return json.loads(path.read_text(encoding="utf-8"))

    vae, text_configs = read("vae"), [read(text) for text in texts]
    for text in texts:
        read(_tokenizer_of(text), "tokenizer_config")
    if vae.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"base {name!r}: its vae is {vae.get('_class_name')}, expected AutoencoderKL")
    is_sized = config.get("addition_embed_type") == "text_time"
    others = [key for key in OTHER_INPUTS if config.get(key) is not None]
    if is_sized != (len(texts) == 2) or config.get("addition_embed_type") not in (None, "text_time"):
        others.append("addition_embed_type")
    if others:
        raise ValueError(f"base {name!r}: its unet needs other inputs than {kind}'s: {', '.join(others)}")
    reader = "unet" if texts else "transformer"
    fits = [
        (
            f"vae writes latents of {{}} channels, its {reader} reads {{}}",
            vae.get("latent_channels"),
            config.in_channels,
        )
    ]
    if texts:
        width = sum(c.get("hidden_size", 0) for c in text_configs)
        what = f"{' + '.join(texts)} writes embeddings of width {{}}, its unet reads {{}}"
        fits.append((what, width, config.cross_attention_dim))
    if is_sized:
        width = config.projection_class_embeddings_input_dim - NUM_SIZES * config.addition_time_embed_dim
        found = text_configs[-1].get("projection_dim")
        fits.append((f"{texts[-1]} writes pooled embeddings of width {{}}, its unet reads {{}}", found, width))
    for what, number, expected in fits:
        if number != expected:
            raise ValueError(f"base {name!r}: its {what.format(number, expected)}; give parts that belong together")
    size = config.sample_size * vae_downscale(vae)
    zeros = bool(index.get("force_zeros_for_empty_prompt"))
    classes = None if texts else _classes(config.num_embeds_ada_norm, index.get("id2label") or {})
    return Encoders(folder, vae["out_channels"], size, texts, is_sized, zeros, classes)


def _classes(num_classes: int, names: dict[str, str]) -> dict[str, int]:
    # The row after the classes' is the null class. The stock pipeline says 1000 for it, whatever their number.
    numbered = {str(i): i for i in range(num_classes)} | {"": num_classes}
    return numbered | {name.strip(): int(i) for i, several in names.items() for name in several.split(",")}


def check_classes(encoders: Encoders, texts: Iterable[str]) -> None:
    """Require of a class-conditional pipeline that texts are its classes.

    Raises:
        ValueError: one is not.
    """
    classes = encoders.classes
    unknown = [] if classes is None else sorted(set(texts) - classes.keys())
    if classes is not None and unknown:
        names = [name for name in classes if name and not name.isdecimal()]
        near = difflib.get_close_matches(unknown[0], names) or names[:3]
        known = f", or a name such as {', '.join(map(repr, near))}" if names else ""
        raise ValueError(
            f"{encoders.folder} has no class {', '.join(map(repr, unknown[:5]))}; expected a number below "
            f"{classes['']}{known}"
        )


def vae_downscale(config: Any) -> int:
    """Compute from the config of a VAE how many pixels along a side are one of its latents."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def create_vae(arguments: dict[str, Any], seed: int) -> Any:
    """Make an untrained AutoencoderKL from diffusers' own arguments.

    Raises:
        ValueError: diffusers doesn't accept the arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoencoderKL(**arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"pretrain.vae.model: {error}") from error


def load_vae(encoders: Encoders, device: torch.device) -> Any:
    """Load the VAE of a latent pipeline, in float32: SDXL's overflows in fp16, and ends in NaN."""
    vae = load_parts(encoders.folder, "vae").vae.float().requires_grad_(False).eval().to(device)
    # Images one after the other: decoding takes far more memory than denoising.
    vae.enable_slicing()
    return vae


def _scaling(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Find shift and scale of each channel: a denoiser works on (latents - shift)·scale."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        mean, deviation = [0.0], [1.0]
    shift, spread = (like.new_tensor(value)[:, None, None] for value in (mean, deviation))
    return shift, vae.config.scaling_factor / spread


@torch.no_grad()
def encode_images(vae: Any, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 2 z hz wz"]:
    """Encode images in [-1, 1] to mean and log-variance of their latents, in the scale that the denoiser works in."""
    found = vae.encode(images).latent_dist
    shift, scale = _scaling(vae, found.mean)
    return torch.stack([(found.mean - shift) * scale, found.logvar + 2 * scale.log()], 1)


@torch.no_grad()
def decode_latents(vae: Any, latents: Float[Tensor, "n z hz wz"]) -> Float[Tensor, "n c h w"]:
    """Decode latents to images, about in [-1, 1]."""
    shift, scale = _scaling(vae, latents)
    return vae.decode(latents / scale + shift, return_dict=False)[0]


def load_text_encoders(encoders: Encoders, device: torch.device) -> Any:
    """Load tokenizers and text encoders, as a pipeline without its other parts.

    Raises:
        ValueError: a tokenizer is another text encoder's.
    """
    pipeline = load_parts(encoders.folder, *encoders.text_parts)
    for name in encoders.text_encoders:
        config, tokenizer = getattr(pipeline, name).config, getattr(pipeline, _tokenizer_of(name))
        for what, found, most in (
            ("has a vocabulary of", len(tokenizer), config.vocab_size),
            ("pads to a length of", tokenizer.model_max_length, config.max_position_embeddings),
        ):
            if found > most:
                raise ValueError(
                    f"{encoders.folder}: its {_tokenizer_of(name)} {what} {found}, its {name} reads {most}; give parts "
                    "that belong together"
                )
        getattr(pipeline, name).float().requires_grad_(False).eval()
    return pipeline.to(device)


@torch.no_grad()
def encode_texts(pipeline: Any, texts: Sequence[str]) -> dict[str, Float[Tensor, "n ..."]]:
    """Encode texts as the pipeline itself does; what is longer than its text encoders read is cut off.

    Returns:
        The denoiser's inputs by their names: encoder_hidden_states [n, l, d], and of SDXL text_embeds [n, d], pooled.
        The empty text is what the pipeline takes where no negative prompt is given.
    """
    arguments = {"device": pipeline.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = pipeline.encode_prompt(list(texts), **arguments)
    rows = {"encoder_hidden_states": found[0]}
    if len(found) > 2:
        rows["text_embeds"] = found[2]
    if pipeline.config.get("force_zeros_for_empty_prompt"):
        for row in rows.values():
            row[[i for i, text in enumerate(texts) if not text]] = 0
    return rows


def encoder_sha256(encoders: Encoders, *parts: str) -> str:
    """Hash the files of some parts of a latent pipeline, configs included."""
    digest = hashlib.sha256()
    for path in sorted(p for part in parts for p in (encoders.folder / part).rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(encoders.folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
