"""Where work runs: in this process, or in several on this machine."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


def run_all(function: Callable[..., Iterator[Any]], calls: list[tuple[Any, ...]], num_processes: int) -> Iterator[Any]:
    """Run a generator function on several argument tuples; yields what the calls yield, as it comes.

    With one process the calls follow each other here. Otherwise each call has a process of its own, at most
    ``num_processes`` at once, which share the machine's threads and take its GPUs in turn; function and arguments are
    pickled.

    Raises:
        Exception: what a call raised; the others are stopped.
        RuntimeError: a process died without an error of its own.
    """
    if num_processes == 1 or len(calls) == 1:
        for call in calls:
            yield from function(*call)
        return
    context = multiprocessing.get_context("spawn")
    num_threads = max(1, torch.get_num_threads() // num_processes)
    waiting = list(reversed(calls))
    running: dict[Connection, Any] = {}
    places = list(range(num_processes))
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                receiver, sender = context.Pipe(duplex=False)
                # Not daemonic, since a worker may have data loader workers; it dies with its parent all the same.
                place = places.pop(0)
                process = context.Process(target=_work, args=(sender, function, waiting.pop(), num_threads, place))
                process.start()
                sender.close()
                running[receiver] = process, place
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                try:
                    kind, payload = ready.recv()
                except EOFError:
                    running.pop(ready)[0].join()
                    raise RuntimeError("a worker process died; run the same command again to go on") from None
                if kind == "error":
                    raise payload
                if kind == "done":
                    process, place = running.pop(ready)
                    process.join()
                    places.append(place)
                else:
                    yield payload
    finally:
        for process, _ in running.values():
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
    sender: Connection, function: Callable[..., Iterator[Any]], call: tuple[Any, ...], num_threads: int, place: int
) -> None:
    # A parent that is killed can't stop its workers, and a second run must not find them writing.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    try:
        for item in function(*call):
            sender.send(("item", item))
        sender.send(("done", None))
    except Exception as error:
        sender.send(("error", error))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
