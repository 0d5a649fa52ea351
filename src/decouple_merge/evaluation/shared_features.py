"""Features of images that several workers draw together: a share of the batches is a file, made by whoever is free."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..errors import NotFiniteError
from ..storage.files import read_tensors, write_tensors
from ..storage.locks import free_lock
from .score import Features

# More would be many small files, fewer too few for many workers.
MAX_SHARES = 1024
SECONDS_BETWEEN_LOOKS = 0.1

# Draws a share of the batches, and extracts their features.
Draw = Callable[[slice], Iterator[Features]]


class SharedFeatures:
    """The features of one set of images in a folder that all workers reach: a file for each share of the batches.

    A share depends on its seeds alone, so that it has the same bits whoever draws it. It is locked while it is drawn;
    the system frees the lock when its holder dies, and the share is drawn again. Shares that a killed run left are
    taken as they are.

    Args:
        folder: named by all that the images and their features depend on.
        num_images, batch_size: of the set, and of a batch.

    Attributes:
        seconds_of_others: that the shares took which were read here and drawn elsewhere, less what was waited for them.
    """

    def __init__(self, folder: Path, num_images: int, batch_size: int) -> None:
        self.folder, self.size = folder, min(batch_size, num_images)
        num_batches = -(-num_images // self.size)
        each = -(-num_batches // MAX_SHARES)
        self.shares = [slice(first, first + each) for first in range(0, num_batches, each)]
        self.seconds_of_others = 0.0
        self._own: set[int] = set()

    @property
    def is_begun(self) -> bool:
        """Say whether somebody wants these features now."""
        return self.folder.is_dir()

    @property
    def is_complete(self) -> bool:
        """Say whether all shares are there."""
        return all(self._path(number).exists() for number in range(len(self.shares)))

    def begin(self) -> None:
        """Let others help."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def end(self) -> None:
        """Remove the files, which nobody needs any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def draw_next(self, draw: Draw, again: bool = False) -> bool:
        """Draw the first share that nobody has begun; says whether there was one.

        Where images are NaN or infinite, the file says so in the place of features.

        Args:
            again: also look for shares whose drawer died. It takes a lock each, which many workers at once had better
                leave to one.
        """
        found = {path.name for path in self.folder.glob("*")}
        missing = [number for number in range(len(self.shares)) if self._path(number).name not in found]
        begun = [number for number in missing if self._lock(number).name in found]
        free = sorted(set(missing) - set(begun))
        return any(self._try(number, draw) for number in (*free, *(begun if again else [])))

    def _try(self, number: int, draw: Draw) -> bool:
        """Draw a share, unless it is there, somebody is at it, or nobody wants it any more; says whether it was."""
        if not self.is_begun:
            return False
        with free_lock(self._lock(number)) as is_mine:
            if is_mine and not self._path(number).exists():
                self._draw(self._path(number), self.shares[number], draw)
                self._own.add(number)
                return True
        return False

    def _draw(self, path: Path, share: slice, draw: Draw) -> None:
        started, rows, said = time.monotonic(), dict[str, list[torch.Tensor]](), dict[str, str]()
        try:
            for features in draw(share):
                for (extractor, output), found in features.items():
                    rows.setdefault(f"{extractor}/{output}", []).append(found.cpu())
        except NotFiniteError as error:
            rows, said = {}, {"failure": str(error)}
        said["seconds"] = str(time.monotonic() - started)
        # Otherwise others have all they wanted meanwhile.
        if self.is_begun:
            write_tensors(path, {key: torch.cat(found) for key, found in rows.items()}, said)

    def gather(self, draw: Draw) -> Iterator[Features]:
        """Yield the features of all batches in their order; draws what nobody else does, and waits for the rest.

        Raises:
            NotFiniteError: of the first share that has no features, as who draws alone would raise it.
        """
        self.begin()
        for number in range(len(self.shares)):
            while not self._path(number).exists():
                if not self.draw_next(draw, again=True):
                    self.seconds_of_others -= SECONDS_BETWEEN_LOOKS
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            yield from self._read(number)

    def _read(self, number: int) -> Iterator[Features]:
        found, said = read_tensors(self._path(number))
        if number not in self._own:
            self.seconds_of_others += float(said["seconds"])
        if "failure" in said:
            raise NotFiniteError(said["failure"])
        batches = {key: rows.split(self.size) for key, rows in found.items()}
        for rows in zip(*batches.values(), strict=True):
            yield {_output(key): batch for key, batch in zip(batches, rows, strict=True)}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def _lock(self, number: int) -> Path:
        return self.folder / f"{number}.lock"


def _output(key: str) -> tuple[str, str]:
    extractor, _, output = key.partition("/")
    return extractor, output
