"""Files that are whole or not there: atomic writes, JSON records, safetensors, and the cache folder."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pooch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError


def cache_folder() -> Path:
    """Say where downloads and reference statistics are kept: $DEME_CACHE, or the system's cache folder."""
    return Path(os.environ.get("DEME_CACHE") or pooch.os_cache("deme"))


def is_disk_full(error: BaseException) -> bool:
    """Say whether an error, from Python, safetensors or SQLite, means that the disk is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        text in str(error) for text in ("No space left", "disk is full")
    )


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``, a file's or a folder's, and rename it into place on success.

    Raises:
        UserError: the disk is full; nothing that was there before is lost.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)
    try:
        yield temporary
        # A folder can't be replaced in one step: the old one is moved aside, then removed.
        old = path.with_name(f".{path.name}.old")
        if path.is_dir():
            _remove(old)
            os.replace(path, old)
        os.replace(temporary, path)
        _remove(old)
    except BaseException as error:
        _remove(temporary)
        if is_disk_full(error):
            raise UserError(
                f"{path}: the disk is full; what was finished is safe: make room and run the same command again"
            ) from error
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what a kill in the middle of ``atomic_path`` left beside a path that is whole."""
    if path.exists():
        for kind in ("tmp", "old"):
            _remove(path.with_name(f".{path.name}.{kind}"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSON-lines file atomically."""
    write_text(path, "".join(json.dumps(r) + "\n" for r in records))


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a JSON-lines file; a kill leaves the old lines or the new ones, never half a line."""
    write_records(path, [*read_records(path), record])


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a missing one has no records."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no whole safetensors file ({error}); remove it to make it again") from error
