"""Safetensors one tensor at a time: read from memory-mapped files in any layout, written as a stream."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError
from .headers import DTYPE_NAMES, read_headers

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, of_torch) for name, of_torch in DTYPE_NAMES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Key to dtype and shape, in the order in which tensors lie in a file.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def num_bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Count the bytes of a tensor."""
    return dtype.itemsize * math.prod(shape)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is; ``name`` is its key in the file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of one model, read when they are asked for; the operating system may drop what was read.

    Attributes:
        entries: key to entry, in the order of the keys.
        metadata: of the first file.
    """

    def __init__(self, files: list[Path]) -> None:
        headers = read_headers(files)
        self.metadata = headers.metadata
        self.entries = {k: Entry(p.path, p.name, DTYPES[p.dtype], p.shape) for k, p in headers.places.items()}
        self._open = {path: safe_open(path, framework="pt") for path in files}
        self._sha256: str | None = None

    @classmethod
    def side_by_side(cls, parts: Mapping[str, "TensorFiles"]) -> "TensorFiles":
        """Put several networks into one, the keys of each behind its name and a dot; one alone stays as it is."""
        if len(parts) == 1:
            return next(iter(parts.values()))
        joined = cls([])
        for name, files in parts.items():
            joined.entries |= {f"{name}.{key}": entry for key, entry in files.entries.items()}
            joined.metadata = joined.metadata or files.metadata
            joined._open |= files._open
        joined.entries = dict(sorted(joined.entries.items()))
        return joined

    def __getitem__(self, key: str) -> Tensor:
        entry = self.entries[key]
        return self._open[entry.path].get_tensor(entry.name)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all tensors."""
        return sum(num_bytes_of(e.dtype, e.shape) for e in self.entries.values())

    def sha256(self) -> str:
        """Hash names, dtypes, shapes and bytes in the order of the names, however they are spread over files; once."""
        if self._sha256 is None:
            self._sha256 = hash_tensors((key, self[key]) for key in self.entries)
        return self._sha256


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, dtypes, shapes and bytes of tensors, which come in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """View a tensor's bytes, on the CPU and contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor is without NaN and infinity; integers always are."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    # One pass, and no mask of the tensor's size: a NaN goes through both ends, an infinity is one of them.
    ends = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return all(bool(torch.isfinite(end)) for end in ends)


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Require that weights are finite: a training would tell of others by its loss alone.

    Raises:
        UserError: names the first tensor that has NaN or infinity.
    """
    if found := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
        others = f" (and {len(found) - 1} others)" if found[1:] else ""
        raise UserError(
            f"{where}: {found[0]}{others} has NaN or infinity, expected finite weights; fetch or copy them again, or "
            "take another model"
        )


def write_stream(
    path: Path, layout: Layout, tensors: Iterator[tuple[str, Tensor]], metadata: dict[str, str]
) -> Iterator[int]:
    """Write one safetensors file from tensors that come in the order of the layout; yields the bytes of each.

    No more than one tensor is held. Metadata and layout are those of the safetensors format, version 0.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key, (dtype, shape) in layout.items():
        end = offset + num_bytes_of(dtype, shape)
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, (key, tensor) in zip(layout, tensors, strict=True):
            assert (key, (tensor.dtype, tuple(tensor.shape))) == (expected, layout[expected])
            file.write(raw_bytes(tensor))
            yield tensor.nbytes
        file.flush()
        os.fsync(file.fileno())


def replace_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Put other metadata of the same length in a safetensors file's header; the tensors stay where they are."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": metadata}
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def shards(layout: Layout, max_bytes: int) -> list[Layout]:
    """Split a layout into files of at most ``max_bytes``; a tensor that is larger has a file of its own.

    Wide dtypes come first, as safetensors itself writes, so that every tensor is aligned to its element.
    """
    groups: list[Layout] = [{}]
    size = 0
    for key in sorted(layout, key=lambda key: (-layout[key][0].itemsize, key)):
        num_bytes = num_bytes_of(*layout[key])
        if groups[-1] and size + num_bytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][key] = layout[key]
        size += num_bytes
    return groups
