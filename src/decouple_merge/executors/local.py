"""Where work runs: in this process, or in several on this machine."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypeVar

import torch

from ..storage.files import remove_leftovers, workshop
from ..storage.packed import pack, unpack

Item = TypeVar("Item")

SECONDS_BETWEEN_LOOKS = 1.0
# A server imports once what all workers import, and forks them in an instant. Elsewhere a fork loses what system
# libraries have set up.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
PACKAGE = __name__.partition(".")[0]
# The file of function and calls.
PACKED = "calls.pt"
# For a worker that is done, until it is killed.
SECONDS_TO_END = 30.0


def run_all(function: Callable[..., Iterator[Any]], calls: list[tuple[Any, ...]], num_processes: int) -> Iterator[Any]:
    """Run a generator function on several argument tuples; yields what the calls yield, as it comes.

    With one process the calls follow each other here. Otherwise each call has a process of its own, at most
    ``num_processes`` at once, which share the machine's threads and take its GPUs in turn; function and arguments are
    pickled, and tensors in them read from a temporary file that all map: shared memory may be small, as in a container.
    What the calls yield comes back as bytes, its tensors on the CPU.

    Raises:
        Exception: what a call raised, with the worker's traceback as a note; the others are stopped.
        RuntimeError: a process died without an error of its own.
    """
    if num_processes == 1 or len(calls) == 1:
        for call in calls:
            yield from function(*call)
        return
    place = Path(gettempdir())
    remove_leftovers(place)
    with workshop(place) as folder:
        # Of the older protocol that is torch's default, arrays would come out twice as large.
        torch.save((function, calls), folder / PACKED, pickle_protocol=pickle.HIGHEST_PROTOCOL)
        yield from _run_packed(folder / PACKED, len(calls), num_processes)


def _run_packed(packed: Path, num_calls: int, num_processes: int) -> Iterator[Any]:
    num_threads = max(1, torch.get_num_threads() // num_processes)
    waiting = list(reversed(range(num_calls)))
    running: dict[Connection, Any] = {}
    places = list(range(num_processes))
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                place = places.pop(0)
                receiver, process = _start(packed, waiting.pop(), num_threads, place)
                running[receiver] = process, place
            for receiver in _ready(running):
                process, place = running[receiver]
                kind, payload = _receive(receiver, process)
                if kind == "error":
                    raise payload
                if kind == "done":
                    del running[receiver]
                    _end(process)
                    places.append(place)
                else:
                    yield payload
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def _start(*arguments: Any) -> tuple[Connection, Any]:
    context: Any = multiprocessing.get_context(METHOD)
    # The server starts with the first worker, and imports what its parent has of this package.
    context.set_forkserver_preload(sorted(name for name in sys.modules if name.partition(".")[0] == PACKAGE))
    receiver, sender = context.Pipe(duplex=False)
    # Not daemonic, since a worker may have data loader workers; it dies with its parent all the same.
    process = context.Process(target=_work, args=(sender, dict(os.environ), *arguments))
    process.start()
    sender.close()
    return receiver, process


def _ready(running: dict[Connection, Any]) -> list[Connection]:
    """Wait until workers have something to say, or are dead."""
    while True:
        ready = [r for r in wait(list(running), SECONDS_BETWEEN_LOOKS) if isinstance(r, Connection)]
        # What a dead worker has started, such as a data loader, may hold its end of the pipe open.
        ready = ready or [receiver for receiver, (process, _) in running.items() if not process.is_alive()]
        if ready:
            return ready


def _receive(receiver: Connection, process: Any) -> tuple[str, Any]:
    with suppress(EOFError, ConnectionResetError):
        if receiver.poll() or process.is_alive():
            found: tuple[str, Any] = unpack(receiver.recv_bytes())
            return found
    _end(process)
    code = process.exitcode
    end = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"its exit status is {code}"
    hint = ", as where memory runs out" if code == -signal.SIGKILL else ""
    raise RuntimeError(f"a worker process died; run the same command again to go on ({end}{hint})")


def _end(process: Any) -> None:
    """Wait for a worker that has said all; one that doesn't end, since something in it hangs, is killed."""
    process.join(SECONDS_TO_END)
    if process.is_alive():
        process.kill()
        process.join()


def shares(num_batches: int, num_processes: int) -> list[slice]:
    """Deal batches out: every n-th to each of n processes, of which none is without one."""
    num = min(num_batches, num_processes)
    return [slice(first, None, num) for first in range(num)]


def in_order(numbered: Iterable[tuple[int, Item]]) -> Iterator[Item]:
    """Yield what is numbered from 0 on by its numbers; what comes too early waits."""
    early: dict[int, Item] = {}
    num_yielded = 0
    for number, item in numbered:
        early[number] = item
        while num_yielded in early:
            yield early.pop(num_yielded)
            num_yielded += 1


def _work(
    sender: Connection, environment: dict[str, str], packed: Path, number: int, num_threads: int, place: int
) -> None:
    # The server's is that of its start.
    os.environ.clear()
    os.environ.update(environment)
    # An interrupt from the keyboard goes to all; the parent tells of it, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed can't stop its workers, and a second run must not find them writing.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    try:
        function, calls = torch.load(packed, mmap=True, weights_only=False)
        for item in function(*calls[number]):
            sender.send_bytes(pack(("item", item)))
        sender.send_bytes(pack(("done", None)))
    except Exception as error:
        sender.send_bytes(pack(("error", told(error))))


def told(error: Exception) -> Exception:
    """Add the traceback, which pickling loses; what can't be pickled is told by its text."""
    error.add_note(f"In a worker process:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.__notes__ = error.__notes__
        return told
    return error


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
