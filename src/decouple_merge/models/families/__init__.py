"""The pipelines that can be a base: one file a family, found by the name of the pipeline's class."""

from ..family import Family
from .dit import DiT
from .flux import Flux
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .stable_diffusion import StableDiffusion
from .unet import UNet
from .wan import Wan
from .z_image import ZImage

FAMILIES: dict[str, Family] = {
    pipeline: family
    for family in (UNet(), StableDiffusion(), StableDiffusionXL(), DiT(), StableDiffusion3(), Flux(), ZImage(), Wan())
    for pipeline in family.pipelines
}
