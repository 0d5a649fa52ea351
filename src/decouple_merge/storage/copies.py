"""A copy of a folder at a URL, such as a bucket: only what is whole, only what changed; the adapter to fsspec."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..errors import UserError, is_ours
from .files import write_json
from .locks import hold
from .reading import AGAIN, read_record

# Of a run's folder: what is in the making, who is at work, and the record of what was copied.
LEFT_OUT = ("state", "locks", "shares", "copied.json")
CHUNK_BYTES = 1 << 24


def check_url(url: str, folder: Path) -> None:
    """Require that fsspec has the protocol of a URL, and that it is another place than the folder; connects to nothing.

    Raises:
        UserError: as said.
    """
    filesystem, root = _open(url)
    if isinstance(filesystem, LocalFileSystem):
        place, own = Path(root).resolve(), folder.resolve()
        if place == own or place in own.parents or own in place.parents:
            raise UserError(f"results is {url}, which lies in {folder}, or that in it: give another place")


def copy_changed(folder: Path, url: str) -> Iterator[str]:
    """Copy the files of a folder that the URL lacks or that changed; yields their names, as they are copied.

    What was copied before and is gone from the folder is removed there. A file is there whole or not at all, where the
    file system has transactions, as object stores do.

    Raises:
        UserError: it can't be written there.
    """
    filesystem, root = _open(url)
    with hold(folder / "locks" / "copy.lock", "copying results", wait=True):
        record = folder / "copied.json"
        known = read_record(record, AGAIN, url=str, files=dict) if record.exists() else {}
        copied: dict[str, list[int]] = known["files"] if known.get("url") == url else {}
        try:
            yield from _copy(folder, copied, filesystem, root)
        except Exception as error:
            if is_ours(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"results is {url}, which can't be written ({reason}); check the address and your credentials, and run "
                "the same command again"
            ) from error
        finally:
            write_json(record, {"url": url, "files": copied})


def _copy(folder: Path, copied: dict[str, list[int]], filesystem: Any, root: str) -> Iterator[str]:
    filesystem.makedirs(root, exist_ok=True)
    filesystem.invalidate_cache()
    there = {path.removeprefix(root).lstrip("/"): size for path, size in filesystem.du(root, total=False).items()}
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name, path in found.items():
        stamp = [path.stat().st_size, path.stat().st_mtime_ns]
        if copied.get(name) != stamp or there.get(name) != stamp[0]:
            target = f"{root.rstrip('/')}/{name}"
            filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            # Renamed, or sent whole, at the end of the transaction.
            with filesystem.transaction, path.open("rb") as source, filesystem.open(target, "wb") as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            copied[name] = stamp
            yield name
    for name in sorted(copied.keys() - found.keys()):
        if name in there:
            filesystem.rm_file(f"{root.rstrip('/')}/{name}")
        del copied[name]


def _files(folder: Path) -> list[Path]:
    """List the files of a folder that are whole: neither hidden nor locks, and in no folder that is left out."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != ".lock"
        and not any(part.startswith(".") or part in LEFT_OUT for part in path.relative_to(folder).parts)
    ]


def _open(url: str) -> tuple[Any, str]:
    if "://" not in url:
        raise UserError(f"results is {url!r}, expected a URL, such as s3://bucket/run or file:///disk/run")
    try:
        filesystem, root = fsspec.url_to_fs(url)
    except Exception as error:
        # Protocols are packages of their own, with errors of their own.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        protocol = url.partition("://")[0]
        raise UserError(
            f"results is {url!r}, and fsspec can't open {protocol}:// ({reason}); install its package, "
            "such as s3fs for s3 or gcsfs for gs, or give another URL"
        ) from error
    return filesystem, root
