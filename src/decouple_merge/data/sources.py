"""The kinds of places that images come from, and the images that settings or a name open."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ..config import Data
from ..errors import UserError
from ..storage.reading import looked_for
from . import emoji, hub, shards
from .archives import ImageArchive
from .arrays import ArrayFile
from .fashion import FashionMnist
from .folder import Folder
from .images import Images, Source

FOLDER = "/"
# By a known name, by what stands before the colon, or by the ending of a file; a folder has none of these.
KINDS: dict[str, type[Source]] = {
    "fashion-mnist": FashionMnist,
    emoji.NAME: emoji.NotoEmoji,
    FOLDER: Folder,
    ".zip": ImageArchive,
    ".tar": ImageArchive,
    ".npz": ArrayFile,
    ".npy": ArrayFile,
    shards.PREFIX: shards.Shards,
    hub.PREFIX: hub.Rows,
}


def kind_of(name: str) -> type[Source] | None:
    """Find the kind of source that a name is of; None where it is of none."""
    start, colon, _ = name.partition(":")
    key, path = start + colon, Path(name)
    if key not in KINDS:
        # Unlike Path's methods, these take any text for a path.
        key = FOLDER if os.path.isdir(name) else path.suffix.lower() if os.path.isfile(name) else ""
    return KINDS.get(key)


def located_source(name: str) -> str:
    """Make the path in the name of a source absolute; known sets, names on the hub and what isn't there stay."""
    prefix = next((p for p in (shards.PREFIX, hub.PREFIX) if name.startswith(p)), "")
    path = Path(name.removeprefix(prefix))
    is_path = name not in KINDS and (path.exists() or prefix == shards.PREFIX)
    return f"{prefix}{path.absolute()}" if is_path else name


def _forms() -> str:
    *first, last = dict.fromkeys(kind.form for kind in KINDS.values())
    return f"{', '.join(first)} or {last}"


def open_source(data: Data, where: str = "data.source") -> Source:
    """Open the place with images that a config names; decodes nothing.

    Raises:
        UserError: the source is unknown, missing or empty.
    """
    kind = kind_of(data.source)
    if kind is None:
        raise UserError(f"{where} is {data.source!r}{looked_for(data.source)}, expected {_forms()}")
    return kind(data)


@lru_cache(maxsize=2)
def load_images(data: Data, channels: int, size: int, where: str = "data.source") -> Images:
    """Open the images a config names, for a model of the given channels and size.

    Raises:
        UserError: the source is unknown, missing, empty, damaged, or of another size or channel count.
    """
    return open_source(data, where).images(channels, size)


def open_images(
    source: str,
    size: int | None = None,
    channels: int | None = None,
    skip_damaged: bool = False,
    split: str = "train",
    column: str = "image",
) -> Images:
    """Open images whose size and channels are whatever the first of them has, or are brought to.

    They are looked at anew each time: whoever scores images may draw more of them.

    Raises:
        UserError: as ``load_images``; also where the images differ among themselves.
    """
    kind = kind_of(source)
    if kind is None:
        raise UserError(
            f"{source}{looked_for(source)} is no model and holds no images; expected a pipeline, {_forms()}"
        )
    fit: Literal["exact", "resize"] = "exact" if size is None else "resize"
    data = Data(source=source, split=split, column=column, fit=fit, skip_damaged=skip_damaged)
    if size is None or channels is None:
        found = kind(data).natural_shape()
        channels, size = channels or found[0], size or found[1]
    return kind(data).images(channels, size)
