"""Arrays of NumPy's files, checked before anything is allocated for them."""

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, is_ours

# Deflate makes nothing smaller than by this factor.
MAX_DEFLATED = 1032


@contextmanager
def open_arrays(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Open the arrays of an npz file, by name, or the one of an npy file; each is read when it is asked for.

    Raises:
        UserError: the file is damaged, or what it says is more than it holds or than this machine's memory; also where
            an array is read that is damaged.
    """
    with _reading(path), path.open("rb") as file:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    if entry.filename.endswith(".npy"):
                        with archive.open(entry) as member:
                            _check_size(path, member, min(entry.file_size, MAX_DEFLATED * entry.compress_size))
            with np.load(path, allow_pickle=False) as arrays:
                yield arrays
        else:
            _check_size(path, file, path.stat().st_size)
            yield {"arr_0": np.load(path, allow_pickle=False)}


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the arrays of an npz file, by name, or of the one of an npy file, from their headers.

    Raises:
        UserError: the file is damaged.
    """
    with _reading(path), path.open("rb") as file:
        if path.suffix.lower() != ".npz":
            return {"arr_0": _read_header(file)[0]}
        found = {}
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as member:
                        found[name.removesuffix(".npy")] = _read_header(member)[0]
        return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # NumPy lets through what Python's parser, zipfile and zlib raise
        if is_ours(error):
            raise
        raise UserError(f"{path}: can't be read as plain arrays ({error}); make or fetch it again") from error


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _check_size(path: Path, file: Any, num_bytes: int) -> None:
    """Require of an array's header that no more is allocated than the file holds, in bytes, and the memory."""
    shape, dtype = _read_header(file)
    size, memory = math.prod(shape) * dtype.itemsize, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not 0 <= size <= num_bytes:
        raise UserError(
            f"{path}: an array says {size:,} bytes of {dtype}, and has at most {num_bytes:,}; fetch it again"
        )
    if size > memory:
        raise UserError(
            f"{path}: an array has {size:,} bytes of {dtype}, and this machine's memory {memory:,}; give a folder, an "
            "archive or shards of images"
        )
