"""Plain values to sections: override, validate, explain, dump."""

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from ..errors import UserError
from ..storage.shipped import find_config
from .document import dump, parse, read_document
from .run import Config
from .section import Section

AnySection = TypeVar("AnySection", bound=Section)


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config, by path or by the name of one that we ship, apply ``a.b=c`` overrides, validate.

    Raises:
        UserError: the file is missing, empty or not YAML, a key is unknown (the nearest valid one is named) or stands
            twice, or a value has the wrong type or range.
    """
    values = read_document(find_config(path))
    if {"arms", "config"} <= values.keys():
        raise UserError(f"config {path} is a study, with arms: give it to deme study")
    return validate(Config, values, f"config {path}", overrides)


def dump_config(config: Config) -> str:
    """Write a config as YAML that ``load_config`` reads back to an equal one."""
    return dump(config.model_dump(mode="json"))


def validate(
    section: type[AnySection], values: dict[str, Any], where: str, overrides: list[str] | None = None
) -> AnySection:
    """Make a section from plain values, changed by ``a.b=c`` overrides.

    Raises:
        UserError: an override can't be read, a key is unknown, or a value has the wrong type or range; the last two
            start with ``where``.
    """
    for assignment in overrides or []:
        _override(values, assignment)
    _check_plain(values, where)
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(section, error, where)) from error


def _override(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        raise UserError(f"--set {assignment!r}: expected key=value, for example finetune.num_updates=100")
    for parent in parents:
        child = values.get(parent)
        if not isinstance(child, dict | None):
            raise UserError(f"--set {assignment!r}: {parent!r} holds a value, not a section")
        # A copy: by an alias it may be another section's too.
        section = values[parent] = dict(child or {})
        values = section
    values[last] = parse(text, f"--set {assignment!r}")


def _check_plain(value: Any, where: str, key: str = "") -> None:
    """Refuse what no setting may hold, also where a section takes anything: NaN, infinity, texts that are none."""
    if isinstance(value, dict):
        for name, child in value.items():
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise UserError(f"{where}: {key or 'the config'} has the key {name!r}, expected a name")
            _check_plain(child, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            _check_plain(child, where, f"{key}.{i}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {key} is {value}, expected a finite number")
    elif isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: {key} is {value!r}, which holds a character that is in no text or path")


def _explain(model: Any, error: ValidationError, where: str) -> str:
    lines = []
    for e in error.errors():
        location = _place(e["loc"])
        key = ".".join(map(str, location))
        if e["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}; the nearest valid key is {_nearest_key(model, location)}")
        else:
            message = e["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}, found {repr(e['input'])[:200]}" if key else message)
    return f"{where}: " + "; ".join(lines)


def _place(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Leave out which form of a value was tried, where it may have several: pydantic has that between the keys."""
    keys = [p for p in location if not str(p).startswith(("list[", "tuple[", "union[", "function-"))]
    return (*(p for p in keys[:-1] if not str(p)[:1].isupper()), *keys[-1:])


def _nearest_key(model: Any, location: tuple[int | str, ...]) -> str:
    """Name the valid key nearest to the unknown one at the end of a location, or the same in another section."""
    own, last = model, str(location[-1])
    for part in location[:-1]:
        field = own.model_fields.get(str(part))
        own = (field and _section_of(field.annotation)) or own
    near = difflib.get_close_matches(last, list(own.model_fields), n=1, cutoff=0.8)
    elsewhere = sorted((k for k in _keys(model) if k.split(".")[-1] == last), key=lambda k: k.count("."))
    if not near and elsewhere:
        return " or ".join(repr(k) for k in elsewhere if k.count(".") == elsewhere[0].count("."))
    match = difflib.get_close_matches(last, list(own.model_fields), n=1, cutoff=0.0)
    return repr(".".join([*map(str, location[:-1]), *match]))


def _section_of(annotation: Any) -> Any:
    return next((a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")), None)


def _keys(model: Any, prefix: str = "") -> Iterator[str]:
    """List the keys of a section and of those in it, with dots."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if section := _section_of(field.annotation):
            yield from _keys(section, f"{prefix}{name}.")
