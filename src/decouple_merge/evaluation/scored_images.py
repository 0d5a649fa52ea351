"""What is scored: images drawn by a model, read from files, or given as tensors."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..config import Data, Protocol
from ..data.captions import texts_of
from ..data.decoding import RESIZE, resize_images
from ..data.prompts import load_prompts
from ..data.sources import open_images
from ..errors import UserError
from ..executors.devices import default_device
from ..sampling.model import is_run, open_model
from ..sampling.sampler import seed_batches
from ..storage.reading import is_document
from ..storage.shipped import find_model


@dataclass
class Scored:
    """Images to be scored.

    Attributes:
        batches: yields a share of the batches, uint8 [N, channels, size, size]; draws or reads them then.
        num_images: None where it isn't known before they have come.
        seeds: of images that a model draws.
        sampling: what the images depend on besides model and seed, as records carry it.
        prompts: all that images may be drawn from.
        texts: those of these images, in their order.
        notes: what is to be known before a model draws.
        sha256: hashes the model, or says the hash of the images; None where they are only given.
    """

    batches: Callable[[slice], Iterable[Tensor]]
    channels: int
    size: int
    num_images: int | None = None
    seeds: range | None = None
    sampling: dict[str, str | int | None] = field(default_factory=dict)
    has_jpeg: bool = False
    num_batches: int = 1
    prompts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sha256: Callable[[], str | None] = lambda: None


def is_model(name: str) -> bool:
    """Say whether a name is that of a pipeline, a run or a mixture, as opposed to images."""
    path = find_model(name) or Path(name)
    is_hub_name = not path.exists() and name.count("/") == 1 and name[0] not in "./~" and ":" not in name
    return is_hub_name or (path / "model_index.json").exists() or is_run(name) or is_document(name)


def open_scored(model: str | Iterable[Tensor], settings: Protocol, with_texts: bool = False) -> Scored:
    """Open what is scored, resized where asked; nothing is drawn before the batches are asked for.

    Args:
        model: a pipeline or a run; images in any form ``open_images`` takes; or batches of uint8 [N, C, H, W].
        with_texts: also find the texts that images of files show.

    Raises:
        UserError: there is no such model, nor images; or what is drawn would be enlarged.
    """
    if not isinstance(model, str):
        scored = _open_batches(model, settings)
    elif is_model(model):
        scored = _open_drawn(model, settings)
    else:
        scored = _open_files(model, settings, with_texts)
    return scored if settings.image_size is None else _resized(scored, settings.image_size)


def check_batch(batch: object) -> None:
    """Require that a batch of images that was handed over is uint8 [N, C, H, W].

    Raises:
        UserError: as said.
    """
    if not isinstance(batch, Tensor) or batch.ndim != 4 or batch.dtype != torch.uint8:
        found = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise UserError(f"a batch of images is {found}, expected uint8 [N, C, H, W], 0 to 255: quantise the images")


def _open_batches(given: Iterable[Tensor], settings: Protocol) -> Scored:
    batches = iter(given)
    first = next(batches, None)
    check_batch(first)
    assert isinstance(first, Tensor)
    prompts, whole = load_prompts(settings.text), _first(chain([first], batches), settings.num_images)
    return Scored(lambda share: whole, first.shape[1], first.shape[2], prompts=prompts, texts=prompts)


def _first(batches: Iterable[Tensor], num_images: int | None) -> Iterator[Tensor]:
    """Yield the first images of batches, or all.

    Raises:
        UserError: there are fewer.
    """
    left = math.inf if num_images is None else num_images
    for batch in batches:
        yield batch if len(batch) <= left else batch[: int(left)]
        left -= len(batch)
        if left <= 0:
            return
    if num_images is not None:
        raise UserError(f"found {num_images - int(left)} images in the batches, expected num_images, {num_images}")


def _open_drawn(name: str, settings: Protocol) -> Scored:
    seeds = range(settings.seed, settings.seed + (settings.num_images or 5000))
    model = open_model(name, settings.sample, settings.text, settings.seed)
    model.check(seeds)
    return Scored(
        lambda share: model.draw(seeds, default_device(), share),
        model.base.channels,
        model.base.image_size,
        len(seeds),
        seeds,
        model.fields,
        num_batches=len(seed_batches(seeds, settings.sample.batch_size)),
        prompts=model.prompts,
        texts=model.prompts_of(seeds),
        notes=list(model.notes()),
        sha256=lambda: model.sha256,
    )


def _open_files(name: str, settings: Protocol, with_texts: bool) -> Scored:
    images = open_images(name, settings.image_size, None, settings.skip_damaged, settings.images_split, settings.column)
    num = settings.num_images or len(images)
    if num > len(images):
        raise UserError(f"{name}: found {len(images)} images, expected at least --num-images {num}")
    numbers = torch.arange(num).split(256)
    scored = Scored(
        lambda share: (images.stack(batch.tolist()) for batch in numbers[share]),
        images[0].shape[0],
        images[0].shape[1],
        num,
        has_jpeg=images.source.holds_jpeg,
        num_batches=len(numbers),
        sha256=lambda: images.sha256,
    )
    if with_texts:
        given = load_prompts(settings.text)
        texts = texts_of(images, Data(source=name, caption_column=settings.caption_column), given, settings.seed)
        scored.prompts, scored.texts = given or texts, texts[:num]
    return scored


def _resized(scored: Scored, size: int) -> Scored:
    if scored.size < size:
        raise UserError(
            f"found images {scored.size}×{scored.size}, which image_size {size} would enlarge; expected at least as "
            "large ones: set image_size to null, and take a reference of their size"
        )
    whole = scored.batches
    scored.batches = lambda share: (resize_images(batch, size) for batch in whole(share))
    scored.size = size
    scored.sampling |= {"resize": f"{size}, {RESIZE}"}
    return scored
