"""A recipe of a merge, as ``deme merge`` writes it in merge.json and as it is written by hand."""

import json
from typing import Any

from pydantic import Field

from ..errors import UserError
from .document import parse
from .loader import validate
from .merge import Merge
from .section import Section

ADVICE = "give the merge.json of a deme merge or of a run, a merged file, or YAML with the keys of a merge.json"


class Origin(Section):
    """What is merged into: a name, and the hash of its tensors where it is known."""

    name: str
    sha256: str | None = None


class Recipe(Merge):
    """All that a merge is made from, and what merge.json knows besides.

    The fields of ``Merge`` stand beside these or in a section ``settings``.

    Attributes:
        base: a name, or a name with a hash. A path counts from the recipe's folder; any other name is the hub's.
        experts: paths, from the recipe's folder.
        experts_sha256: hashes of their tensors; none are compared where there are none.
        statistics_sha256: the same of the files in ``fishers`` and ``grams``.
        ranges, search, text, pipeline, projection: what a run says of its merge.
        delta, merged_sha256, files, decouple_merge: of the merge that was made; a new one has its own.
    """

    base: str | Origin
    experts: list[str] = Field(min_length=1)
    experts_sha256: list[str] = []
    statistics_sha256: list[str] = []
    ranges: list[Any] | None = None
    search: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    pipeline: str | None = None
    projection: str | None = None
    delta: dict[str, Any] | None = None
    merged_sha256: str | None = None
    files: dict[str, str] | None = None
    decouple_merge: str | None = None

    @property
    def origin(self) -> Origin:
        return Origin(name=self.base) if isinstance(self.base, str) else self.base

    @property
    def merge(self) -> Merge:
        """The fields of ``Merge`` alone."""
        return Merge.model_validate({name: getattr(self, name) for name in Merge.model_fields})


def parse_recipe(text: str, where: str) -> Recipe:
    """Read a recipe from YAML, of which JSON is a part.

    Raises:
        UserError: it is none, a key is unknown, a value is wrong or given twice, or the hashes are not as many as
            the experts; the message starts with ``where``.
    """
    try:
        return _recipe(_plain_json(text) or parse(text, where), where)
    except UserError as error:
        raise UserError(f"{error}; {ADVICE}") from error


def _plain_json(text: str) -> Any:
    """Read JSON as such: YAML doesn't join the halves of a character that JSON may write in two. None of other text."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key is given twice, which YAML's reader names")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None


def _recipe(values: Any, where: str) -> Recipe:
    if not isinstance(values, dict) or not isinstance(values.get("settings", {}), dict):
        raise UserError(f"{where}: expected base, experts and weights")
    settings = values.pop("settings", {})
    if unnamed := [key for key in (*values, *settings) if not isinstance(key, str)]:
        raise UserError(f"{where}: found the key {unnamed[0]!r}, expected names")
    if twice := [key for key in settings if key in values and values[key] != settings[key]]:
        raise UserError(f"{where}: {twice[0]} and settings.{twice[0]} differ, expected one value")
    recipe = validate(Recipe, settings | values, where)
    for name, hashes, files in (
        ("experts_sha256", recipe.experts_sha256, recipe.experts),
        ("statistics_sha256", recipe.statistics_sha256, recipe.statistics),
    ):
        if hashes and len(hashes) != len(files):
            what = name.removesuffix("_sha256")
            raise UserError(
                f"{where}: {name} has {len(hashes)} hashes for {len(files)} {what}, expected one each, or none"
            )
    return recipe
