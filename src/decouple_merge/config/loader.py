"""YAML to sections: override, validate, explain, dump."""

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from ..errors import UserError
from .run import Config
from .section import Section

AnySection = TypeVar("AnySection", bound=Section)


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config, apply ``a.b=c`` overrides, validate.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the nearest valid one is named), or a value
            has the wrong type or range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}; give the path of a YAML file, see configs/") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path}: found {type(values).__name__}, expected keys and values")
    return validate(Config, values, f"config {path}", overrides)


def dump_config(config: Config) -> str:
    """Write a config as YAML that ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


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
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(section, error, where)) from error


def _override(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"--set {assignment!r}: expected key=value, for example finetune.num_updates=100")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        if child is None:
            child = values[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {assignment!r}: {parent!r} holds a value, not a section")
        values = child
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment!r}: {text!r} is not valid YAML ({error})") from error


def _explain(model: Any, error: ValidationError, where: str) -> str:
    lines = []
    for e in error.errors():
        key = ".".join(map(str, e["loc"]))
        if e["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}; the nearest valid key is {_nearest_key(model, e['loc'])!r}")
        else:
            message = e["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}, found {e['input']!r}" if key else message)
    return f"{where}: " + "; ".join(lines)


def _nearest_key(model: Any, location: tuple[int | str, ...]) -> str:
    """Name the valid key nearest to the unknown one at the end of a location."""
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation
        model = next((a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")), None)
    match = difflib.get_close_matches(str(location[-1]), list(model.model_fields), n=1, cutoff=0.0)
    return ".".join([*map(str, location[:-1]), *match])
