"""Files that a user may have given: anything may lie at a path, and anything may be in it."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import UserError

# What to do about a file of ours that holds something else.
AGAIN = "remove it to have it made again"
# Of a record, and of a file with a line for each image, prompt or number. Others of that size are something else.
MAX_BYTES, MAX_LINES_BYTES = 200_000_000, 2_000_000_000
# By what a path is where a file was expected.
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def is_document(name: str) -> bool:
    """Say whether a model's name is that of a YAML file, a mixture's or a schedule's."""
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def looked_for(path: object) -> str:
    """Say behind a relative path what was looked for: it counts from a folder that its reader may not think of."""
    return "" if os.path.isabs(str(path)) else f" (looked for {os.path.abspath(str(path))})"


def check_file(path: Path, advice: str) -> int:
    """Require that a regular file lies at a path, before it is opened: a pipe would be waited for; returns its bytes.

    Raises:
        UserError: as said, with what to do.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}{looked_for(path)}: {error.strerror}; {advice}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "a device")
        raise UserError(f"{path} is {kind}; {advice}")
    return found.st_size


def file_sha256(path: Path) -> str:
    """Hash the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, advice: str, max_bytes: int = MAX_BYTES) -> str:
    """Read a UTF-8 file; a byte order mark is left out.

    Raises:
        UserError: there is no such file, it is too long, it can't be read, or it is in another encoding; the line is
            named.
    """
    if (size := check_file(path, advice)) > max_bytes:
        raise UserError(f"{path} has {size:,} bytes, expected a text of at most {max_bytes:,}; {advice}")
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}, is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {advice}") from error


def parse_json(text: str, where: object, advice: str) -> Any:
    """Parse JSON, and say where it is none and what to do.

    Raises:
        UserError: it is no JSON, nested too deep, or has a number with thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}, column {error.colno}"
        raise UserError(f"{place}: not JSON ({error.msg}); {advice}") from error
    except (RecursionError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else "a number has too many digits"
        raise UserError(f"{where}: not JSON that can be read ({reason}); {advice}") from error


def read_record(
    path: Path, advice: str, *, max_bytes: int = MAX_BYTES, **fields: type | tuple[type, ...]
) -> dict[str, Any]:
    """Read a JSON object that has some fields of some types.

    Args:
        advice: what to do about a file that is no such record.

    Raises:
        UserError: there is no such file, it is truncated, or of another shape.
    """
    return as_record(parse_json(read_text(path, advice, max_bytes), path, advice), path, advice, **fields)


def as_record(found: Any, where: object, advice: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """Require that parsed JSON is an object with some fields of some types.

    Raises:
        UserError: it is not; the first field that lacks or is of another type is named.
    """
    if not isinstance(found, dict):
        expected = f"an object with {', '.join(fields)}" if fields else "an object"
        raise UserError(f"{where}: found {type(found).__name__}, expected {expected}; {advice}")
    for name, kind in fields.items():
        if not isinstance(value := found.get(name), kind):
            what = f"{name} is {str(value)[:80]!r}" if name in found else f"{name} is missing"
            raise UserError(f"{where}: {what}, expected a record of another shape; {advice}")
    return found
