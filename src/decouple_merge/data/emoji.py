"""Noto emoji, 64×64 colour images with names: a known data set, from the npm package emoji-datasource-google."""

import io
import json
import tarfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
import torch
from jaxtyping import UInt8

from ..errors import UserError
from ..seeds import generator
from ..storage.files import cache_folder, lock_of
from .arrays import ArraySource
from .decoding import decode

NAME = "noto-emoji"
SIZE = 64
FILE = "emoji-datasource-google-16.0.0.tgz"
URL = f"https://registry.npmjs.org/emoji-datasource-google/-/{FILE}"
SHA256 = "sha256:fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium light",
    "1F3FD": "medium",
    "1F3FE": "medium dark",
    "1F3FF": "dark",
}


class Emoji(NamedTuple):
    """One drawing.

    Attributes:
        name: of its file, code points in hexadecimal, ``1f600.png``.
        caption: name and kind, ``bison, animal mammal``, or name and skin tone, ``baby dark skin``.
        group: the number of the emoji that its skin tones share.
        kind: one of nine categories, ``Animals & Nature``.
    """

    name: str
    caption: str
    group: int
    kind: str


class NotoEmoji(ArraySource):
    """All of them; ``data.path`` is the folder with the package, where that is set."""

    form = captioned = NAME

    def path(self) -> Path:
        return _find(self.data.path)

    def read(self) -> UInt8[np.ndarray, "n 3 64 64"]:
        return read_emoji(self.data.path)[1]

    def natural_shape(self) -> tuple[int, int]:
        return 3, SIZE

    @property
    def groups(self) -> list[int]:
        return [drawing.group for drawing in read_emoji(self.data.path)[0]]

    def captions(self, field: str, classes: dict[str, int] | None) -> list[str]:
        return [drawing.caption for drawing in read_emoji(self.data.path)[0]]


@lru_cache(maxsize=2)
def read_emoji(folder: Path | None) -> tuple[list[Emoji], UInt8[np.ndarray, "n 3 64 64"]]:
    """Read all 3,786 emoji, composited on white, in a fixed random order in which the skin tones of one stay together.

    So the end of the data, which ``held_out: last`` holds out, is a sample of emoji.

    Args:
        folder: where the package's ``.tgz`` lies, as ``npm pack`` leaves it; None downloads it once.

    Raises:
        UserError: there is no such file, it can't be downloaded, or it is damaged.
    """
    path = _find(folder)
    try:
        with tarfile.open(path) as archive:
            files = {m.name: archive.extractfile(m).read() for m in archive if _is_needed(m)}  # type: ignore[union-attr]
        listed = json.loads(files["package/emoji.json"])
        order = torch.randperm(len(listed), generator=generator(NAME)).tolist()
        found = [drawing for group in order for drawing in _drawings(listed[group], group)]
        pixels = np.stack([_pixels(files[f"package/img/google/64/{emoji.name}"]) for emoji in found])
    except (OSError, EOFError, KeyError, ValueError, RecursionError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path}: not a whole package of Noto emoji ({error!r}); fetch it again from {URL}") from error
    return found, pixels


def _find(folder: Path | None) -> Path:
    if folder is not None:
        if not (folder / FILE).is_file():
            raise UserError(
                f"data.path is {folder}, which has no {FILE}; run npm pack emoji-datasource-google@16.0.0 there"
            )
        return folder / FILE
    try:
        # Processes that start together would each download it.
        with lock_of(cache_folder() / FILE):
            return Path(pooch.retrieve(URL, SHA256, fname=FILE, path=cache_folder()))
    except (OSError, ValueError) as error:  # of other bytes than expected, pooch says the latter
        raise UserError(
            f"Noto emoji can't be downloaded ({error}); run npm pack emoji-datasource-google@16.0.0 elsewhere and set "
            f"data.path to the folder with {FILE}"
        ) from error


def _is_needed(member: tarfile.TarInfo) -> bool:
    return member.name == "package/emoji.json" or member.name.startswith("package/img/google/64/")


def _drawings(listed: dict[str, Any], group: int) -> list[Emoji]:
    name, kind = listed["name"].lower().replace("-", " "), listed["category"]
    found = [Emoji(listed["image"], f"{name}, {listed['subcategory'].replace('-', ' ')}", group, kind)]
    for tones, variation in listed.get("skin_variations", {}).items():
        words = " and ".join(SKIN_TONES[tone] for tone in tones.split("-"))
        found.append(Emoji(variation["image"], f"{name} {words} skin", group, kind))
    return found


def _pixels(png: bytes) -> UInt8[np.ndarray, "3 64 64"]:
    return decode(io.BytesIO(png), 3, SIZE, "exact").pixels.numpy()
