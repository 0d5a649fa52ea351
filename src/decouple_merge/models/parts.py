"""The parts of a pipeline around its denoiser: the VAE, the text encoders, the classes."""

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from ..config import Text
from ..errors import UserError, is_ours
from ..storage.tensors import check_finite
from .family import Encoders, load_parts, tokenizer_of


def check_classes(encoders: Encoders, texts: Iterable[str]) -> None:
    """Require of a class-conditional pipeline that texts are its classes.

    Raises:
        UserError: one is not.
    """
    classes = encoders.classes
    unknown = [] if classes is None else sorted(set(texts) - classes.keys())
    if classes is not None and unknown:
        names = [name for name in classes if name and not name.isdecimal()]
        near = difflib.get_close_matches(unknown[0], names) or names[:3]
        known = f", or a name such as {', '.join(map(repr, near))}" if names else ""
        raise UserError(
            f"{encoders.folder} has no class {', '.join(map(repr, unknown[:5]))}; expected a number below "
            f"{num_classes(classes)}{known}"
        )


def num_classes(classes: dict[str, int]) -> int:
    """Count the classes of a class-conditional pipeline, without the null class."""
    return len({number for name, number in classes.items() if name})


def check_caption_dropout(encoders: Encoders, caption_dropout: float) -> None:
    """Require that no caption is dropped where the network has nothing to put in its place.

    Raises:
        UserError: as said.
    """
    if caption_dropout and encoders.classes and encoders.guidance is None:
        raise UserError(
            f"data.caption_dropout is {caption_dropout:g}, which puts a null class in the place of classes, and the "
            f"{encoders.family.network.__name__} of {encoders.folder} has none: set it to 0"
        )


def texts_to_encode(encoders: Encoders, prompts: Sequence[str], settings: Text) -> list[str]:
    """List what a model is told to draw prompts: them, and what guidance leads away from.

    Raises:
        UserError: one is no class of a class-conditional model, or there is guidance and nothing to lead away from.
    """
    texts = list(prompts)
    if encoders.guidance == "classifier-free":
        texts.append(settings.negative_prompt)
    elif encoders.guidance is None and settings.guidance_scale != 1:
        raise UserError(
            f"text.guidance_scale is {settings.guidance_scale:g}, which leads away from a null class, and the "
            f"{encoders.family.network.__name__} of {encoders.folder} has none: set it to 1"
        )
    if settings.negative_prompt and encoders.guidance != "classifier-free":
        raise UserError(
            f"text.negative_prompt is {settings.negative_prompt!r}, which {encoders.folder} isn't guided away from: "
            "leave it out"
        )
    check_classes(encoders, texts)
    return texts


def vae_downscale(config: Any) -> int:
    """Compute from the config of a VAE how many pixels along a side are one of its latents."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def create_vae(arguments: dict[str, Any], seed: int) -> Any:
    """Make an untrained AutoencoderKL from diffusers' own arguments.

    Raises:
        UserError: diffusers doesn't accept the arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoencoderKL(**arguments)
        except (TypeError, ValueError) as error:
            if is_ours(error):
                raise
            raise UserError(f"pretrain.vae.model: {error}") from error


def load_vae(encoders: Encoders, device: torch.device) -> Any:
    """Load the VAE of a latent pipeline, in float32: SDXL's overflows in fp16, and ends in NaN."""
    vae = load_parts(encoders.folder, "vae").vae.float().requires_grad_(False).eval()
    check_finite(vae.state_dict(), encoders.folder / "vae")
    vae.to(device)
    # Images one after the other: decoding takes far more memory than denoising.
    vae.enable_slicing()
    return vae


def load_text_encoders(encoders: Encoders, device: torch.device) -> Any:
    """Load tokenizers and text encoders, as a pipeline without its other parts.

    Raises:
        UserError: a tokenizer is another text encoder's.
    """
    pipeline = encoders.family.load_texts(encoders.folder, encoders.text_parts)
    for name in encoders.text_encoders:
        config, tokenizer = getattr(pipeline, name).config, getattr(pipeline, tokenizer_of(name))
        pairs = [("has a vocabulary of", len(tokenizer), config.vocab_size)]
        # The pipelines pad the texts of others to a length of their own.
        if config.model_type.startswith("clip"):
            pairs.append(("pads to a length of", tokenizer.model_max_length, config.max_position_embeddings))
        for what, found, most in pairs:
            if found > most:
                raise UserError(
                    f"{encoders.folder}: its {tokenizer_of(name)} {what} {found}, its {name} reads {most}; give parts "
                    "that belong together"
                )
        getattr(pipeline, name).float().requires_grad_(False).eval()
        check_finite(getattr(pipeline, name).state_dict(), encoders.folder / name)
    return pipeline.to(device)


def encoder_sha256(encoders: Encoders, *parts: str) -> str:
    """Hash the files of some parts of a latent pipeline, configs included."""
    digest = hashlib.sha256()
    for path in sorted(p for part in parts for p in (encoders.folder / part).rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(encoders.folder)).encode())
        stat = path.stat()
        digest.update(_file_sha256(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@cache
def _file_sha256(path: Path, size: int, mtime_ns: int) -> bytes:
    """Hash a file, once for as long as it is the same by size and time: several records want it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
