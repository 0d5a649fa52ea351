"""Batches of images or latents for training, in an order that a seed gives, and the scale that networks work in."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import Data
from ..seeds import generator


@dataclass(frozen=True)
class LatentBatch:
    """Latents as distributions, with what the denoiser is told of them.

    Attributes:
        moments: mean and log-variance of an image's latents, and where there are two views of its mirror image's.
        condition: the denoiser's other inputs by their names, [n, ...]: the captions' embeddings, and SDXL's sizes.
        empty: those of the empty caption, [...].
    """

    moments: Float[Tensor, "n views 2 z h w"]
    condition: dict[str, Tensor]
    empty: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.moments)

    def to(self, device: torch.device) -> "LatentBatch":
        """Move all tensors."""
        condition, empty = ({k: v.to(device) for k, v in d.items()} for d in (self.condition, self.empty))
        return LatentBatch(self.moments.to(device), condition, empty)

    def mirror(self, is_mirrored: Bool[Tensor, " n"]) -> "LatentBatch":
        """Choose the view of each image."""
        return replace(self, moments=self.moments[torch.arange(len(self)), is_mirrored.long()][:, None])

    def drop_captions(self, is_dropped: Bool[Tensor, " n"]) -> "LatentBatch":
        """Put the empty caption in the place of some."""
        kept = {
            name: torch.where(is_dropped.view(-1, *[1] * empty.dim()), empty, self.condition[name])
            for name, empty in self.empty.items()
        }
        return replace(self, condition=self.condition | kept)


Batch = UInt8[Tensor, "n c h w"] | LatentBatch


class Examples(Dataset):
    """What a model is trained on, images or their latents; ``sha256`` identifies the content."""

    sha256: str

    def __len__(self) -> int:
        raise NotImplementedError

    def stack(self, indices: Sequence[int]) -> Batch:
        """Load several examples as one batch."""
        raise NotImplementedError


class Images(Examples):
    """Images of one size, as uint8 tensors of shape [C, H, W]."""

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
        digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
        digest.update(self.pixels.numpy().data)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> UInt8[Tensor, "c h w"]:
        return self.pixels[index]

    def stack(self, indices: Sequence[int]) -> UInt8[Tensor, "n c h w"]:
        return self.pixels[torch.as_tensor(indices)]


def to_model(pixels: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Map uint8 [0, 255] to float32 [-1, 1]."""
    return pixels.float() / 127.5 - 1


def model_input(batch: Batch, draws: torch.Generator) -> tuple[Float[Tensor, "n c h w"], dict[str, Tensor]]:
    """Map a batch to x0, what the network denoises, and to the network's other inputs by their names.

    Latents are sampled afresh: x0 = mean + exp(log-variance / 2)·ε.

    Args:
        draws: on the CPU; images draw nothing.
    """
    if isinstance(batch, Tensor):
        return to_model(batch), {}
    mean, log_variance = batch.moments[:, 0].unbind(1)
    noise = torch.randn(mean.shape, generator=draws).to(mean)
    return mean + (log_variance / 2).exp() * noise, batch.condition


def to_pixels(x: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """Map [-1, 1] to uint8 [0, 255], clamped and rounded as diffusers' pipelines do."""
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


class _Batches(Sequence):
    """Indices of every micro-batch: slices of an endless chain of seeded permutations of the data."""

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int, world: int, first: int, last: int):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world, self.first, self.last = rank, world, first, last

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as the training does
    def _permutation(self, epoch: int) -> Int[Tensor, " n"]:
        return torch.randperm(self.num_images, generator=generator(self.seed, "order", epoch))

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: Any) -> list[int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = ((self.first + index) * self.world + self.rank) * self.batch_size
        return [
            int(self._permutation(p // self.num_images)[p % self.num_images])
            for p in range(start, start + self.batch_size)
        ]


class _Indexed(Dataset):
    def __init__(self, images: Examples) -> None:
        self.images = images

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.images.stack(indices)


def _identity(batch: Any) -> Any:
    return batch


def training_batches(
    images: Examples,
    data: Data,
    batch_size: int,
    seed: int,
    first: int,
    last: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Yield micro-batches ``first`` to ``last`` of a training run; batch s depends only on (seed, rank, s).

    The last ``data.num_held_out`` images are left out. Flips and dropped captions are drawn per image from the batch's
    own streams.

    Raises:
        ValueError: nothing is left to train on.
    """
    check_held_out(images, data)
    num_images = len(images) - data.num_held_out
    order = _Batches(num_images, batch_size, seed, rank, world, first, last)
    loader = DataLoader(_Indexed(images), batch_sampler=order, num_workers=data.num_workers, collate_fn=_identity)
    for step, batch in enumerate(loader, start=first):
        if data.flip:
            mirrored = torch.rand(len(batch), generator=generator(seed, "flip", rank, step)) < 0.5
            if isinstance(batch, LatentBatch):
                batch = batch.mirror(mirrored)
            else:
                batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
        if isinstance(batch, LatentBatch) and data.caption_dropout:
            draws = generator(seed, "caption dropout", rank, step)
            batch = batch.drop_captions(torch.rand(len(batch), generator=draws) < data.caption_dropout)
        yield batch


def check_held_out(images: Examples, data: Data) -> None:
    """Require that something is left to train on.

    Raises:
        ValueError: as said.
    """
    if len(images) <= data.num_held_out:
        raise ValueError(
            f"the data has {len(images)} images and data.num_held_out is {data.num_held_out}: nothing is left to train "
            "on; give more images, or hold out fewer"
        )


def held_out_images(images: Examples, data: Data) -> Batch:
    """Load the images at the end of the data that no training sees."""
    return images.stack(range(len(images) - data.num_held_out, len(images)))
