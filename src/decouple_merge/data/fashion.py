"""Fashion-MNIST, 28×28 grey images of clothes: a known data set, from Debian's package or its authors."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pooch
from jaxtyping import UInt8

from ..errors import UserError
from ..storage.files import cache_folder, lock_of
from .arrays import ArraySource

# Debian's dataset-fashion-mnist puts its files here.
FOLDER = Path("/usr/share/datasets/fashion-mnist")
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FILES = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}
LABELS = {"train": "train-labels-idx1-ubyte.gz", "test": "t10k-labels-idx1-ubyte.gz"}
MD5 = {
    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
    "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
# How IDX files of bytes begin that have one dimension, and three.
MAGIC = {1: 0x801, 3: 0x803}


class FashionMnist(ArraySource):
    """One split, from ``data.path`` where that is set."""

    form = "fashion-mnist"

    def path(self) -> Path:
        return self._find(FILES)

    def _find(self, files: dict[str, str]) -> Path:
        folder, split = self.data.path, self.data.split
        if split not in files:
            raise UserError(f"fashion-mnist has no split {split!r}, expected 'train' or 'test'")
        name = files[split]
        if ((folder or FOLDER) / name).is_file():
            return (folder or FOLDER) / name
        if folder:
            raise UserError(
                f"data.path is {folder}, which has no {name}; expected Fashion-MNIST's four .gz files there"
            )
        try:
            with lock_of(cache_folder() / name):
                return Path(pooch.retrieve(URL + name, MD5[name], path=cache_folder()))
        except (OSError, ValueError) as error:  # of other bytes than expected, pooch says the latter
            raise UserError(
                f"Fashion-MNIST is neither in {FOLDER} nor can it be downloaded ({error}); "
                "install Debian's dataset-fashion-mnist, or set data.path to a folder that has it"
            ) from error

    def read(self) -> UInt8[np.ndarray, "n 1 h w"]:
        return _read_idx(self.path(), 3)[:, None]

    @property
    def class_names(self) -> Sequence[str]:
        # Not its labels: what is held out by class would be other images than those that our bases left out.
        numbers = _read_idx(self._find(LABELS), 1)
        if numbers.max(initial=0) >= len(CLASSES):
            raise UserError(f"{self._find(LABELS)}: found class {numbers.max()}, expected 0 to 9; fetch it again")
        return [CLASSES[number] for number in numbers]

    def natural_shape(self) -> tuple[int, int]:
        return 1, 28


def _read_idx(path: Path, num_dims: int) -> UInt8[np.ndarray, "n ..."]:
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    size = 4 + 4 * num_dims
    header = np.frombuffer(raw[:size] if len(raw) >= size else bytes(4), dtype=">u4")
    if header[0] != MAGIC[num_dims] or len(raw) != size + header[1:].prod(dtype=np.int64):
        raise UserError(f"{path}: not a whole IDX file of bytes in {num_dims} dimensions; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=size).reshape(header[1:]).copy()
