"""Files that are whole or not there: atomic writes, JSON records, safetensors, and the cache folder."""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pooch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from .reading import MAX_LINES_BYTES, as_record, check_file, parse_json, read_text

# Folders in which something is being written, or was when its writer died.
LEFTOVERS = ".deme-*.tmp"
# At once, where a file is only read to be in the system's cache.
READ_BYTES = 1 << 20


def cache_folder() -> Path:
    """Say where downloads and reference statistics are kept: $DEME_CACHE, or the system's cache folder."""
    return Path(os.environ.get("DEME_CACHE") or pooch.os_cache("deme")).expanduser()


def is_disk_full(error: BaseException) -> bool:
    """Say whether an error, from Python or safetensors, means that the disk is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        text in str(error) for text in ("No space left", "disk is full")
    )


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path, a file's or a folder's, and rename it to ``path`` on success; links are written through.

    Several processes may write one path: each has a temporary path of its own, and the last one's result stays.

    Raises:
        UserError: the disk is full; nothing that was there before is lost.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with workshop(path.parent) as place:
        new = place / path.name
        try:
            yield new
            if path.is_dir():
                _replace_folder(path, new, place)
            else:
                os.replace(new, path)
        except BaseException as error:
            _restore(place)
            if is_disk_full(error):
                raise UserError(
                    f"{path}: the disk is full; what was finished is safe: make room and run the same command again"
                ) from error
            raise


@contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """Make a hidden folder for what is not finished; the lock in it says that its maker is alive."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=".deme-", suffix=".tmp", dir=folder))
        lock = FileLock(place / ".lock")
        lock.acquire()
        if (place / ".lock").exists():  # Else it was taken for a leftover, between these lines.
            break
    try:
        yield place
    finally:
        lock.release()
        shutil.rmtree(place, ignore_errors=True)


def _replace_folder(path: Path, new: Path, place: Path) -> None:
    # A folder can't be replaced in one step: the old one is moved aside, then removed.
    old = place / ".old" / path.name
    old.parent.mkdir()
    with lock_of(path):
        if path.is_dir():
            os.replace(path, old)
        os.replace(new, path)
    # From now on it is no longer what ``_restore`` would put back.
    os.replace(old.parent, place / ".replaced")


def _restore(place: Path) -> None:
    """Put back a folder that was moved aside for one that never came."""
    for old in place.glob(".old/*"):
        if not (place.parent / old.name).exists():
            os.replace(old, place.parent / old.name)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of ``atomic_path`` in a folder, and put back what they had moved aside."""
    for place in folder.glob(LEFTOVERS):
        lock = FileLock(place / ".lock")
        try:
            # Who has just made the folder may not have locked it yet.
            if not (place / ".lock").exists() and time.time() - place.stat().st_mtime < 60:
                continue
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        _restore(place)
        lock.release()
        shutil.rmtree(place, ignore_errors=True)


def lock_of(path: Path) -> FileLock:
    """Make the lock of a file that is no place for locks itself: it lies in the cache folder, under the path's hash."""
    name = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:24]
    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


def copy_folder(source: Path, target: Path, ignore: Callable[[str, list[str]], set[str]]) -> None:
    """Copy a folder, of which some may not be written to, as one that its owner may write.

    Args:
        ignore: as of ``shutil.copytree``.
    """
    shutil.copytree(source, target, ignore=ignore, copy_function=shutil.copyfile)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        folder.chmod(folder.stat().st_mode | stat.S_IRWXU)


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
    """Add one line to a JSON-lines file; a kill leaves the old lines or the new ones, never half a line.

    Several processes may: each waits for its turn.
    """
    with lock_of(path):
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        write_text(path, old + ("\n" if old and not old.endswith("\n") else "") + json.dumps(record) + "\n")


def read_records(path: Path, **fields: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Read a JSON-lines file, whose records have some fields of some types; a missing one has no records.

    Raises:
        UserError: a line is no such record; it is named.
    """
    if not path.exists():
        return []
    advice = "mend or remove the line"
    records = []
    for number, line in enumerate(read_text(path, advice, MAX_LINES_BYTES).splitlines(), start=1):
        where = f"{path}, line {number}"
        records.append(as_record(parse_json(line, where, advice), where, advice, **fields))
    return records


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Raises:
        UserError: the file is missing or damaged.
    """
    check_file(path, "remove it to make it again")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no whole safetensors file ({error}); remove it to make it again") from error


def read_ahead(paths: Iterable[Path]) -> None:
    """Have files read into the system's cache by a thread, so that who maps them later needn't wait for the disk."""

    def read() -> None:
        for path in paths:
            # What can't be read is told of by who needs it.
            with suppress(OSError), path.open("rb", buffering=0) as file:
                while file.readinto(chunk):
                    pass

    chunk = bytearray(READ_BYTES)
    Thread(target=read, name="read ahead", daemon=True).start()
