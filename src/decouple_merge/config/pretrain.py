"""The section ``pretrain``: a base model from nothing."""

from typing import Any

from pydantic import Field, model_validator

from ..errors import UserError
from .numbers import Integer, NonNegativeFloat, PositiveFloat, PositiveInt
from .paths import Name
from .section import Section
from .training import Training


class PartTraining(Section):
    """Training of a part that stands around the denoiser of a text-to-image base.

    The rate rises over the first twentieth of the updates and falls to zero by a cosine.

    Attributes:
        num_updates, batch_size, learning_rate, weight_decay, checkpoint_every: as of any training.
    """

    num_updates: PositiveInt = 4000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-2
    checkpoint_every: PositiveInt = 500


class Vae(PartTraining):
    """Training of a VAE: the mean absolute error of its images and kl_weight times the divergence of its latents.

    Attributes:
        model: arguments of diffusers' AutoencoderKL.
        kl_weight: both terms are means over the values of an image, so that 1e-6 is what Stable Diffusion's has.
    """

    model: dict[str, Any] = {}
    kl_weight: NonNegativeFloat = 1e-3


class TextEncoder(PartTraining):
    """Training of a text encoder, to tell the captions of images from each other (CLIP's loss).

    Attributes:
        model: arguments of transformers' CLIPTextConfig; max_position_embeddings is the length of a text in tokens.
        vocab_size: of the byte pair encoding learned from the captions.
    """

    model: dict[str, Any] = {}
    vocab_size: Integer = Field(2048, ge=514)


class Pretrain(Training):
    """Training of a base model from nothing.

    Attributes:
        model: arguments of diffusers' UNet2DModel; of UNet2DConditionModel where there are the parts below.
        scheduler: arguments of diffusers' DDPMScheduler; of PNDMScheduler where there are the parts below; for a flow
            with ``_class_name: FlowMatchEulerDiscreteScheduler`` of that.
        start: a pipeline, from whose weights the training goes on; ``model`` and ``scheduler`` are then its own.
        num_ranges: validation loss is logged for this many equal ranges.
        vae, text_encoder: for a text-to-image base, which has both; they are trained before the denoiser.
    """

    model: dict[str, Any] = {}
    scheduler: dict[str, Any] = {}
    start: Name | None = None
    num_ranges: PositiveInt = 4
    vae: Vae | None = None
    text_encoder: TextEncoder | None = None

    @model_validator(mode="after")
    def _start_alone(self) -> "Pretrain":
        given = [key for key in ("model", "scheduler", "vae", "text_encoder") if getattr(self, key)]
        if self.start and given:
            raise UserError(f"pretrain.start brings its own {given[0]}: leave out pretrain.{given[0]}, or start")
        return self

    @model_validator(mode="after")
    def _both_parts(self) -> "Pretrain":
        if (self.vae is None) != (self.text_encoder is None):
            missing = "vae" if self.vae is None else "text_encoder"
            raise UserError(f"a text-to-image base has vae and text_encoder, {missing} is missing: give both, or none")
        return self
