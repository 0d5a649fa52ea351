"""From a file, or a picture of Pillow's, to the 8-bit pixels that a viewer shows."""

import errno
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError, is_ours

# Of what is done here to an image: other pixels from the same file are another version.
VERSION = 2
# How images are brought to a size, as records say it.
RESIZE = "centre square, Lanczos of Pillow"
# Pillow's names of pixels of so many channels, and of those that have one beside alpha; others have colour.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
GREY_MODES = ("1", "L", "LA", "La", "F")
# TIFF's tags.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0

# Python's filters of warnings are one for all threads.
_OPENING = threading.Lock()


class DamagedError(UserError):
    """An image that can't be decoded."""


class Opened(NamedTuple):
    """An image as a viewer shows it.

    Attributes:
        image: of the modes L, LA, RGB or RGBA, upright.
        is_first: of several pictures that the file holds.
    """

    image: Image.Image
    is_first: bool


class Decoded(NamedTuple):
    """An image as a model sees it.

    Attributes:
        pixels: uint8 [C, size, size].
        original: width and height before it was cut.
        is_first: of several pictures that the file holds.
    """

    pixels: UInt8[Tensor, "c h w"]
    original: tuple[int, int]
    is_first: bool


def decode(item: Any, channels: int, size: int, fit: str) -> Decoded:
    """Decode a path, a file or a PIL image to uint8 [C, size, size].

    It is opened as ``open_image`` does. Unless four channels are asked for, what is transparent is laid on white.

    Args:
        fit: ``exact`` or ``resize``, as in ``config.Data``.

    Raises:
        DamagedError: the file is no image or is cut short.
        UserError: its levels can't be known; or (fit = exact) its size or channels are not the model's. Grey is
            colour too.
    """
    name = _name(item)
    if channels not in MODES:
        raise UserError(f"{name}: images have 1, 3 or 4 channels, expected {channels}, as the base model has")
    image, is_first = open_image(item)
    original = image.size
    if channels < 4 and image.mode in ("LA", "RGBA"):
        image = on_white(image)
    found = len(image.getbands())
    if fit == "resize":
        left, top, side = centre_square(*original)
        square = image.crop((left, top, left + side, top + side))
        image = square.convert(MODES[channels]).resize((size, size), Image.Resampling.LANCZOS)
    elif original != (size, size) or found not in (channels, channels - 2):
        raise UserError(
            f"{name}: found {image.width}×{image.height} with {found} channel(s), expected {size}×{size} with "
            f"{channels}, as the base model has; set data.fit: resize, or image_size of deme "
            "evaluate, to crop, resize and convert"
        )
    pixels = np.asarray(image.convert(MODES[channels])).reshape(size, size, channels)
    return Decoded(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), original, is_first)


def open_image(item: Any) -> Opened:
    """Read the first picture of a path or a file whole, in 8 bits and turned as its EXIF data say.

    Integers of more than 8 bits are scaled by the range of their type, 0 to 65,535 where the file doesn't say less;
    floats are 0 to 1. Palettes, CMYK and YCbCr become RGB. Colour profiles are not applied.

    Raises:
        DamagedError: it is no image, is cut short, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
        UserError: values are out of these ranges: which level is white can't be known.
    """
    with _reading(item) as image:
        is_first = getattr(image, "is_animated", False)
        image.load()
        if 0 in image.size:
            raise UserError(f"it is {image.width}×{image.height}")
        tags = dict(getattr(image, "tag_v2", {}))
        upright = ImageOps.exif_transpose(image)
        if upright.mode != "F" and not upright.mode.startswith("I"):
            has_alpha, is_grey = upright.has_transparency_data, upright.mode in GREY_MODES
            mode = ("LA" if is_grey else "RGBA") if has_alpha else ("L" if is_grey else "RGB")
            return Opened(upright.convert(mode), is_first)
    return Opened(_scale(upright, tags, _name(item)), is_first)


@contextmanager
def _reading(item: Any) -> Iterator[Image.Image]:
    """Open an image without decoding it; whatever goes wrong while it is open is the image's fault."""
    try:
        if isinstance(item, Image.Image):
            yield item
            return
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(item)
        with image:
            yield image
    except Exception as error:  # Pillow raises a dozen kinds, and what its plugins stumble on
        if is_ours(error) or _is_of_machine(error):
            raise
        raise DamagedError(
            f"{_name(item)}: can't be decoded ({error}); mend or remove it, or set data.skip_damaged (skip_damaged of "
            "deme stats and evaluate)"
        ) from error


def _is_of_machine(error: Exception) -> bool:
    """Say whether it is the machine's fault: the next start may read the image. Pillow's own have no number."""
    lasting = (None, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in lasting)


def _name(item: Any) -> str:
    return "an image of the data set" if isinstance(item, Image.Image) else str(item)


def _scale(image: Image.Image, tags: dict[int, Any], name: str) -> Image.Image:
    """Bring one channel of integers or floats to 8 bits."""
    values = np.asarray(image)
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    full = 1 if image.mode == "F" else 2 ** min(bits, 16) - 1
    low, high = values.min(), values.max()
    # NaN is in no range.
    if not (low >= 0 and high <= full):
        raise UserError(
            f"{name}: found values {low:g} to {high:g} (Pillow's mode {image.mode}), expected 0 to {full:,}; which of "
            "them is white can't be known: save it with 8 or 16 bits"
        )
    levels = np.rint(values.astype(np.float64) * (255 / full)).astype(np.uint8)
    if image.mode.startswith("I;16") and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    grey = Image.fromarray(levels)
    if not isinstance(clear := image.info.get("transparency"), int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def has_colour(item: Any) -> bool:
    """Say by a file's header whether the image has more than grey.

    Raises:
        DamagedError: it is no image.
    """
    with _reading(item) as image:
        return image.mode not in GREY_MODES and not image.mode.startswith("I")


def is_jpeg(item: Any) -> bool:
    """Say by a file's header whether it is JPEG.

    Raises:
        DamagedError: it is no image.
    """
    with _reading(item) as image:
        return image.format in ("JPEG", "MPO")


def centre_square(width: int, height: int) -> tuple[int, int, int]:
    """Find left, top and side of the largest square in the middle."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def on_white(image: Image.Image) -> Image.Image:
    """Lay an image with transparency, LA or RGBA, on white."""
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    # Of three equal channels, grey is exactly one of them.
    return white.convert("L" if image.mode == "LA" else "RGB")


def resize_images(
    images: UInt8[Tensor, "n c h w"], size: int, channels: int | None = None
) -> UInt8[Tensor, "n channels {size} {size}"]:
    """Cut images of 1, 3 or 4 channels to their centre square and resize them, as ``fit: resize`` does with files.

    The filter is Pillow's Lanczos: three lobes, stretched by the factor where images shrink, so that nothing aliases;
    values are rounded to levels. Those that have the size keep their pixels.
    """
    arrays = images.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array) for array in arrays]
    return torch.stack([decode(picture, channels or images.shape[1], size, "resize").pixels for picture in pictures])
