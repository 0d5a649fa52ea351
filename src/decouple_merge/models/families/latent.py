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

        present = [text for text in self.text_encoders if any(index.get(text) or [True])]
        if missing := [text for text in self.text_encoders if text not in {*present, *self.optional_text_encoders}]:
            raise UserError(
                f"base {name!r}: its {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} null in "
                f"model_index.json, expected {kind} with its text encoders: captions are encoded by them"
            )
        vae, texts = read("vae"), [read(text) for text in present]
        for text in present:
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
        try:
            side = self.latent_size(config, vae)
        except UserError as error:
            raise UserError(f"base {name!r}: its {error}") from error
        zeros, classes = bool(index.get("force_zeros_for_empty_prompt")), self.classes(config, index)
        size = side * self.downscale(vae)
        return Encoders(
            self, folder, vae.get("out_channels", 3), size, zeros, classes, self.guidance_of(config), latent_size=side
        )

    def latent_size(self, config: Any, vae: dict[str, Any]) -> int:
        """Say the height and width of the latents that a denoiser is trained on.

        Raises:
            UserError: the configs don't say it, or it is none that the network takes.
        """
        return square_side(config.sample_size)

    def downscale(self, vae: dict[str, Any]) -> int:
        """Compute from a VAE's config how many pixels along a side are one of its latents."""
        return vae_downscale(vae)

    def guidance_of(self, config: Any) -> str | None:
        """Say which guidance a pipeline has."""
        return self.guidance

    @torch.no_grad()
    def encode_images(self, vae: Any, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 2 z hz wz"]:
        mean, logvar = self.posterior(vae, images)
        shift, scale = _scaling(vae, mean)
        return torch.stack([(mean - shift) * scale, logvar + 2 * scale.log()], 1)

    @torch.no_grad()
    def decode_latents(self, vae: Any, latents: Float[Tensor, "n z hz wz"]) -> Float[Tensor, "n c h w"]:
        shift, scale = _scaling(vae, latents)
        return self.reconstruct(vae, latents / scale + shift)

    def posterior(self, vae: Any, images: Float[Tensor, "n c h w"]) -> tuple[Tensor, Tensor]:
        """Encode images to mean and log-variance [n, z, hz, wz], in the VAE's own scale."""
        found = vae.encode(images).latent_dist
        return found.mean, found.logvar

    def reconstruct(self, vae: Any, latents: Float[Tensor, "n z hz wz"]) -> Float[Tensor, "n c h w"]:
        """Decode latents in the VAE's own scale."""
        return vae.decode(latents, return_dict=False)[0]


def _scaling(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Find shift and scale of each channel: a denoiser works on (latents - shift)·scale."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        mean, deviation = [vae.config.get("shift_factor") or 0.0], [1.0]
    shift, spread = (like.new_tensor(value)[:, None, None] for value in (mean, deviation))
    return shift, vae.config.get("scaling_factor", 1.0) / spread
