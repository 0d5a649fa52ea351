"""What ``deme study`` is asked for: arms that differ in some settings, each on the same training seeds."""

import copy
import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ..errors import UserError
from ..storage.shipped import find_config
from .document import dump, read_document
from .loader import validate
from .numbers import NonNegativeInt, PositiveInt
from .paths import FilePath
from .pieces import Pieces
from .run import Config

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


class Study(Pieces):
    """Arms × training seeds over one config; its pieces are trainings and runs.

    Attributes:
        config: the config that all arms start from; a relative path is counted from the study's own folder. Or the name
            of one that we ship.
        settings: what all arms change in it, as sections or by keys with dots.
        arms: what each changes besides, by the arm's name. The first come first, and the first is compared with.
        seeds: training seeds, ``seed`` of a config.
        num_resamples: of the bootstrap.
    """

    config: FilePath
    settings: dict[str, Any] = {}
    arms: dict[str, dict[str, Any] | None] = Field(min_length=1)
    seeds: list[NonNegativeInt] = Field(min_length=1)
    num_resamples: PositiveInt = 10_000

    @field_validator("arms")
    @classmethod
    def _names(cls, arms: dict[str, Any]) -> dict[str, Any]:
        if bad := [name for name in arms if not _NAME.fullmatch(name)]:
            raise UserError(f"an arm is called {bad[0]!r}, expected letters, digits and ._=+-: it names a folder")
        return arms

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if twice := [seed for i, seed in enumerate(seeds) if seed in seeds[:i]]:
            raise UserError(f"the seed {twice[0]} is there twice, expected each once")
        return seeds


def load_study(path: Path, overrides: list[str] | None = None) -> Study:
    """Read a study's YAML, by path or by the name of one that we ship, and apply ``a.b=c`` overrides.

    Raises:
        UserError: as ``load_config``; the config of the study is read by ``arm_configs``.
    """
    path = find_config(path)
    values = read_document(path)
    if "arms" not in values and values.keys() & Config.model_fields.keys() - Study.model_fields.keys():
        raise UserError(f"study {path} is the config of a run, without arms: give it to deme run")
    study = validate(Study, values, f"study {path}", overrides)
    return study.model_copy(update={"config": find_config(study.config, path.parent).absolute()})


def arm_configs(study: Study) -> dict[tuple[str, int], Config]:
    """Make the config of each arm on each training seed, in the order of arms.

    How many processes work, and where, is the study's to say: a run of it is one process.

    Raises:
        UserError: the config can't be read, or an arm has an unknown key, a wrong value, or one that is the study's to
            say; the arm is named.
    """
    document = read_document(study.config)
    found = {}
    for arm, changes in study.arms.items():
        if own := [key for key in ("seed", "num_processes", "executor") if key in study.settings | (changes or {})]:
            raise UserError(f"arm {arm} or settings: found {own[0]}, which the study itself says for all: leave it out")
        for seed in study.seeds:
            values = copy.deepcopy(document)
            for given in (study.settings, changes or {}):
                merge_settings(values, given, f"arm {arm}")
            values |= {"seed": seed, "num_processes": 1, "executor": "local"}
            found[arm, seed] = validate(Config, values, f"arm {arm} of {study.config}")
    return found


def merge_settings(values: dict[str, Any], changes: dict[str, Any], where: str) -> None:
    """Write settings into others, in place: sections are merged, all else is replaced; ``a.b`` is b of section a.

    Raises:
        UserError: a key has an empty part, or would replace a value by a section.
    """
    for key, value in changes.items():
        *parents, last = key.split(".")
        if not all((*parents, last)):
            raise UserError(f"{where}: found the key {key!r}, expected names separated by dots")
        place = values
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            if not isinstance(place[parent], dict):
                raise UserError(
                    f"{where}: found the key {key!r}, and {parent} is {place[parent]!r}, not a section: give "
                    f"{parent} as a section, with all of its values"
                )
            place = place[parent]
        place[last] = _merged(place.get(last), value)


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(new, dict):
        return copy.deepcopy(new)
    old = old if isinstance(old, dict) else {}
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def dump_study(study: Study) -> str:
    """Write a study as YAML that ``load_study`` reads back to an equal one."""
    # Not by pydantic's JSON mode, in which keys that are numbers become texts.
    return dump(study.model_dump() | {"config": str(study.config)})
