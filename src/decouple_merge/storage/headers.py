"""What safetensors files hold, by their headers and as bytes: no tensor is made, so torch isn't imported."""

import hashlib
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .reading import check_file

# What the format calls a dtype, by what torch calls it.
DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# Attention layers of checkpoints older than diffusers 0.15, by what every diffusers since calls them.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, and what it is.

    Attributes:
        name: its key in the file.
        dtype: as the format calls it.
        start, stop: of its bytes in the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Headers:
    """What the files of one model hold.

    Attributes:
        places: key to place, in the order of the keys.
        metadata: of the first file.
    """

    places: dict[str, Place]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all tensors."""
        return sum(place.stop - place.start for place in self.places.values())

    @property
    def num_elements(self) -> dict[str, int]:
        """Count the numbers of each dtype."""
        counts: dict[str, int] = {}
        for place in self.places.values():
            counts[place.dtype] = counts.get(place.dtype, 0) + math.prod(place.shape)
        return counts

    def sha256(self) -> str:
        """Hash names, dtypes, shapes and bytes in the order of the names, as ``tensors.hash_tensors`` does."""
        digest, opened = hashlib.sha256(), dict[Path, memoryview]()
        for key, place in self.places.items():
            if place.path not in opened:
                with place.path.open("rb") as file:
                    opened[place.path] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            digest.update(f"{key} torch.{DTYPE_NAMES[place.dtype]} {place.shape}".encode())
            digest.update(opened[place.path][place.start : place.stop])
        return digest.hexdigest()


def read_headers(files: list[Path]) -> Headers:
    """Read what the files of one model hold; old names of attention layers become those of today.

    Raises:
        UserError: a file is missing, no whole safetensors file, or has tensors of a kind that can't be added.
    """
    places, metadata, unknown = dict[str, Place](), dict[str, str](), []
    for path in files:
        found, of_file = _read_header(path)
        metadata = metadata or of_file
        unknown += [f"{place.name} ({place.dtype})" for place in found if place.dtype not in DTYPE_NAMES]
        places |= {place.name: place for place in found}
    if unknown:
        raise UserError(
            f"{files[0]}: {len(unknown)} tensors are of a kind that can't be added, {unknown[0]} among them; "
            f"expected {', '.join(DTYPE_NAMES)}: merge the unquantised model and quantise the result"
        )
    if any(".proj_attn." in name for name in places):
        places = {_renamed(name): place for name, place in places.items()}
    return Headers(dict(sorted(places.items())), metadata)


def side_by_side(parts: Mapping[str, Headers]) -> Headers:
    """Put several networks into one, the keys of each behind its name and a dot; one alone stays as it is."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    places = {f"{name}.{key}": place for name, part in parts.items() for key, place in part.places.items()}
    return Headers(dict(sorted(places.items())), next((part.metadata for part in parts.values() if part.metadata), {}))


def _read_header(path: Path) -> tuple[list[Place], dict[str, str]]:
    check_file(path, "give a .safetensors file")
    try:
        # The library checks what is read below: sizes, offsets, and that nothing overlaps.
        with safe_open(path, framework="np") as checked:
            metadata = checked.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no whole safetensors file ({error}); fetch or copy it again") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    places = []
    for name, entry in header.items():
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        places.append(Place(path, name, entry["dtype"], tuple(entry["shape"]), start, stop))
    return places, metadata


def _renamed(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
