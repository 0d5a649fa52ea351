"""Images and texts in one space: what a small text encoder is trained by, and what says if an image shows its text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..storage.files import atomic_path, read_tensors, write_tensors
from ..storage.reading import looked_for
from .text_encoders import load_text_parts, tokenize

WEIGHTS = "image_text.safetensors"


class ImageTextModel(nn.Module):
    """Images and texts as unit vectors, where an image is near to its caption (CLIP, Radford et al. 2021).

    The image side is a small perceptron on numbers that describe an image, the text side a CLIPTextModel whose outputs
    at the tokens of the text are averaged: a denoiser attends to all of them, so all are to mean something.

    Args:
        num_features: that describe an image.
        width: of the vectors.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, num_features: int, width: int = 128) -> None:
        super().__init__()
        self.tokenizer, self.text_encoder, self.width = tokenizer, text_encoder, width
        self.text_projection = nn.Linear(text_encoder.config.hidden_size, width, bias=False)
        self.image_projection = nn.Sequential(
            nn.LayerNorm(num_features),
            nn.Linear(num_features, 2 * width),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(2 * width, width),
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_images(self, described: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        """Map what describes images to unit vectors."""
        return F.normalize(self.image_projection(described), dim=-1)

    def embed_tokens(self, tokens: Int[Tensor, "n l"], is_text: Bool[Tensor, "n l"]) -> Float[Tensor, "n d"]:
        """Map tokens of texts to unit vectors."""
        outputs = self.text_encoder(tokens).last_hidden_state
        mean = (outputs * is_text[..., None]).sum(1) / is_text.sum(1, keepdim=True)
        return F.normalize(self.text_projection(mean), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Map texts to unit vectors; of what is longer than the text encoder reads, the end is cut off."""
        device = self.text_projection.weight.device
        return self.embed_tokens(*(t.to(device) for t in tokenize(self.tokenizer, texts)))

    def loss(
        self, described: Float[Tensor, "n f"], tokens: Int[Tensor, "n l"], is_text: Bool[Tensor, "n l"]
    ) -> Float[Tensor, ""]:
        """Compute the mean cross-entropy of finding each image's text among the batch's, and each text's image."""
        scale = self.log_scale.exp().clamp(max=100)
        similarity = scale * self.embed_images(described) @ self.embed_tokens(tokens, is_text).T
        right = torch.arange(len(described), device=described.device)
        return (F.cross_entropy(similarity, right) + F.cross_entropy(similarity.T, right)) / 2


def save_image_text(model: ImageTextModel, folder: Path) -> None:
    """Write a model as a folder: tokenizer, config of the text encoder, weights."""
    with atomic_path(folder) as temporary:
        model.tokenizer.save_pretrained(temporary)
        model.text_encoder.config.save_pretrained(temporary)
        write_tensors(temporary / WEIGHTS, model.state_dict())


def holds_image_text(name: str) -> bool:
    """Say whether a name is a folder that ``save_image_text`` wrote."""
    return (Path(name) / WEIGHTS).is_file()


def load_image_text(folder: Path) -> ImageTextModel:
    """Read a model that ``save_image_text`` wrote.

    Raises:
        UserError: the folder is none, or a file is damaged.
    """
    if not holds_image_text(str(folder)):
        raise UserError(
            f"{folder}{looked_for(folder)} has no {WEIGHTS}; expected an image–text model, such as emoji-judge"
        )
    tensors, _ = read_tensors(folder / WEIGHTS)
    try:
        num_features, width = len(tensors["image_projection.0.weight"]), len(tensors["text_projection.weight"])
        model = ImageTextModel(*load_text_parts(folder), num_features, width)
        model.load_state_dict(tensors)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not a whole image–text model ({reason}); fetch or make it again") from error
    return model.requires_grad_(False).eval()
