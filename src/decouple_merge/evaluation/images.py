"""Images to be scored, from wherever they come: drawn by a model, read from files, or given as tensors."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Sample, Text
from ..data.captions import texts_of
from ..data.decoding import RESIZE, resize_images
from ..data.prompts import load_prompts
from ..data.sources import open_images
from ..sampling.sampler import sample_images, sampling_fields, seed_batches
from ..sampling.standalone import open_model


@dataclass(frozen=True)
class Source:
    """What is scored.

    Attributes:
        model: a pipeline or a run; images in any form ``open_images`` takes; or batches of uint8 [N, C, H, W].
        num_images: of a model, 5,000 where it is None; of images the first so many.
        settings: how a model draws.
        text: prompts and guidance of a model, prompts of images.
        image_size: what all are resized to.
    """

    model: str | Iterable[Tensor]
    num_images: int | None
    seed: int
    settings: Sample
    text: Text
    image_size: int | None = None


@dataclass
class Scored:
    """Images to be scored.

    Attributes:
        batches: uint8 [N, channels, size, size].
        seeds: of images that a model draws.
        sampling: what the images depend on besides model and seed, as records carry it.
        prompts: all that images may be drawn from.
        texts: those of these images, in their order.
    """

    batches: Iterable[Tensor]
    channels: int
    size: int
    num_images: int | None = None
    seeds: range | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    has_jpeg: bool = False
    num_batches: int = 1
    prompts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def is_model(name: str) -> bool:
    """Say whether a name is that of a pipeline or a run, as opposed to images."""
    path = Path(name)
    is_hub_name = not path.exists() and name.count("/") == 1 and name[0] not in "./~" and ":" not in name
    return is_hub_name or (path / "model_index.json").exists() or (path / "config.yaml").exists()


def open_scored(source: Source, device: torch.device, with_texts: bool = False, share: slice = slice(None)) -> Scored:
    """Open what is scored, resized where asked; nothing is drawn before the batches are asked for.

    Args:
        with_texts: also find the texts that images of files show.
        share: of a model's or a folder's batches.

    Raises:
        ValueError: there is no such model, nor images; or what is drawn would be enlarged.
    """
    if not isinstance(source.model, str):
        scored = _open_batches(source.model, source.text)
    elif is_model(source.model):
        scored = _open_drawn(source.model, source, device, share)
    else:
        scored = _open_files(source.model, source, with_texts, share)
    if source.image_size is not None:
        if scored.size < source.image_size:
            raise ValueError(
                f"found images {scored.size}×{scored.size}, which image_size {source.image_size} would enlarge; "
                "expected at least as large ones: set image_size to null, and take a reference of their size"
            )
        scored.batches = (resize_images(batch, source.image_size) for batch in scored.batches)
        scored.size = source.image_size
        scored.sampling |= {"resize": f"{source.image_size}, {RESIZE}"}
    return scored


def _open_batches(given: Iterable[Tensor], text: Text) -> Scored:
    batches = iter(given)
    first = next(batches, None)
    if not isinstance(first, Tensor) or first.ndim != 4 or first.dtype != torch.uint8:
        found = f"{first.dtype} {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(f"the first batch is {found}, expected uint8 [N, C, H, W], 0 to 255: quantise the images")
    prompts = load_prompts(text)
    return Scored(chain([first], batches), first.shape[1], first.shape[2], prompts=prompts, texts=prompts)


def _open_drawn(model: str, source: Source, device: torch.device, share: slice) -> Scored:
    settings, seeds = source.settings, range(source.seed, source.seed + (source.num_images or 5000))
    base, network, prompts = open_model(model, device, seeds, settings, source.text)
    sampling = sampling_fields(base, settings, prompts)
    drawn = sample_images(network, base, seeds, settings, device, prompts=prompts, share=share)
    scored = Scored(drawn, base.channels, base.image_size, len(seeds), seeds, sampling)
    scored.num_batches = len(seed_batches(seeds, settings.batch_size))
    if prompts is not None:
        scored.prompts, scored.texts = prompts.prompts, prompts.choose(seeds)
    return scored


def _open_files(name: str, source: Source, with_texts: bool, share: slice) -> Scored:
    images = open_images(name, source.image_size)
    num = source.num_images or len(images)
    if num > len(images):
        raise ValueError(f"{name}: found {len(images)} images, expected at least --num-images {num}")
    numbers = torch.arange(num).split(256)
    batches = (images.stack(b.tolist()) for b in numbers[share])
    scored = Scored(batches, images[0].shape[0], images[0].shape[1], num, has_jpeg=images.source.holds_jpeg)
    scored.num_batches = len(numbers)
    if with_texts:
        given = load_prompts(source.text)
        texts = texts_of(images, name, given, source.seed)
        scored.prompts, scored.texts = given or texts, texts[:num]
    return scored
