"""Who works on what: locks of run folders and of cache entries, which the system frees when their holder dies."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError

# Who only looks whether a lock is free holds it for a moment.
MOMENT_SECONDS = 1
# What a killed process has forked, such as data loaders, may outlive it for so long.
ORPHAN_SECONDS = 30
# Paths that this process holds: a verb may hold what it is made of.
_held: set[Path] = set()


@contextmanager
def hold(path: Path, verb: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock while the context lasts; of several ranks of one training only the first needs to.

    Args:
        path: of the lock, ``<name>.lock``; ``<name>.json`` beside it says who holds it.
        verb: what the holder does, for those who find it held.
        wait: until it is free, instead of raising.

    Raises:
        UserError: another process holds it.
    """
    path = path.resolve()
    if path in _held or _is_another_rank():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(path), path.with_suffix(".json")
    _acquire(lock, path, wait)
    _held.add(path)
    try:
        holder.write_text(json.dumps(_own_record(verb)) + "\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        _held.discard(path)
        lock.release()


def _is_another_rank() -> bool:
    """Say whether torchrun or Accelerate started this process, and it isn't the first."""
    return "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0"


def _acquire(lock: FileLock, path: Path, wait: bool) -> None:
    seconds = ORPHAN_SECONDS if _is_dead(_holder(path)) else MOMENT_SECONDS
    try:
        lock.acquire(timeout=-1 if wait else seconds)
    except Timeout:
        raise UserError(f"{describe_holder(path)}; let it end, or have this one wait for it with --wait") from None


def enter(path: Path, wait: bool) -> Iterator[str]:
    """Look whether a lock is free, before work is done for it; yields a line where it has to be waited for.

    Raises:
        UserError: another process holds it, and nobody waits.
    """
    if not path.exists() or path.resolve() in _held or _is_another_rank():
        return
    try:
        lock = FileLock(path)
        _acquire(lock, path, wait=False)
        lock.release()
    except UserError:
        if not wait:
            raise
        yield f"waiting: {describe_holder(path)}"


def describe_holder(path: Path) -> str:
    """Say who holds a lock: the verb, the process, the machine, and since when."""
    folder = path.parent.parent
    found = _holder(path)
    if not found:
        return f"{folder}: another process holds {path.name}"
    return f"{folder}: " + "{verb} holds it, process {pid} on {host}, since {since}".format(**found)


def holders(folder: Path) -> dict[str, dict[str, str]]:
    """Say who works on a folder now: by the names of its locks that are held, what their holders say of themselves.

    Args:
        folder: of the locks. It may be one that can't be written; then a holder is believed.
    """
    return {path.stem: _holder(path) for path in sorted(folder.glob("*.lock")) if is_held(path)}


def is_held(path: Path) -> bool:
    """Say whether somebody holds a lock now, this process included."""
    if path.resolve() in _held:
        return True
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return bool(_holder(path)) and not _is_dead(_holder(path))


def _own_record(verb: str) -> dict[str, str]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"verb": verb, "pid": str(os.getpid()), "host": socket.gethostname(), "since": since}


def _holder(path: Path) -> dict[str, str]:
    """Read who holds a lock; empty where it isn't said, as in the moment between taking it and saying so."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return {key: str(found[key]) for key in ("verb", "pid", "host", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_dead(holder: dict[str, str]) -> bool:
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False


def turn_lock(path: Path) -> FileLock:
    """Make the lock of a file that several processes write to in turn, wherever they run."""
    return FileLock(path)


@contextmanager
def free_lock(path: Path) -> Iterator[bool]:
    """Hold a lock while the context lasts, if nobody holds it; gives whether it is held here now."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def make_once(path: Path, make: Callable[[], None]) -> None:
    """Make a file of the cache where it isn't there; of several processes one does, the others wait."""
    # Here, since it imports torch, and who only looks at locks needs none.
    from .files import lock_of

    if not path.exists():
        with lock_of(path):
            if not path.exists():
                make()
