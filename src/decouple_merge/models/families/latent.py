"""What the families of latent pipelines share: a VAE around the denoiser, its scale, and parts that fit."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import UserError
from ...storage.reading import read_record
from ..family import Encoders, Family, read_index, square_side, tokenizer_of
from ..parts import vae_downscale


class Latent(Family):
    """A pipeline whose denoiser works on the latents of a VAE.

    Attributes:
        vae: the name of its class.
    """

    is_latent = True
    guidance = "classifier-free"
    # Latents go beyond [-1, 1], and a scheduler that doesn't clip hands this default on to one that does.
    sampler_config = {"clip_sample": False}  # noqa: RUF012
    vae = "AutoencoderKL"

    def fits(self, config: Any, vae: dict[str, Any], texts: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        """List what must be equal: a sentence with two gaps, what a part writes, what the denoiser reads.

        Args:
            config: the denoiser's.
            vae: the VAE's.
            texts: of the text encoders.
        """
        what = f"vae writes latents of {{}} channels, its {self.component} reads {{}}"
        return [(what, vae.get("latent_channels"), config.in_channels)]

    def other_inputs(self, config: Any) -> list[str]:
        """Name the settings of a denoiser by which it needs inputs that there is nothing to give for."""
        return []

    def classes(self, config: Any, index: dict[str, Any]) -> dict[str, int] | None:
        """Name the classes of a class-conditional pipeline."""
        return None

    def find_encoders(self, name: str, folder: Path, network: Any) -> Encoders:
        """Read the configs of the other parts, and require that they fit the network."""
        index, config = read_index(folder), network.config
        kind = index["_class_name"]

        def read(part: str, file: str = "config") -> dict[str, Any]:
            path = folder / part / f"{file}.json"
            if not path.is_file():
                raise UserError(f"base {name!r}: there is no {path}, expected {kind} with all of its parts")
            return read_record(path, "fetch or copy it again")

        vae, texts = read("vae"), [read(text) for text in self.text_encoders]
        for text in self.text_encoders:
            read(tokenizer_of(text), "tokenizer_config")
        if vae.get("_class_name") != self.vae:
            raise UserError(f"base {name!r}: its vae is {vae.get('_class_name')}, expected {self.vae}")
        if others := self.other_inputs(config):
            raise UserError(
                f"base {name!r}: its {self.component} needs other inputs than {kind}'s: {', '.join(others)}"
            )
        for what, found, expected in self.fits(config, vae, texts):
            if found != expected:
                raise UserError(f"base {name!r}: its {what.format(found, expected)}; give parts that belong together")
        size = square_side(config.sample_size) * vae_downscale(vae)
        zeros = bool(index.get("force_zeros_for_empty_prompt"))
        return Encoders(self, folder, vae["out_channels"], size, zeros, self.classes(config, index))

    @torch.no_grad()
    def encode_images(self, vae: Any, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 2 z hz wz"]:
        found = vae.encode(images).latent_dist
        shift, scale = _scaling(vae, found.mean)
        return torch.stack([(found.mean - shift) * scale, found.logvar + 2 * scale.log()], 1)

    @torch.no_grad()
    def decode_latents(self, vae: Any, latents: Float[Tensor, "n z hz wz"]) -> Float[Tensor, "n c h w"]:
        shift, scale = _scaling(vae, latents)
        return vae.decode(latents / scale + shift, return_dict=False)[0]


def _scaling(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Find shift and scale of each channel: a denoiser works on (latents - shift)·scale."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        mean, deviation = [0.0], [1.0]
    shift, spread = (like.new_tensor(value)[:, None, None] for value in (mean, deviation))
    return shift, vae.config.scaling_factor / spread
