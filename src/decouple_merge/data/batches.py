"""Batches of images or latents for training, in an order that a seed gives."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import Data
from ..seeds import generator
from ..storage.packed import pack, unpack
from .images import to_model
from .split import Labelled, split


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


@dataclass(frozen=True)
class LabelledBatch:
    """Images with what the denoiser is told of them, under the names of its inputs, [n, ...]."""

    images: UInt8[Tensor, "n c h w"]
    condition: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "LabelledBatch":
        """Move all tensors."""
        return LabelledBatch(self.images.to(device), {k: v.to(device) for k, v in self.condition.items()})

    def mirror(self, is_mirrored: Bool[Tensor, " n"]) -> "LabelledBatch":
        """Mirror some images."""
        return replace(self, images=mirror_images(self.images, is_mirrored))


Batch = UInt8[Tensor, "n c h w"] | LatentBatch | LabelledBatch


def mirror_images(images: UInt8[Tensor, "n c h w"], is_mirrored: Bool[Tensor, " n"]) -> UInt8[Tensor, "n c h w"]:
    """Mirror some images, left for right."""
    return torch.where(is_mirrored[:, None, None, None], images.flip(-1), images)


@runtime_checkable
class Examples(Labelled, Protocol):
    """What a model is trained on, images or their latents; ``sha256`` identifies the content."""

    sha256: str

    def stack(self, indices: Sequence[int]) -> Batch:
        """Load several examples as one batch."""


def draw_share(draw: Callable[[int], Tensor], num: int, rank: int = 0, world: int = 1) -> Shaped[Tensor, "n ..."]:
    """Draw for a batch of several processes, and take what belongs to this one's slice.

    So they draw together what one process draws for the whole batch.

    Args:
        draw: makes rows for so many examples.
        num: of this process's examples.
    """
    return draw(world * num)[rank * num : (rank + 1) * num]


def model_input(
    batch: Batch, draws: torch.Generator, rank: int = 0, world: int = 1
) -> tuple[Float[Tensor, "n c h w"], dict[str, Tensor]]:
    """Map a batch to x0, what the network denoises, and to the network's other inputs by their names.

    Latents are sampled afresh: x0 = mean + exp(log-variance / 2)·ε.

    Args:
        draws: on the CPU; images draw nothing.
        rank, world: the batch is this slice of one that so many processes share.
    """
    if isinstance(batch, Tensor):
        return to_model(batch), {}
    if isinstance(batch, LabelledBatch):
        return to_model(batch.images), batch.condition
    mean, log_variance = batch.moments[:, 0].unbind(1)
    noise = draw_share(lambda num: torch.randn(num, *mean.shape[1:], generator=draws), len(mean), rank, world).to(mean)
    return mean + (log_variance / 2).exp() * noise, batch.condition


class _Batches(Sequence):
    """Indices of every micro-batch: slices of an endless chain of seeded permutations of what is trained on."""

    def __init__(
        self, trained: Sequence[int], batch_size: int, seed: int, rank: int, world: int, first: int, last: int
    ) -> None:
        self.trained, self.batch_size, self.seed = trained, batch_size, seed
        self.rank, self.world, self.first, self.last = rank, world, first, last

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as the training does
    def _permutation(self, epoch: int) -> Int[Tensor, " n"]:
        return torch.randperm(len(self.trained), generator=generator(self.seed, "order", epoch))

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: Any) -> list[int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, num = ((self.first + index) * self.world + self.rank) * self.batch_size, len(self.trained)
        places = range(start, start + self.batch_size)
        return [self.trained[int(self._permutation(p // num)[p % num])] for p in places]


class _Indexed(Dataset):
    def __init__(self, images: Examples) -> None:
        self.images = images

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.images.stack(indices)


def _identity(batch: Any) -> Any:
    return batch


def _loaded(images: Examples, order: _Batches, num_workers: int) -> Iterator[Batch]:
    """Load batches, in processes of their own if asked for; these send bytes, since tensors need shared memory."""
    collate = pack if num_workers else _identity
    loader = DataLoader(_Indexed(images), batch_sampler=order, num_workers=num_workers, collate_fn=collate)
    return map(unpack, loader) if num_workers else iter(loader)


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
    """Yield micro-batches ``first`` to ``last`` of a training run; batch s depends only on (seed, rank, world, s).

    The processes' batches, one after the other, are the one that a single process has with ``world`` times the size.
    What ``split`` holds out is left out. Flips and dropped captions are drawn per image from the batch's own streams.

    Raises:
        ValueError: nothing is left to train on.
    """
    order = _Batches(split(images, data).trained, batch_size, seed, rank, world, first, last)

    def uniform(stream: str, step: int, num: int) -> Float[Tensor, " n"]:
        # The 0 was the rank, which no longer has a say.
        draws = generator(seed, stream, 0, step)
        return draw_share(lambda total: torch.rand(total, generator=draws), num, rank, world)

    for step, batch in enumerate(_loaded(images, order, data.num_workers), start=first):
        if data.flip:
            mirrored = uniform("flip", step, len(batch)) < 0.5
            batch = mirror_images(batch, mirrored) if isinstance(batch, Tensor) else batch.mirror(mirrored)
        if isinstance(batch, LatentBatch) and data.caption_dropout:
            batch = batch.drop_captions(uniform("caption dropout", step, len(batch)) < data.caption_dropout)
        yield batch


def held_out_images(images: Examples, data: Data) -> Batch:
    """Load the images that no training sees."""
    return images.stack(split(images, data).held_out)
