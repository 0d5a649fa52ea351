"""Images of one size as 8-bit pixels, the source they were opened from, and the scale that networks work in."""

import hashlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from ..config import Data
from ..errors import UserError
from .names import JPEG_SUFFIXES, has_suffix

# What to do where captions aren't found by the name that is asked for.
OTHER_NAME = "set data.caption_column (caption_column of deme evaluate) where captions have another name"


class Source:
    """A place with images, opened but not decoded; each kind of place is a class in a file of its own.

    Attributes:
        form: how ``data.source`` names places of this kind, for messages.
        captioned: the same of places with captions, where this kind can have them.
        data: the settings that it was opened by.
    """

    form = ""
    captioned = ""

    def __init__(self, data: Data) -> None:
        self.data = data

    @property
    def identity(self) -> str:
        """All that tells the content from any other, without decoding it."""
        raise NotImplementedError

    @property
    def names(self) -> Sequence[Path]:
        """Names of the images' files in their order; arrays and rows of a data set have none."""
        return []

    @property
    def labels(self) -> Sequence[Hashable]:
        """Classes of the images, where they are known: the folders that their files are in."""
        return [name.parent for name in self.names]

    @property
    def class_names(self) -> Sequence[str]:
        """What the class of each image is called, where that is known."""
        return [name.parent.name for name in self.names]

    @property
    def groups(self) -> Sequence[Hashable]:
        """Of each image the group of those that are never separated, where there are any."""
        return []

    @property
    def holds_jpeg(self) -> bool:
        """Whether files are JPEG, whose compression changes features."""
        return any(has_suffix(name, JPEG_SUFFIXES) for name in self.names)

    def natural_shape(self) -> tuple[int, int]:
        """Say with how many channels and at which size the images are opened where nothing asks for others."""
        raise NotImplementedError

    def images(self, channels: int, size: int) -> "Images":
        """Open the images for a model of the given channels and size.

        Raises:
            UserError: there are none, or they are damaged, or of another size or channel count.
        """
        raise NotImplementedError

    def captions(self, field: str, classes: dict[str, int] | None) -> list[Any]:
        """Read what stands in the place of each image's caption, whatever it is; only kinds that are ``captioned``.

        Args:
            field: the name of the column or of the field of a record.
            classes: of a class-conditional base, by name and number.

        Raises:
            UserError: there are no captions, or one is missing or can't be read.
        """
        raise NotImplementedError


class Images(Dataset):
    """Images of one size, as uint8 tensors of shape [C, H, W].

    Attributes:
        sha256: identifies the content.
        source: where they were opened from; tensors that were handed over have none.
        kept: their indices in it; what can't be decoded may be left out.
    """

    sha256: str
    source: Source
    kept: Sequence[int]

    @property
    def labels(self) -> Sequence[Hashable]:
        """Their classes, or nothing."""
        return self._known("labels")

    @property
    def class_names(self) -> Sequence[str]:
        """What their classes are called, or nothing."""
        return self._known("class_names")

    @property
    def groups(self) -> Sequence[Hashable]:
        """Of each the group of those that are never separated, or nothing."""
        return self._known("groups")

    def _known(self, what: str) -> Sequence[Any]:
        known = getattr(self.source, what) if hasattr(self, "source") else []
        return [known[i] for i in self.kept] if known else []

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> UInt8[Tensor, "c h w"]:
        raise NotImplementedError

    def stack(self, indices: Sequence[int]) -> UInt8[Tensor, "n c h w"]:
        """Load several images as one batch."""
        return torch.stack([self[i] for i in indices])

    def frames(self, indices: Sequence[int]) -> Float[Tensor, "n 6"]:
        """Say how images were cut, in pixels, as SDXL is told (Podell et al. 2023, section 2.2).

        Height and width of the original, top and left of the crop in what it was resized to, height and width now.
        """
        raise NotImplementedError


class ArrayImages(Images):
    """Images held in memory."""

    def __init__(self, pixels: UInt8[np.ndarray, "n c h w"]) -> None:
        self.pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        self.kept = range(len(pixels))
        digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
        digest.update(self.pixels.numpy().data)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> UInt8[Tensor, "c h w"]:
        return self.pixels[index]

    def stack(self, indices: Sequence[int]) -> UInt8[Tensor, "n c h w"]:
        return self.pixels[torch.as_tensor(indices)]

    def frames(self, indices: Sequence[int]) -> Float[Tensor, "n 6"]:
        """Refuse: how they were cut before is not known.

        Raises:
            UserError: always.
        """
        raise UserError(
            "this base is told how its images were cut (SDXL), which is known of files alone: give the images as a "
            "folder with captions in metadata.jsonl, or as another source of files"
        )


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Tell a file from others, and from what it was before it was written again, without reading it."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def to_model(pixels: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Map uint8 [0, 255] to float32 [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(x: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """Map [-1, 1] to uint8 [0, 255], clamped and rounded as diffusers' pipelines do."""
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
