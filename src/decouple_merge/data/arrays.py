"""Images in npz and npy files, and whatever else is read into memory whole."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from ..errors import UserError
from ..storage.arrays import open_arrays, shapes
from .decoding import resize_images
from .images import ArrayImages, Source, file_stamp


class ArraySource(Source):
    """A source whose file is read into memory whole."""

    def path(self) -> Path:
        """Find the file.

        Raises:
            UserError: there is none.
        """
        raise NotImplementedError

    def read(self) -> UInt8[np.ndarray, "n c h w"]:
        """Read the pixels.

        Raises:
            UserError: the file is missing or damaged.
        """
        raise NotImplementedError

    @property
    def identity(self) -> str:
        return f"{self.data.source} {self.data.split} {file_stamp(self.path())}"

    def images(self, channels: int, size: int) -> ArrayImages:
        pixels, name = self.read(), self.data.source
        if len(pixels) == 0:
            raise UserError(f"{name}: holds no images")
        if pixels.shape[1:] != (channels, size, size):
            # As with files, nothing is lost where grey becomes colour or transparency is laid on white.
            is_converted = channels == 3 and pixels.shape[1] in (1, 4) and pixels.shape[2:] == (size, size)
            if self.data.fit == "exact" and not is_converted:
                raise UserError(
                    f"{name}: found images {pixels.shape[3]}×{pixels.shape[2]} with {pixels.shape[1]} channel(s), "
                    f"expected {size}×{size} with {channels}, as the base model has; set data.fit: resize, "
                    "or image_size of deme evaluate, to crop, resize and convert"
                )
            pixels = resize_images(torch.from_numpy(pixels), size, channels).numpy()
        images = ArrayImages(pixels)
        images.source = self
        return images


class ArrayFile(ArraySource):
    """An npz (``arr_0``, or its first array) or npy file."""

    form = "an .npz or .npy file"

    def path(self) -> Path:
        return Path(self.data.source)

    def read(self) -> UInt8[np.ndarray, "n c h w"]:
        return read_array(self.path())

    def natural_shape(self) -> tuple[int, int]:
        # By the header: the pixels are gigabytes, and who reads them refuses what are no images.
        found = shapes(self.path())
        shape = found[_of_images(self.path(), found)]
        return min(shape[3], 3) if len(shape) > 3 else 1, shape[1] if len(shape) > 1 else 1


def read_array(path: Path) -> UInt8[np.ndarray, "n c h w"]:
    """Read the images of an npz (``arr_0``, or its first array) or npy file.

    Raises:
        UserError: as ``open_arrays``, or the array is not uint8 [N, H, W] or [N, H, W, C] of 1, 3 or 4 channels.
    """
    with open_arrays(path) as arrays:
        pixels = arrays[_of_images(path, arrays)]
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[3:] not in ((), (1,), (3,), (4,)):
        raise UserError(
            f"{path}: found {pixels.dtype} of shape {pixels.shape}, expected uint8 [N, H, W] or [N, H, W, C] with 1, 3 "
            "or 4 channels"
        )
    if 0 in pixels.shape[1:3]:
        raise UserError(f"{path}: found images of shape {pixels.shape[1:]}, which have no pixels; make it again")
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)


def _of_images(path: Path, arrays: Iterable[str]) -> str:
    """Name the array of images: where ADM's files have some, they are arr_0, and the others labels or statistics."""
    names = list(arrays)
    if not names:
        raise UserError(f"{path}: holds no arrays")
    return "arr_0" if "arr_0" in names else names[0]
