"""Where work runs: as tasks of a Ray cluster, each in a process of its own; the adapter to Ray.

Ray holds nothing that a run needs: a piece that is done again goes on from what it left in the run folder.
"""

import io
import logging
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from ..errors import UserError
from ..storage.files import cache_folder
from ..storage.packed import pack, unpack
from .local import told


def run_all(
    function: Callable[..., Iterator[Any]],
    calls: list[tuple[Any, ...]],
    num_processes: int,
    address: str | None = None,
    num_cpus: float = 1.0,
    num_gpus: float | None = None,
    num_retries: int = 10,
) -> Iterator[Any]:
    """Run a generator function on several argument tuples; yields what the calls yield, as it comes.

    Each call is a task, at most ``num_processes`` at once, in a process of its own, in this one's working directory and
    with its cache folder. What the calls yield comes back as bytes, its tensors on the CPU. A call whose node died is
    made again from its start, and what it yields then is yielded, too. The other arguments are those of ``config.Ray``.

    Raises:
        UserError: no cluster answers, or none of its nodes has what a call needs.
        Exception: what a call raised, with the worker's traceback as a note; the others are stopped.
        RuntimeError: a call's node or process died more than ``num_retries`` times.
    """
    if not calls:
        return
    _connect(address)
    task = ray.remote(max_calls=1)(_work).options(**_needs(num_cpus, num_gpus), max_retries=0, num_returns="streaming")
    given = ray.put(_packed(function, calls)), os.getcwd(), str(cache_folder().absolute()), max(1, int(num_cpus))
    waiting, num_lost = list(reversed(range(len(calls)))), Counter[int]()
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                number = waiting.pop()
                running[task.remote(number, *given)] = number
            stream = ray.wait(list(running), num_returns=1)[0][0]
            # To the end of the line, so that one that always has something doesn't hide the others.
            number = running[stream] = running.pop(stream)
            kind, payload = _heard(stream)
            if kind == "item":
                yield payload
                continue
            del running[stream]
            if kind == "error":
                raise payload
            if kind == "lost":
                num_lost[number] += 1
                _tell_lost(payload, num_lost[number], num_retries)
                waiting.append(number)
    finally:
        for stream in running:
            ray.cancel(stream, force=True)


def _connect(address: str | None) -> None:
    """Join a cluster until this process ends, or start one on this machine."""
    if ray.is_initialized():
        return
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray would send statistics to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"include_dashboard": False} if place == "local" else {}
    try:
        ray.init(place, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"ray.address is {place!r}, where no Ray cluster answers ({reason}); start one with ray start --head, or "
            "leave the address out"
        ) from error


def _needs(num_cpus: float, num_gpus: float | None) -> dict[str, float]:
    """Say what a task asks for; Ray itself would wait for ever for what no node has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if num_gpus is None:
        num_gpus = float(any(node.get("GPU", 0) >= 1 for node in nodes))
    if not any(node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= num_gpus for node in nodes):
        found = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(
            f"a piece takes ray.num_cpus {num_cpus:g} and ray.num_gpus {num_gpus:g}, and the nodes of the cluster have "
            f"{found}; lower them, or start such a node first"
        )
    return {"num_cpus": num_cpus, "num_gpus": num_gpus}


def _packed(function: Callable[..., Iterator[Any]], calls: list[tuple[Any, ...]]) -> np.ndarray:
    """Make bytes of function and calls, as an array, which the processes of a node share."""
    packed = io.BytesIO()
    torch.save((function, calls), packed, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return np.frombuffer(packed.getbuffer(), np.uint8)


def _heard(stream: Any) -> tuple[str, Any]:
    """Wait for what a piece says next: an item, an error, that it is done; lost is one whose node or process died."""
    try:
        kind, payload = unpack(ray.get(next(stream)))
    except RayTaskError:
        raise
    except (RayError, StopIteration) as error:
        return "lost", error
    return kind, payload


def _tell_lost(error: Exception, num_lost: int, num_retries: int) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if num_lost > num_retries:
        raise RuntimeError(
            f"a piece was lost {num_lost} times; run the same command again to go on ({reason})"
        ) from error
    logging.getLogger(__name__).warning("a piece was lost and is done again (%s)", reason)


def _work(number: int, packed: np.ndarray, folder: str, cache: str, num_threads: int) -> Iterator[bytes]:
    os.environ["DEME_CACHE"] = cache
    torch.set_num_threads(num_threads)
    # Whether files are shared where it matters is for the caller to check.
    with suppress(OSError):
        os.chdir(folder)
    try:
        function, calls = torch.load(io.BytesIO(packed.data), map_location="cpu", weights_only=False)
        for item in function(*calls[number]):
            yield pack(("item", item))
        yield pack(("done", None))
    except Exception as error:
        yield pack(("error", told(error)))
