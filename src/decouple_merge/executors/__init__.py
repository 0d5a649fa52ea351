"""Where pieces of work run: an executor a file, found by the file's name.

Imports errors, storage.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import UserError

# What executors share; every other file of this room is one.
SHARED = ("devices", "distributed")


def executors() -> list[str]:
    """List the executors by name."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED]


def check_executor(name: str) -> None:
    """Require that there is such an executor.

    Raises:
        UserError: there is none.
    """
    if name not in executors():
        raise UserError(f"executor is {name!r}, expected one of {', '.join(executors())}")


def run_all(
    function: Callable[..., Iterator[Any]], calls: list[tuple[Any, ...]], num_processes: int, executor: str = "local"
) -> Iterator[Any]:
    """Run a generator function on several argument tuples; yields what the calls yield, as it comes.

    Args:
        executor: the file of this room whose ``run_all`` does it, on as many processes at once.

    Raises:
        UserError: there is no such executor.
        Exception: what a call raised; the others are stopped.
    """
    check_executor(executor)
    yield from importlib.import_module(f".{executor}", __name__).run_all(function, calls, num_processes)
