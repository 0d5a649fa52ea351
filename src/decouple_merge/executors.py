"""Where work runs: in this process, or in several on this machine."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


def run_all(function: Callable[..., Iterator[Any]], calls: list[tuple[Any, ...]], num_processes: int) -> Iterator[Any]:
    """Run a generator function on several argument tuples; yields what the calls yield, as it comes.

    With one process the calls follow each other here. Otherwise each call has a process of its own, at most
    ``num_processes`` at once, which share the machine's threads; function and arguments are pickled.

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
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                receiver, sender = context.Pipe(duplex=False)
                # Not daemonic, since a worker may have data loader workers; it dies with its parent all the same.
                process = context.Process(target=_work, args=(sender, function, waiting.pop(), num_threads))
                process.start()
                sender.close()
                running[receiver] = process
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                try:
                    kind, payload = ready.recv()
                except EOFError:
                    running.pop(ready).join()
                    raise RuntimeError("a worker process died; run the same command again to go on") from None
                if kind == "error":
                    raise payload
                if kind == "done":
                    running.pop(ready).join()
                else:
                    yield payload
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _work(sender: Connection, function: Callable[..., Iterator[Any]], call: tuple[Any, ...], num_threads: int) -> None:
    # A parent that is killed can't stop its workers, and a second run must not find them writing.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
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
