"""Images in npz and npy files, and whatever else is read into memory whole."""

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from ..errors import UserError, is_ours
from .decoding import resize_images
from .images import ArrayImages, Source, file_stamp

# Deflate makes nothing smaller than by this factor.
MAX_DEFLATED = 1032


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
                    f"expected {size}×{size} with {channels}, as the base model has; set data.fit: resize to crop, "
                    "resize and convert"
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


@contextmanager
def open_arrays(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Open the arrays of an npz file, by name, or the one of an npy file; each is read when it is asked for.

    Raises:
        UserError: the file is damaged, or what it says is more than it holds or than this machine's memory; also where
            an array is read that is damaged.
    """
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".npz":
                with zipfile.ZipFile(file) as archive:
                    for entry in archive.infolist():
                        if entry.filename.endswith(".npy"):
                            with archive.open(entry) as member:
                                _check_size(path, member, min(entry.file_size, MAX_DEFLATED * entry.compress_size))
                with np.load(path, allow_pickle=False) as arrays:
                    yield arrays
            else:
                _check_size(path, file, path.stat().st_size)
                yield {"arr_0": np.load(path, allow_pickle=False)}
    except UserError:
        raise
    except Exception as error:  # NumPy lets through what Python's parser, zipfile and zlib raise
        if is_ours(error):
            raise
        raise UserError(f"{path}: can't be read as plain arrays ({error}); make or fetch it again") from error


def _check_size(path: Path, file: Any, num_bytes: int) -> None:
    """Require of an array's header that no more is allocated than the file holds, in bytes, and the memory."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    size, memory = math.prod(shape) * dtype.itemsize, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not 0 <= size <= num_bytes:
        raise UserError(
            f"{path}: an array says {size:,} bytes of {dtype}, and has at most {num_bytes:,}; fetch it again"
        )
    if size > memory:
        raise UserError(
            f"{path}: an array has {size:,} bytes of {dtype}, and this machine's memory {memory:,}; give a folder, an "
            "archive or shards of images"
        )


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
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
