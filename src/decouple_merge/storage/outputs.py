"""What a path that the user gave may replace: an earlier result of the same kind that is no input, and nothing else."""

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .files import remove_leftovers
from .reading import file_sha256

# Of our npz files, which are zip archives.
STATISTICS_COMMENT = b"deme stats"
# First line of our schedules.
SCHEDULE_MARK = "# Written by deme schedule"
# Of our pages, in their head.
REPORT_MARK = b'name="generator" content="deme report'


@dataclass(frozen=True)
class Kind:
    """A kind of result.

    Attributes:
        name: in words.
        is_folder: or else a file.
        foreign: names something at an existing path that an earlier result of this kind doesn't have; None where there
            is nothing of the kind.
        is_replaced: as a whole; others are added to.
        apart: from inputs: it may not lie in the folder of one.
    """

    name: str
    is_folder: bool
    foreign: Callable[[Path], str | None]
    is_replaced: bool = True
    apart: bool = True


def check_output(out: Path, kind: Kind, inputs: Iterable[str | Path] = ()) -> None:
    """Require that a result may be written to a path, before anything is read.

    Links are followed, on both sides.

    Args:
        inputs: paths that are read; names that are no paths are passed over.

    Raises:
        UserError: the path holds something else, is an input, holds one or lies in one, or can't be written.
    """
    try:
        target = out.resolve()
        if any("\udc80" <= c <= "\udcff" for c in str(target)):
            raise OSError("its name is no UTF-8, and safetensors opens no other")
        if target.is_symlink():
            raise OSError("a link that leads to itself")
        _check_inputs(out, target, kind, inputs)
        _check_writable(target if target.is_dir() and not kind.is_replaced else target.parent)
        remove_leftovers(target.parent)
        if target.is_dir() != kind.is_folder and target.exists():
            raise OSError(f"{'a folder' if target.is_dir() else 'no folder'}, expected {kind.name}")
        if target.exists() and not (kind.is_folder or target.is_file()):
            raise OSError("no regular file")
        if kind.is_folder and kind.is_replaced and target.exists():
            _check_movable(target)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out is {out}, which can't be written ({reason}); give another") from error
    if target.exists() and (found := kind.foreign(target)) is not None:
        raise UserError(
            f"--out is {out}, which holds {found}; expected a new path, or an earlier result, {kind.name}: give another"
        )


def _check_inputs(out: Path, target: Path, kind: Kind, inputs: Iterable[str | Path]) -> None:
    # What stands before a colon may be a kind of source.
    for given in [name for i in inputs for name in (str(i), str(i).partition(":")[2]) if name]:
        place = Path(given).resolve()
        if not place.exists():
            continue
        problem = None
        if target == place or (target.exists() and target.samefile(place)):
            problem = "is an input"
        elif kind.apart and place.is_dir() and place in target.parents:
            problem = f"lies in {given}, which is an input"
        elif kind.is_replaced and target in place.parents:
            problem = f"holds {given}, which is an input"
        if problem:
            raise UserError(f"--out is {out}, which {problem}; nothing of an input is replaced: give another")


def _check_writable(folder: Path) -> None:
    while not os.path.lexists(folder):
        folder = folder.parent
    # Tried, since permissions alone don't say: a file system may be read-only, or none that files can be made in.
    with tempfile.TemporaryFile(dir=folder):
        pass


def _check_movable(folder: Path) -> None:
    if folder.is_mount():
        raise OSError("a mount point, expected a folder in it")
    here = Path.cwd().resolve()
    if folder == here or folder in here.parents:
        raise OSError("the current folder, or one around it")


def _foreign_to_listed(record: str, folder: Path) -> str | None:
    """Name a file that isn't as the record lists it; hidden ones count, since the folder is replaced as a whole."""
    listed = _read_json(folder / record).get("files")
    known = listed if isinstance(listed, dict) else {}
    for path in sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or not (name in known or (known and name == record)):
            return name
        if name in known and file_sha256(path) != known[name]:
            return f"{name}, which was changed since"
    return None


def hashes_of_files(folder: Path) -> dict[str, str]:
    """Hash every file of a folder, so that a later merge replaces these and nobody else's."""
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _foreign_to_masks(folder: Path) -> str | None:
    """Name a file that ``deme masks`` doesn't write."""
    names = sorted(path.name for path in folder.iterdir())
    return next((n for n in names if n != "mixture.yaml" and not re.fullmatch(r"\d+\.safetensors", n)), None)


def _foreign_to_merged_file(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt") as tensors:
            return None if "merge" in (tensors.metadata() or {}) else "weights that deme merge didn't write"
    except (SafetensorError, OSError):
        return "no safetensors file"


def _foreign_to_statistics(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as arrays:
            is_ours = arrays.comment == STATISTICS_COMMENT
    except (OSError, zipfile.BadZipFile):
        return "no npz file"
    return None if is_ours else "arrays that deme stats didn't write"


def _foreign_to_records(file: Path) -> str | None:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                record = json.loads(line)
                if not isinstance(record, dict) or not {"metric", "value"} <= set(record):
                    return f"something else than a metrics record in line {number}"
    except (OSError, ValueError, RecursionError):
        return "something else than JSON lines"
    return None


def _foreign_to_report(file: Path) -> str | None:
    with file.open("rb") as page:
        return None if REPORT_MARK in page.read(2000) else "a file that deme report didn't write"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _foreign_to_schedule(path: Path) -> str | None:
    with path.open("rb") as file:
        is_ours = file.read(len(SCHEDULE_MARK)) == SCHEDULE_MARK.encode()
    return None if is_ours else "something else than a schedule of deme schedule"


def _foreign_to_schedule_search(folder: Path) -> str | None:
    """Name something in a folder that a search for a schedule doesn't leave there."""
    own = {"search", "latency", "scored", "front", "result", "locks"}
    return next((path.name for path in sorted(folder.iterdir()) if path.stem not in own), None)


MERGED_FOLDER = Kind("a folder of deme merge", True, partial(_foreign_to_listed, "merge.json"))
PRUNED = Kind("a folder of deme prune", True, partial(_foreign_to_listed, "prune.json"))
MERGED_FILE = Kind("a .safetensors file of deme merge", False, _foreign_to_merged_file)
MASKS = Kind("a folder of deme masks", True, _foreign_to_masks)
SCHEDULE = Kind("a YAML file of deme schedule", False, _foreign_to_schedule, apart=False)
SCHEDULE_SEARCH = Kind("a folder of deme schedule", True, _foreign_to_schedule_search, is_replaced=False, apart=False)
STATISTICS = Kind("an npz file of deme stats", False, _foreign_to_statistics, apart=False)
RECORDS = Kind("a file of metrics records", False, _foreign_to_records, is_replaced=False, apart=False)
REPORT = Kind("a page of deme report", False, _foreign_to_report, apart=False)
# Whose it is, ``experiment.manifest.check_owner`` says.
RUN = Kind("a run folder", True, lambda folder: None, is_replaced=False)
