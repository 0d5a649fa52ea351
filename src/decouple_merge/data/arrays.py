"""Images in npz and npy files, and whatever else is read into memory whole."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from ..errors import UserError
from ..storage.arrays import open_arrays
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
        channels, height = self.read().shape[1:3]
        return min(channels, 3), height


def read_array(path: Path) -> UInt8[np.ndarray, "n c h w"]:
    """Read the images of an npz (``arr_0``, or its first array) or npy file.

    Raises:
        UserError: as ``open_arrays``, or the array is not uint8 [N, H, W] or [N, H, W, C] of 1, 3 or 4 channels.
    """
    with open_arrays(path) as arrays:
        # Where ADM's files have images, they are arr_0; the others are labels or statistics.
        name = "arr_0" if "arr_0" in arrays else next(iter(arrays), None)
        if name is None:
            raise UserError(f"{path}: holds no arrays")
        pixels = arrays[name]
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[3:] not in ((), (1,), (3,), (4,)):
        raise UserError(
            f"{path}: found {pixels.dtype} of shape {pixels.shape}, expected uint8 [N, H, W] or [N, H, W, C] with 1, 3 "
            "or 4 channels"
        )
    if 0 in pixels.shape[1:3]:
        raise UserError(f"{path}: found images of shape {pixels.shape[1:]}, which have no pixels; make it again")
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
