"""What a result was made from: plain records, written before the work and compared when it goes on."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

MadeFrom = dict[str, Any]
# So many differences are named, and so many characters of each side; of hashes fewer tell them apart.
NUM_NAMED, NUM_CHARACTERS, NUM_DIGITS = 3, 40, 12


def plain(record: MadeFrom) -> MadeFrom:
    """Give a record as it reads from a file: tuples are lists, and what JSON doesn't know is text."""
    found: MadeFrom = json.loads(json.dumps(record, default=str))
    return found


def digest_of(record: MadeFrom) -> str:
    """Hash a record, whatever the order of its keys, with or without those that say nothing; 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(_said(plain(record)), sort_keys=True).encode()).hexdigest()[:12]


def _said(record: Any) -> Any:
    """Leave out what is None or {}: a setting that came later is one of these where it isn't used."""
    if isinstance(record, list):
        return [_said(value) for value in record]
    if not isinstance(record, dict):
        return record
    kept = {key: _said(value) for key, value in record.items()}
    return {key: value for key, value in kept.items() if not (value is None or value == {})}


def changes(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """List the keys in which two plain records differ, each with both values; None is that of a key that is missing.

    One that is None or {} says as much as one that is missing.
    """
    yield from _changed(_said(old), _said(new), "")


def _changed(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _changed(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new:
        yield key, old, new


def differences(old: MadeFrom, new: MadeFrom) -> list[str]:
    """Say in which keys two plain records differ, and how."""
    return [f"{key} was {_short(was)} and is {_short(now)}" for key, was, now in changes(old, new)]


def told(found: list[str]) -> str:
    """Join differences to one line; of many only the first."""
    more = f", and {len(found) - NUM_NAMED} more" if len(found) > NUM_NAMED else ""
    return "; ".join(found[:NUM_NAMED]) + more


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:NUM_DIGITS]
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= NUM_CHARACTERS else text[: NUM_CHARACTERS - 1] + "…"
