"""The one adapter to transformers: image encoders whose features are measured, and the text part of a CLIP."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError, is_ours, not_installed
from ..storage.tensors import hash_tensors


def resize_pillow(x: Float[Tensor, "n c h w"], side: int) -> Float[Tensor, "n c {side} {side}"]:
    """Resize bicubically with antialiasing as Pillow does uint8 images: rows, then columns, each rounded to levels."""
    for size in [(x.shape[2], side), (side, side)]:
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255).round()
    return x


def resize_plain(x: Float[Tensor, "n c h w"], side: int) -> Float[Tensor, "n c {side} {side}"]:
    """Resize bicubically without antialiasing, by torch's cubic; values may leave [0, 255]."""
    return x if x.shape[2:] == (side, side) else F.interpolate(x, (side, side), mode="bicubic")


class Kind(NamedTuple):
    """A family of encoders: transformers' names of its models, and how images are given to them.

    Attributes:
        side: images are resized to this, None: to what the model's config says.
        mean, std: of the pixels in [0, 1], by channel, where the model's preprocessor_config.json doesn't say.
        part: of a model of several parts.
    """

    model_types: tuple[str, ...]
    example: str
    resize: Callable[[Tensor, int], Tensor]
    side: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    part: str = ""


# As the programs do it that published the numbers: of Stein et al. 2023 for DINOv2, of Jayasumana et al. 2024 for the
# CMMD on CLIP; the CLIP score is taken on images resized as CLIP's authors do.
ENCODERS = {
    "dinov2": Kind(
        ("dinov2", "dinov2_with_registers"),
        "facebook/dinov2-large",
        resize_pillow,
        224,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    ),
    "clip": Kind(
        ("clip", "clip_vision_model"),
        "openai/clip-vit-large-patch14-336",
        resize_plain,
        None,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        "vision",
    ),
}
ENCODERS["clip_text"] = ENCODERS["clip"]._replace(
    model_types=("clip",), example="laion/CLIP-ViT-g-14-laion2B-s12B-b42K", resize=resize_pillow
)


class Encoder(nn.Module):
    """Map uint8 images to the features of a pretrained vision transformer.

    Features are the normalised class token of a DINOv2, and the projected image embedding of a CLIP, not normalised.

    Attributes:
        width: of the features.
        sha256: of the network's tensors and of what pixels are normalised by.
    """

    def __init__(self, kind: Kind, network: Any) -> None:
        super().__init__()
        self.kind, self.network = kind, network.float().requires_grad_(False).eval()
        self.side = kind.side or network.config.image_size
        self.is_clip = hasattr(network, "visual_projection")
        self.width = network.config.projection_dim if self.is_clip else network.config.hidden_size
        normalisation = [("mean", torch.tensor(kind.mean)), ("std", torch.tensor(kind.std))]
        self.sha256 = hash_tensors([*sorted(network.state_dict().items()), *normalisation])

    def forward(self, images: UInt8[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n d"]]:
        """Resize to a square, normalise, encode.

        Raises:
            UserError: the images have neither one nor three channels.
        """
        if images.shape[1] not in (1, 3):
            raise UserError(f"images have {images.shape[1]} channels, expected 3 (RGB) or 1 (grey): convert them")
        x = self.kind.resize(images.float(), self.side).expand(-1, 3, -1, -1)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.kind.mean, self.kind.std))
        output = self.network(pixel_values=(x / 255 - mean) / std)
        return {"features": output.image_embeds if self.is_clip else output.pooler_output}


class TextEncoder(nn.Module):
    """Map texts to the projected text embeddings of a CLIP, in the space of its image embeddings.

    Attributes:
        sha256: of the network's tensors.
    """

    def __init__(self, network: Any, tokenizer: Any) -> None:
        super().__init__()
        self.network, self.tokenizer = network.float().requires_grad_(False).eval(), tokenizer
        self.sha256 = hash_tensors(sorted(network.state_dict().items()))

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Tokenise and encode; of what is longer than the model reads, the end is cut off. Not normalised."""
        limit = self.network.config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        tokens = tokens.to(self.network.device)
        return self.network(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds


def load_encoder(name: str, path: str) -> Encoder:
    """Load an encoder of ``ENCODERS`` by folder or hub name, from safetensors.

    Raises:
        UserError: there is no such model, it is of another family, or its files are damaged or lack weights.
    """
    kind = ENCODERS[name]
    network = _load(kind, path, "CLIPVisionModelWithProjection" if kind.part else "AutoModel")
    transformers = import_transformers("an encoder of dinov2 or clip")
    try:
        found, _ = transformers.ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:
        found = {}
    mean, std = found.get("image_mean", kind.mean), found.get("image_std", kind.std)
    return Encoder(kind._replace(mean=tuple(mean), std=tuple(std)), network)


def load_text_encoder(path: str) -> TextEncoder:
    """Load the text part of a CLIP by folder or hub name, from safetensors, with its tokenizer.

    Raises:
        UserError: as ``load_encoder``, or the tokenizer is missing or another model's.
    """
    kind = ENCODERS["clip_text"]._replace(part="text")
    network = _load(kind, path, "CLIPTextModelWithProjection")
    try:
        tokenizer = import_transformers("an encoder of dinov2 or clip").AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if is_ours(error):
            raise
        raise UserError(f"clip {path}: its tokenizer can't be loaded ({_first_line(error)}); expected one") from error
    # Where there are no files, transformers makes a tokenizer that knows no words.
    if len(tokenizer) != network.config.vocab_size:
        raise UserError(
            f"clip {path}: its tokenizer has a vocabulary of {len(tokenizer)}, its text part reads "
            f"{network.config.vocab_size}; give files that belong together"
        )
    return TextEncoder(network, tokenizer)


def import_transformers(who: str) -> Any:
    """Import transformers, silenced; ``who`` needs it is said where it isn't installed."""
    # Imported when it is asked for: it takes seconds.
    try:
        import transformers
    except ImportError as error:
        raise not_installed(who, "transformers", "text") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _load(kind: Kind, path: str, cls: str) -> Any:
    transformers = import_transformers("an encoder of dinov2 or clip")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        if config.model_type not in kind.model_types:
            raise UserError(f"it is a {config.model_type}")
        if config.model_type == "clip":
            # Many published files state the width of the embedding right only here, outside of the parts.
            part = getattr(config, f"{kind.part}_config")
            part.projection_dim = config.projection_dim
            config = part
        network, info = getattr(transformers, cls).from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"its files lack {len(missing)} weights, first {missing[0]}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if is_ours(error):
            raise
        raise UserError(
            f"{'clip' if kind.part else 'dinov2'} {path}: can't be loaded ({_first_line(error)}); expected a "
            f"{' or '.join(kind.model_types)} model of transformers with safetensors weights, such as {kind.example}"
        ) from error
    return network


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
