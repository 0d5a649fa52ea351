"""Images that are decoded when they are asked for, after each was decoded once to see that it can be."""

import hashlib
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import Data
from ..errors import UserError
from ..storage.files import cache_folder, write_text
from ..storage.locks import make_once
from ..storage.reading import AGAIN, MAX_LINES_BYTES, read_record
from .decoding import VERSION, DamagedError, Decoded, centre_square, decode, has_colour, open_image
from .images import Images, Source
from .names import PassedOver

_log = logging.getLogger(__name__)
# Images that are decoded, or wait for it, at once.
BLOCK = 512


class EncodedSource(Source):
    """A source whose images are files, or rows of a ``datasets`` data set: each is what ``decode`` takes.

    Attributes:
        passed_over: what else is there.
    """

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.passed_over = PassedOver()

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError

    def natural_shape(self) -> tuple[int, int]:
        found = _remembered(repr((self.identity, self.data.skip_damaged, VERSION)), self._look)
        return found["channels"], found["width"]

    def _look(self) -> dict[str, int]:
        # One colour file makes all colour: the first may be a grey one by chance.
        channels = 3 if any(self._readable(has_colour)) else 1
        return {"channels": channels, "width": next((o.image.width for o in self._readable(open_image)), 0)}

    def _readable(self, read: Callable[[Any], Any]) -> Iterator[Any]:
        """Read the images one after the other; those that can't be are left out where asked."""
        for index in range(len(self)):
            try:
                yield read(self[index])
            except DamagedError:
                if not self.data.skip_damaged:
                    raise

    def images(self, channels: int, size: int) -> "DecodedImages":
        return DecodedImages(self, channels, size)


class DecodedImages(Images):
    """Images of a source, decoded when they are asked for.

    Making them decodes every image once: a bad one found hours into a training loses those hours. What was found is
    kept under the identity of the source, so that the next start decodes nothing.

    Attributes:
        sizes: width and height of each before it was cut.

    Raises:
        UserError: an image can't be decoded and isn't to be left out, has another size or channel count than is asked
            for, or none is left.
    """

    source: EncodedSource

    def __init__(self, source: EncodedSource, channels: int, size: int) -> None:
        self.source = source
        self.channels, self.size, self.fit = channels, size, source.data.fit
        key = repr((source.identity, channels, size, self.fit, source.data.skip_damaged, VERSION))
        record = _remembered(key, self._decode_all)
        self.sha256: str = record["sha256"]
        self.sizes: Sequence[Sequence[int]] = record["sizes"]
        left_out = set(record["damaged"])
        self.kept = [i for i in range(len(source)) if i not in left_out] if left_out else range(len(source))
        if not self.kept:
            raise UserError(f"{source.data.source}: none of the {len(source)} images can be used")
        self._tell(len(left_out), record["num_first"])

    def _tell(self, num_damaged: int, num_first: int) -> None:
        """Say what of the source is not used, once for all processes of a command."""
        notes = [f"passed over {self.source.passed_over}"] if self.source.passed_over else []
        notes += [f"left out {num_damaged:,} that can't be decoded"] if num_damaged else []
        notes += [f"of {num_first:,} files with several pictures the first is used"] if num_first else []
        if notes and multiprocessing.parent_process() is None:
            _log.warning("%s: %s images; %s", self.source.data.source, f"{len(self.kept):,}", "; ".join(notes))

    def _decode_all(self) -> dict[str, Any]:
        damaged, sizes, num_first, digest = [], [], 0, hashlib.sha256()
        with ThreadPoolExecutor() as pool:
            # In blocks: what waits, and what is decoded too early, stays in memory.
            whole = range(len(self.source))
            blocks = (whole[first : first + BLOCK] for first in whole[::BLOCK])
            for index, found in enumerate(chain.from_iterable(pool.map(self._try_decode, block) for block in blocks)):
                if found is None:
                    damaged.append(index)
                else:
                    sizes.append(found.original)
                    num_first += found.is_first
                    digest.update(found.pixels.numpy().data)
        return {"damaged": damaged, "sizes": sizes, "num_first": num_first, "sha256": digest.hexdigest()}

    def _try_decode(self, index: int) -> Decoded | None:
        try:
            return decode(self.source[index], self.channels, self.size, self.fit)
        except DamagedError:
            if self.source.data.skip_damaged:
                return None
            raise

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> UInt8[Tensor, "c h w"]:
        return decode(self.source[self.kept[index]], self.channels, self.size, self.fit).pixels

    def frames(self, indices: Sequence[int]) -> Float[Tensor, "n 6"]:
        rows = []
        for width, height in (self.sizes[i] for i in indices):
            left, top, side = centre_square(width, height)
            rows.append([height, width, round(top * self.size / side), round(left * self.size / side)])
        return torch.tensor([[*row, self.size, self.size] for row in rows], dtype=torch.float32)


def _remembered(key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    known = cache_folder() / "decoded" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    make_once(known, lambda: write_text(known, json.dumps(compute(), separators=(",", ":"))))
    return read_record(known, AGAIN, max_bytes=MAX_LINES_BYTES)
