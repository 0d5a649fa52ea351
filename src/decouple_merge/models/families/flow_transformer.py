"""What the families of flow-matching transformers share: their schedulers, and the last layers of their blocks."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ..family import Encoders, load_parts, read_config, square_side
from .latent import Latent


class FlowTransformer(Latent):
    """A transformer on latents, trained by flow matching.

    Attributes:
        patch_size: pixels of a latent along a side of a token.
    """

    component = "transformer"
    flows = "only"
    sampler_config = {}  # noqa: RUF012
    patch_size = 2

    def num_tokens(self, network: Any, shape: tuple[int, ...]) -> int | None:
        return (shape[-2] // self.patch_size) * (shape[-1] // self.patch_size)

    def load_texts(self, folder: Path, parts: Sequence[str]) -> Any:
        pipeline = load_parts(folder, *parts)
        # To encode texts, some ask for what its config says: how wide SD3's zeros are, if FLUX is told a guidance.
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**read_config(folder / self.component)))
        return pipeline

    def usage(self, encoders: Encoders | None) -> tuple[str, str]:
        return "text-to-image", 'pipeline("a prompt").images[0].save("image.png")'


class SizedByVae(FlowTransformer):
    """One whose network takes any size: it is trained on the one that its VAE's config names.

    Attributes:
        default_size: height and width of images where the config names none; None where it has to.
    """

    has_even_levels = True
    default_size: int | None = None

    def latent_size(self, config: Any, vae: dict[str, Any]) -> int:
        size, cell = square_side(vae.get("sample_size", self.default_size)), self.downscale(vae) * self.patch_size
        if size % cell:
            raise UserError(f"vae has the sample_size {size}, expected a multiple of {cell}, the side of a token")
        return size // self.downscale(vae)


def last_linear(layers: Any) -> nn.Linear:
    """Find the linear layer that writes the output of a feed-forward branch."""
    return next(layer for layer in reversed(list(layers)) if isinstance(layer, nn.Linear))


def as_vector(t: torch.Tensor) -> torch.Tensor:
    """Make timesteps real numbers, as a flow's are."""
    return t if t.is_floating_point() else t.float()
