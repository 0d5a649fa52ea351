"""Fashion-MNIST, 28×28 grey images of clothes: a known data set, from Debian's package or its authors."""

import gzip
import zlib
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
MD5 = {"train": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d", "test": "md5:bef4ecab320f06d8554ea6380940ec79"}


class FashionMnist(ArraySource):
    """One split, from ``data.path`` where that is set."""

    form = "fashion-mnist"

    def path(self) -> Path:
        folder, split = self.data.path, self.data.split
        if split not in FILES:
            raise UserError(f"data.split is {split!r}, expected 'train' or 'test' for fashion-mnist")
        name = FILES[split]
        if ((folder or FOLDER) / name).is_file():
            return (folder or FOLDER) / name
        if folder:
            raise UserError(
                f"data.path is {folder}, which has no {name}; expected Fashion-MNIST's four .gz files there"
            )
        try:
            with lock_of(cache_folder() / name):
                return Path(pooch.retrieve(URL + name, MD5[split], path=cache_folder()))
        except OSError as error:
            raise UserError(
                f"Fashion-MNIST is neither in {FOLDER} nor can it be downloaded ({error}); "
                "install Debian's dataset-fashion-mnist, or set data.path to a folder that has it"
            ) from error

    def read(self) -> UInt8[np.ndarray, "n 1 h w"]:
        return _read_idx(self.path())

    def natural_shape(self) -> tuple[int, int]:
        return 1, 28


def _read_idx(path: Path) -> UInt8[np.ndarray, "n 1 h w"]:
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    header = np.frombuffer(raw[:16], dtype=">u4")
    if len(header) < 4 or header[0] != 0x803 or len(raw) != 16 + header[1:].prod():
        raise UserError(f"{path}: not a whole IDX image file; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(header[1], 1, header[2], header[3]).copy()
