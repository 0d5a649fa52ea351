"""The section ``data``."""

from typing import Literal

from pydantic import Field

from .numbers import NonNegativeInt, Number, PositiveInt
from .paths import FilePath, Name
from .section import Precision, Section


class Data(Section):
    """Where training and reference images come from.

    Attributes:
        source: ``fashion-mnist``, ``noto-emoji``, an image folder, a ``.zip`` or ``.tar`` of one, an ``.npz``/``.npy``
            array, ``datasets:NAME``, or ``webdataset:SHARDS``, a folder of tar files or a path such as
            ``my/{000..127}.tar``.
        path: folder with the files of a known data set, where they are not in their usual place.
        split, column: for ``datasets:`` sources.
        fit: ``exact`` refuses images whose size differs from the model's, and colour for a grey model; ``resize``
            crops them to a square, resizes and converts them.
        caption_column: of a ``datasets`` source, or the field in metadata.jsonl or in a shard's .json; for
            text-to-image bases; for class-conditional ones of classes.
        classes: train on images of these alone, by name: folders, Fashion-MNIST's, or captions of a class-conditional
            base. None trains on all. The reference stays all images.
        flip: mirror half of the training images.
        caption_dropout: share of the captions that training replaces by the empty one, so that guidance stays
            possible.
        cache_precision: of the cached latents and text embeddings.
        num_held_out: images that are never trained on; the validation loss uses them.
        held_out: ``random`` takes them from everywhere, by class where images lie in folders by class, and the same
            whatever the run's seed; ``last`` takes the end of the data. Take what the base's own training took, where
            it was on the same data: it has seen the others.
        skip_damaged: leave out images that can't be decoded; otherwise they end the run before it starts.
        num_workers: data loader processes; 0 loads in the training process.
    """

    source: Name = "fashion-mnist"
    path: FilePath | None = None
    split: str = "train"
    column: str = "image"
    caption_column: str = "text"
    fit: Literal["exact", "resize"] = "exact"
    classes: tuple[str, ...] | None = Field(None, min_length=1)
    flip: bool = False
    caption_dropout: Number = Field(0.1, ge=0, lt=1)
    cache_precision: Precision = "fp32"
    num_held_out: PositiveInt = 512
    held_out: Literal["random", "last"] = "random"
    skip_damaged: bool = False
    num_workers: NonNegativeInt = 0
