"""The verb of a look at a run or a study that may go on elsewhere: ``status``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .console import console


def status(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run or a study, also one that is worked on")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts")] = False,
) -> None:
    """Say how far a run or a study is, who works on it, about what time is left, and what it holds.

    It only reads small files, beside whatever process works on the run.

    Example: `deme status runs/fashion-quick`
    """
    import json

    from ..reporting.status import Status, StudyStatus, read_status, read_study
    from .live import run_table, tables

    found: Status | StudyStatus = read_study(run_folder) or read_status(run_folder)
    if as_json:
        print(json.dumps(found.record(), indent=2))
        return
    console.print(f"{run_folder}: {found.state}")
    for line in _holders(found.holders):
        console.print(line)
    if isinstance(found, StudyStatus):
        console.print(run_table({n: (run.state, run.job) if run else None for n, run in found.runs.items()}))
    else:
        console.print(tables(found.job, console))
    for name, place in found.made.items():
        console.print(f"{name}: {place}")
    if found.state == "stopped":
        console.print("nobody works on it: the same command goes on where it stopped")


def _holders(found: dict[str, dict[str, str]]) -> Iterator[str]:
    """Say who works on a run, a line for each process; what it holds besides the run itself comes last."""
    locks: dict[str, list[str]] = {}
    for lock in sorted(found, key=lambda name: name != "run"):
        holder = found[lock]
        said = "process {pid} on {host}".format_map(holder) if holder else "a process"
        locks.setdefault(said, []).append(lock)
    for said, (first, *others) in locks.items():
        holder = found[first]
        verb = "{verb}, {said}, since {since}".format(said=said, **holder) if holder else said
        yield f"  {verb}" + "".join(f", {name}" for name in others or [first] if name != "run")
