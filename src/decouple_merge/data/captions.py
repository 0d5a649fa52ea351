"""Texts of images: captions from metadata.jsonl or a column of a data set, or the prompts they were drawn from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Data
from . import emoji
from .batches import Images
from .prompts import read_lines
from .shards import Shards
from .sources import Column, DecodedImages, file_names

METADATA = "metadata.jsonl"


def load_captions(images: Images, data: Data, classes: dict[str, int] | None = None) -> list[str]:
    """Read the caption of each image that ``load_images`` found; for a class-conditional base, its class.

    A folder has them in its ``metadata.jsonl``, in lines such as ``{"file_name": "a/1.png", "text": "a red cat"}``; a
    ``datasets`` data set in a column; webdataset shards in a ``.txt`` or ``.json`` beside the image.
    ``data.caption_column`` names the field or column. Classes are names or numbers of the base's, and a folder may
    have them as sub-folders; sub-folders of other names are the classes in alphabetical order, as of ImageNet's, where
    they are as many. Noto emoji are named.

    Args:
        classes: of a class-conditional base, by name and number.

    Raises:
        ValueError: the source has no captions, or an image has none, or one is no text.
    """
    if data.source == emoji.SOURCE:
        return [drawing.caption for drawing in emoji.read_emoji(data.path)[0]]
    if isinstance(images, DecodedImages) and isinstance(images.items, Column):
        captions = _column(images.items, data)
    elif isinstance(images, DecodedImages) and isinstance(images.items, Shards):
        captions = images.items.captions(data.caption_column)
    elif isinstance(images, DecodedImages) and Path(data.source).is_dir():
        in_folders = classes is not None and not (Path(data.source) / METADATA).is_file()
        captions = _folders(images.items, data, classes) if in_folders else _metadata(images.items, data)  # type: ignore[arg-type]
    else:
        raise ValueError(
            f"data.source {data.source!r} has no captions, which a text-to-image base needs; expected a folder of "
            f"images with {METADATA}, or of classes in sub-folders for a class-conditional base, webdataset:SHARDS, "
            f"datasets:NAME or {emoji.SOURCE}"
        )
    if classes is not None:
        captions = [str(caption) if isinstance(caption, int) else caption for caption in captions]
    kept = [captions[i] for i in images.kept]
    wrong = [i for i, caption in zip(images.kept, kept, strict=True) if not isinstance(caption, str)]
    if wrong:
        raise ValueError(
            f"data.source {data.source!r}: {len(wrong)} of {len(kept)} captions are no text, the first of image "
            f"{wrong[0]}: {captions[wrong[0]]!r}; expected one text each in {data.caption_column!r}"
        )
    return kept


def _column(column: Column, data: Data) -> list[Any]:
    rows, name = column.rows, data.caption_column
    if name not in rows.column_names:
        raise ValueError(
            f"data set {data.source!r} has columns {', '.join(rows.column_names)}, expected {name!r} for captions: "
            "set data.caption_column"
        )
    return list(rows[name])


def _metadata(files: Sequence[Path], data: Data) -> list[Any]:
    path, column = Path(data.source) / METADATA, data.caption_column
    if not path.is_file():
        raise ValueError(
            f"{data.source} has no {METADATA}, which holds the captions; expected there a line for each image, such as "
            f'{{"file_name": "{files[0].name}", "{column}": "…"}}'
        )
    captions = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            captions[Path(data.source) / record["file_name"]] = record[column]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected JSON with file_name and {column!r} ({error!r}), found {line[:80]!r}; "
                "set data.caption_column where captions have another name"
            ) from error
    if missing := [file for file in files if file not in captions]:
        raise ValueError(f"{path}: {len(missing)} of {len(files)} images have no caption, {missing[0]} among them")
    return [captions[file] for file in files]


def _folders(files: Sequence[Path], data: Data, classes: dict[str, int]) -> list[str]:
    parts = [file.relative_to(data.source).parts for file in files]
    found, num = sorted({p[0] for p in parts if len(p) > 1}), len(set(classes.values())) - 1
    if loose := [file for file, p in zip(files, parts, strict=True) if len(p) == 1]:
        raise ValueError(
            f"{data.source}: {len(loose)} images are in no class, {loose[0].name} among them; expected sub-folders "
            f"named by class, or {METADATA}"
        )
    if all(name in classes for name in found):
        return [p[0] for p in parts]
    if len(found) == num:
        return [str(found.index(p[0])) for p in parts]
    unknown = [name for name in found if name not in classes]
    raise ValueError(
        f"{data.source}: found {len(found)} sub-folders, of which {', '.join(unknown[:5])} are no classes of the base; "
        f"expected its names or numbers below {num}, or {num} sub-folders in the order of its classes"
    )


def texts_of(images: Images, source: str, prompts: list[str], first: int) -> list[str]:
    """Say what images are to show: their prompts, or where there are none their captions.

    Where files are numbered, as ``deme sample`` names them, the prompt of image n is number n - first; otherwise that
    of the k-th image in the order of names is number k. After the last prompt comes the first again.

    Raises:
        ValueError: a number is missing, or as ``load_captions``.
    """
    if not prompts:
        return load_captions(images, Data(source=source))
    stems = [path.stem for path in file_names(images)]
    places = list(range(len(images)))
    # By name, 10 comes before 2: the order of the images isn't that of the prompts.
    if stems and all(stem.isdecimal() for stem in stems):
        places = [int(stem) - first for stem in stems]
        if sorted(places) != list(range(len(images))):
            raise ValueError(
                f"{source}: found {len(places)} images numbered {first + min(places)} to {first + max(places)}, "
                f"expected every number from {first} to {first + len(places) - 1}: give the number of the image of the "
                "first prompt as --seed, and draw or rename what is missing"
            )
    return [prompts[place % len(prompts)] for place in places]
