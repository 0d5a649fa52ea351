"""Functions in processes of their own, forked: importing everything again takes ten seconds a process."""

import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fork(do: Callable[[], Any]) -> int:
    """Start a function in a child, whose status is 0 unless it raises; returns the child's id."""
    pid = os.fork()
    if pid == 0:
        try:
            do()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def status(pid: int) -> int:
    """Wait for a child; returns its exit status, or that of a signal below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_processes(num: int, do: Callable[[int], Any]) -> None:
    """Run a function on the numbers from 0 on, in a process each."""
    pids = [fork(lambda number=number: do(number)) for number in range(num)]  # type: ignore[misc]
    assert [status(pid) for pid in pids] == [0] * num


def deme(*arguments: Any, folder: Path, errors: Path) -> int:
    """Start the command in a folder, with its errors in a file; returns the child's id."""
    from decouple_merge.cli.main import main

    def command() -> None:
        os.chdir(folder)
        for stream, path in ((1, os.devnull), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        # pytest's own streams write elsewhere.
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        sys.argv = ["deme", *map(str, arguments)]
        try:
            main()
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(ended.code or 0))

    return fork(command)


def limit_memory(more: int) -> None:
    """Let this process take so many more bytes than it has."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + more,) * 2)
