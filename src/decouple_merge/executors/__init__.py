"""Where pieces of work run: an executor a file, found by the file's name.

Imports errors, storage.
"""

import importlib
import pkgutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage.files import remove_leftovers, workshop

# What executors share; every other file of this room is one.
SHARED = ("devices", "distributed", "sharding")


def executors() -> list[str]:
    """List the executors by name."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED]


def check_executor(name: str) -> None:
    """Require that there is such an executor.

    Raises:
        UserError: there is none, or a package that it needs isn't installed.
    """
    _open(name)


def _open(name: str) -> Any:
    if name not in executors():
        raise UserError(f"executor is {name!r}, expected one of {', '.join(executors())}")
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        raise UserError(
            f"executor is {name!r}, which needs the package {error.name}; pip install 'decouple-merge[{name}]'"
        ) from error


def run_all(
    function: Callable[..., Iterator[Any]],
    calls: list[tuple[Any, ...]],
    num_processes: int,
    executor: str = "local",
    options: dict[str, Any] | None = None,
    folder: Path | None = None,
) -> Iterator[Any]:
    """Run a generator function on several argument tuples; yields what the calls yield, as it comes.

    Args:
        executor: the file of this room whose ``run_all`` does it, on as many processes at once.
        options: keyword arguments of that function besides.
        folder: where the calls leave files, which every machine has to reach.

    Raises:
        UserError: there is no such executor, or a call ran where the folder isn't reached.
        Exception: what a call raised; the others are stopped.
    """
    start = _open(executor).run_all
    if executor == "local" or folder is None:
        yield from start(function, calls, num_processes, **(options or {}))
        return
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with workshop(folder) as place:
        wrapped = [(place.absolute(), function, *call) for call in calls]
        yield from start(_where_shared, wrapped, num_processes, **(options or {}))


def _where_shared(place: Path, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    """Call a function where a folder is found that its caller has just made."""
    if not place.exists():
        raise UserError(
            f"{place.parent} is not the same folder on the machine {socket.gethostname()}; give an --out on a disk "
            "that all machines reach under one path"
        )
    yield from function(*arguments)
