"""From a file, or a picture of Pillow's, to 8-bit pixels of the size and channels that a model has."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError

# Of what is done here to an image: other pixels from the same file are another version.
VERSION = 1
# How images are brought to a size, as records say it.
RESIZE = "centre square, Lanczos of Pillow"
# Pillow's names of what has one channel.
GREY_MODES = ("L", "1", "I;16")


class DamagedError(UserError):
    """An image that can't be decoded."""


class Decoded(NamedTuple):
    """An image as a model sees it.

    Attributes:
        pixels: uint8 [C, size, size].
        original: width and height before it was cut.
    """

    pixels: UInt8[Tensor, "c h w"]
    original: tuple[int, int]


def decode(item: Any, channels: int, size: int, fit: str) -> Decoded:
    """Decode a path, a file or a PIL image to uint8 [C, size, size].

    Args:
        fit: ``exact`` or ``resize``, as in ``config.Data``.

    Raises:
        DamagedError: the file is no image or is cut short.
        UserError: (fit = exact) its size or channels are not the model's.
    """
    image = open_image(item)
    original, mode = image.size, {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    if fit == "resize":
        left, top, side = centre_square(*original)
        square = image.crop((left, top, left + side, top + side))
        image = square.convert(mode).resize((size, size), Image.Resampling.LANCZOS)
    found = num_channels(image)
    if image.size != (size, size) or found != channels:
        name = "an image of the data set" if isinstance(item, Image.Image) else item
        raise UserError(
            f"{name}: found {image.width}×{image.height} with {found} channel(s), expected {size}×{size} with "
            f"{channels}, as the base model has; set data.fit: resize to crop, resize and convert"
        )
    pixels = np.asarray(image.convert(mode)).reshape(size, size, channels)
    return Decoded(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), original)


def open_image(item: Any) -> Image.Image:
    """Read a path or a file whole into a PIL image.

    Raises:
        DamagedError: it is no image or is cut short.
    """
    try:
        with nullcontext(item) if isinstance(item, Image.Image) else Image.open(item) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DamagedError(
            f"{item}: can't be decoded ({error}); mend or remove it, or set data.skip_damaged"
        ) from error


def num_channels(image: Image.Image) -> int:
    """Count an image's channels; a palette's colours have three."""
    return len(image.getbands()) if image.mode != "P" else 3


def natural_shape(item: Any) -> tuple[int, int]:
    """Say with how many channels, 1 or 3, and at which size an image is opened where nothing asks for others."""
    image = open_image(item)
    return 1 if image.mode in GREY_MODES else 3, image.width


def centre_square(width: int, height: int) -> tuple[int, int, int]:
    """Find left, top and side of the largest square in the middle."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def on_white(item: Any) -> Image.Image:
    """Lay an image with transparency on white."""
    image = open_image(item).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def resize_images(
    images: UInt8[Tensor, "n c h w"], size: int, channels: int | None = None
) -> UInt8[Tensor, "n channels {size} {size}"]:
    """Cut images to their centre square and resize them, as ``fit: resize`` does with files.

    The filter is Pillow's Lanczos: three lobes, stretched by the factor where images shrink, so that nothing aliases;
    values are rounded to levels.
    """
    arrays = images.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array) for array in arrays]
    return torch.stack([decode(picture, channels or images.shape[1], size, "resize").pixels for picture in pictures])
