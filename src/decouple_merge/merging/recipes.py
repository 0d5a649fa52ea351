"""Merge files by a recipe, and read back what a model is made of; needs neither diffusers nor a network."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Merge
from ..errors import UserError
from ..storage.hub import pipeline_folder
from ..storage.outputs import MERGED_FILE, MERGED_FOLDER, Kind, check_output
from ..storage.reading import read_record
from ..storage.tensors import num_bytes_of
from .card import model_card
from .differences import differences, differing_integers
from .experts import open_model
from .files import NUM_AHEAD, Progress, merge_files
from .joining import describe_joined
from .lora import Lora
from .record import merge_record, name_from, read_recipe
from .rules import RULES, check_method, check_settings
from .sources import Sources
from .usage import inherited, usage_of


def merge_models(
    base: str, experts: list[Path], settings: Merge, out: Path, dry_run: bool = False
) -> Iterator[str | Progress]:
    """Merge experts into a base, one tensor at a time; yields lines for the user and progress in bytes.

    Args:
        base: a pipeline or a network's folder (``out`` is then a folder), or a ``.safetensors`` file (``out`` is one).
        experts: expert folders of a run, pipelines, networks' folders, ``.safetensors`` files or LoRAs.
        dry_run: check everything and say what would be done.

    Raises:
        UserError: ``out`` may not be written, there is no such rule, the counts differ, a file is missing or damaged,
            keys or shapes don't fit the base's, an expert is of another base, or has NaN or infinity.
    """
    place = _place_of(out)
    named = settings.with_statistics(lambda path: Path(name_from(place, path)))
    ranges = [_range_of(path) for path in experts]
    record = merge_record(
        named,
        {"name": name_from(place, base)},
        [name_from(place, e) for e in experts],
        [],
        ranges if any(ranges) else None,
    )
    yield from _merge(
        base, experts, settings, out, dry_run, record, [None] * (1 + len(experts) + len(settings.statistics))
    )


def repeat_merge(recipe: Path, out: Path, dry_run: bool = False) -> Iterator[str | Progress]:
    """Do a merge again, to the same bytes, from its record or from a recipe written by hand.

    Args:
        recipe: a merge.json, of a run too, or the folder that holds it; a merged ``.safetensors`` file; or YAML.

    Raises:
        UserError: the file is no recipe, an input is gone or is not what it was, or as ``merge_models``.
    """
    check_output(out, _kind(out), [recipe])
    found = read_recipe(recipe, _place_of(out))
    yield from _merge(found.base, found.experts, found.settings, out, dry_run, found.record, found.expected_sha256)


def _merge(
    base: str,
    experts: list[Path],
    settings: Merge,
    out: Path,
    dry_run: bool,
    record: dict[str, Any],
    expected_sha256: list[str | None],
) -> Iterator[str | Progress]:
    check_method(settings.method)
    check_settings(settings.method, settings.rule_settings())
    check_output(out, _kind(out), [base, *experts, *settings.statistics])
    folder = pipeline_folder(base)
    if folder.is_file() != (out.suffix == ".safetensors"):
        raise UserError(
            f"--out is {out}, expected a {'.safetensors file' if folder.is_file() else 'folder'}, as the base is one"
        )
    sources = Sources(folder, experts, settings, expected_sha256[1 : 1 + len(experts)])
    for expert, path in zip(sources.experts, experts, strict=True):
        yield from expert.notes
        yield from differences(folder, path, sources.parts)
    yield from differing_integers(sources, experts)
    if sources.joined:
        yield from describe_joined(sources.joined, {name: open_model(at) for name, at in sources.joined.items()})
    yield from _merge_plan(sources, settings)
    sources.check_sha256([base, *experts, *settings.statistics], expected_sha256)
    if dry_run:
        return
    if sources.projections:
        record = {**record, "projection": "trunk"}
    usage, kept = usage_of(folder), inherited(folder, record["base"]["name"])
    yield from merge_files(folder, out, sources, record, lambda record: model_card(record, usage, kept))
    for i in sorted(sources.idle):
        yield f"warning: {experts[i]} has the base's own tensors and no other: it changes nothing"


def _range_of(expert: Path) -> list[int | float] | None:
    """Read on which timesteps a run's expert was finetuned; None of any other model."""
    path = (expert if expert.is_dir() else expert.parent) / "expert.json"
    own = read_record(path, "remove it, or make the expert again").get("own") if path.is_file() else None
    ends = [own.get("low"), own.get("high")] if isinstance(own, dict) else [None]
    numbers: list[int | float] = [end for end in ends if isinstance(end, int | float)]
    return numbers if numbers == ends else None


def _place_of(out: Path) -> Path:
    return out.parent if out.suffix == ".safetensors" else out


def _kind(out: Path) -> Kind:
    return MERGED_FILE if out.suffix == ".safetensors" else MERGED_FOLDER


def _merge_plan(sources: Sources, settings: Merge) -> Iterator[str]:
    largest = max(math.prod(shape) for _, shape in sources.output.values())
    num_bytes = sum(num_bytes_of(*tensor) for tensor in sources.output.values())
    rule, num_adapters = RULES[settings.method], sum(isinstance(e, Lora) for e in sources.experts)
    work = max(rule.work(shape) for _, shape in sources.output.values())
    # An adapter's tensor is made whole, where another's lies in its file.
    memory = (NUM_AHEAD + 1) * (4 * (rule.num_tensors + num_adapters) * largest + work)
    yield (
        f"{settings.method} merge of {len(sources.experts)} experts: {len(sources.output):,} tensors, "
        f"{num_bytes / 1e9:.3g} GB to write, {sum(e.files.num_bytes for e in sources.experts) / 1e9:.3g} GB of experts "
        f"to read, about {memory / 1e9:.2g} GB of memory"
    )
