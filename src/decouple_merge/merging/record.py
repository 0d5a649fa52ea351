"""The record of a merge, which is its recipe: written as merge.json, and read back."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import Merge, parse_recipe
from ..config.paths import expand_home
from ..config.recipe import ADVICE
from ..errors import UserError
from ..storage.reading import read_text
from ..storage.tensors import TensorFiles

# What a run knows of its merge besides, and a repeated merge says again.
CARRIED = ("search", "text", "pipeline", "projection")


def merge_record(
    settings: Merge,
    base: dict[str, str],
    experts: Sequence[str],
    experts_sha256: Sequence[str],
    ranges: Sequence[list[int | float] | None] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Say how a model was merged, so that ``recipes.repeat_merge`` can do it again.

    Args:
        base: name, and sha256 where it is known by now.
        experts: paths. They count from the folder of merge.json, as all names in a record do.
        ranges: [low, high) in timesteps of each expert, where they were finetuned on some.
        fields: what else is known of the merge.
    """
    return {
        "method": settings.method,
        "weights": settings.weights,
        "settings": settings.model_dump(mode="json"),
        "ranges": ranges,
        "base": base,
        "experts": list(experts),
        "experts_sha256": list(experts_sha256),
        **fields,
        "decouple_merge": __version__,
    }


def name_from(place: Path, name: str | Path) -> str:
    """Name a path from the folder where a record lies, starting with a dot; what is no path is the hub's name."""
    if not Path(name).exists():
        return str(name)
    relative = Path(os.path.relpath(os.path.abspath(name), os.path.realpath(place))).as_posix()
    return relative if relative.startswith("..") else f"./{relative}"


def is_path(name: str) -> bool:
    """Tell a path, as ``name_from`` writes it, from the hub's name."""
    return name.startswith((".", "/"))


def found_from(place: Path, name: str) -> str:
    """Find what a name means in a record that lies in a folder; the hub's names stay as they are."""
    name = expand_home(name)
    at = place / name
    return str(at) if at.exists() or is_path(name) else name


@dataclass(frozen=True)
class Repeat:
    """A merge that is to be done again.

    Attributes:
        settings: with paths where they are.
        expected_sha256: of the base, of each expert and of each file of statistics; None where the recipe doesn't say.
        record: what the new model's record says of its inputs. Of another record it is what that says, word for word,
            so that a repeated merge has the same bytes.
    """

    base: str
    experts: list[Path]
    settings: Merge
    expected_sha256: list[str | None]
    record: dict[str, Any]


def read_recipe(path: Path, out: Path) -> Repeat:
    """Read a recipe: a merge.json or the folder that holds it, a merged .safetensors file, or YAML.

    Args:
        out: the folder of the new record, from which the names of a recipe written by hand will count.

    Raises:
        UserError: it is none, can't be read, or an input is gone.
    """
    recipe, place = parse_recipe(_text_of(path), str(path)), path if path.is_dir() else path.parent
    origin, settings = recipe.origin, recipe.merge
    base = found_from(place, origin.name)
    experts = [Path(found_from(place, name)) for name in recipe.experts]
    located = settings.with_statistics(lambda name: Path(found_from(place, str(name))))
    inputs = [*zip([*experts, *located.statistics], [*recipe.experts, *settings.statistics], strict=True)]
    inputs += [(Path(base), recipe.origin.name)] if is_path(recipe.origin.name) else []
    for found, name in inputs:
        if not found.exists():
            raise UserError(
                f"{path}: there is no {name} from {place.resolve()} on, expected an input of the merge: paths in a "
                "recipe count from its folder, so put it back where it was made, or mend the path"
            )
    names, stated, name = recipe.experts, settings, origin.name
    if recipe.decouple_merge is None:
        names, name = [name_from(out, found) for found in experts], name_from(out, base)
        stated = located.with_statistics(lambda found: Path(name_from(out, found)))
    known = {"name": name} | ({} if origin.sha256 is None else {"sha256": origin.sha256})
    hashes: list[str | None] = [*recipe.experts_sha256] or [None] * len(experts)
    measured: list[str | None] = [*recipe.statistics_sha256] or [None] * len(located.statistics)
    fields = {name: value for name in CARRIED if (value := getattr(recipe, name)) is not None}
    return Repeat(
        base,
        experts,
        located,
        [origin.sha256, *hashes, *measured],
        merge_record(stated, known, names, [], recipe.ranges, **fields),
    )


def _text_of(path: Path) -> str:
    at = path / "merge.json" if path.is_dir() else path
    if at.suffix == ".safetensors":
        text = TensorFiles([at]).metadata.get("merge")
        if text is None:
            raise UserError(f"{path}: no record of a merge in its metadata, expected a file of deme merge")
        return text
    return read_text(at, ADVICE)
