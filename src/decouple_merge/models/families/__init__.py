"""The pipelines that can be a base: one file a family, found by the name of the pipeline's class."""

from ..family import Family
from .dit import DiT
from .sdxl import StableDiffusionXL
from .stable_diffusion import StableDiffusion
from .unet import UNet

FAMILIES: dict[str, Family] = {
    pipeline: family
    for family in (UNet(), StableDiffusion(), StableDiffusionXL(), DiT())
    for pipeline in family.pipelines
}
