"""Merge files by a recipe, and read back what a model is made of; needs neither diffusers nor a network."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from ..config import Merge, validate
from ..errors import UserError
from ..storage.hub import pipeline_folder
from ..storage.outputs import MERGED_FILE, MERGED_FOLDER, Kind, check_output
from ..storage.reading import as_record, parse_json, read_record, read_text
from ..storage.tensors import NAMES, num_bytes_of
from .card import model_card
from .experts import open_expert
from .files import NUM_AHEAD, Progress, merge_files
from .lora import Lora
from .record import merge_record
from .rules import check_method
from .sources import Sources, widened_sha256


def merge_models(
    base: str,
    experts: list[Path],
    settings: Merge,
    out: Path,
    dry_run: bool = False,
    expected_sha256: list[str] | None = None,
) -> Iterator[str | Progress]:
    """Merge experts into a base, one tensor at a time; yields lines for the user and progress in bytes.

    Args:
        base: a pipeline or a network's folder (``out`` is then a folder), or a ``.safetensors`` file (``out`` is one).
        experts: expert folders of a run, pipelines, networks' folders, ``.safetensors`` files or LoRAs.
        dry_run: check everything and say what would be done.
        expected_sha256: of the base and of each expert, where a recipe says what they were.

    Raises:
        UserError: ``out`` may not be written, there is no such rule, the counts differ, a file is missing or damaged,
            keys or shapes don't fit the base's, an expert is of another base, an input is not the expected one, or has
            NaN or infinity.
    """
    check_method(settings.method)
    check_output(out, _kind(out), [base, *experts, *settings.fishers])
    folder = pipeline_folder(base)
    if folder.is_file() != (out.suffix == ".safetensors"):
        raise UserError(
            f"--out is {out}, expected a {'.safetensors file' if folder.is_file() else 'folder'}, as the base is one"
        )
    sources = Sources(folder, experts, settings)
    for expert in sources.experts:
        yield from expert.notes
    yield from _merge_plan(sources, settings)
    if dry_run and expected_sha256 is None:
        return
    inputs = zip([base, *experts], [sources.base, *(e.files for e in sources.experts)], strict=True)
    for (path, files), expected in zip(inputs, expected_sha256 or [], strict=expected_sha256 is not None):
        if (sha256 := files.sha256()) != expected and widened_sha256(files) != expected:
            raise UserError(
                f"{path} is not what the recipe was made with: found {sha256[:16]}, expected {expected[:16]}"
            )
    if dry_run:
        return
    record = merge_record(settings, {"name": base}, [str(e) for e in experts], [])
    yield from merge_files(folder, out, sources, record, model_card)


def _kind(out: Path) -> Kind:
    return MERGED_FILE if out.suffix == ".safetensors" else MERGED_FOLDER


def _merge_plan(sources: Sources, settings: Merge) -> Iterator[str]:
    largest = max(math.prod(shape) for _, shape in sources.output.values())
    num_bytes = sum(num_bytes_of(*tensor) for tensor in sources.output.values())
    # Base, sum and a temporary in float32 for each tensor in the making; other rules hold coefficients, and votes in
    # float64.
    floats = 3 if settings.method == "linear" else 9 + 3 * len(sources.experts)
    memory = (NUM_AHEAD + 1) * 4 * floats * largest
    yield (
        f"{settings.method} merge of {len(sources.experts)} experts: {len(sources.output):,} tensors, "
        f"{num_bytes / 1e9:.3g} GB to write, {sum(e.files.num_bytes for e in sources.experts) / 1e9:.3g} GB of experts "
        f"to read, about {memory / 1e9:.2g} GB of memory"
    )


def repeat_merge(recipe: Path, out: Path, dry_run: bool = False) -> Iterator[str | Progress]:
    """Do a merge again, to the same bytes, from its merge.json or from that of a run.

    Raises:
        UserError: the file is no recipe, ``out`` may not be written, or an input is gone or is not what it was.
    """
    check_output(out, _kind(out), [recipe])
    advice = "give the merge.json of a deme merge or of a run"
    record = read_record(recipe, advice, base=dict, experts=list, settings=dict, experts_sha256=list)
    base = as_record(record["base"], f"{recipe}, base", advice, name=str, sha256=str)
    if not all(isinstance(name, str) for name in [*record["experts"], *record["experts_sha256"]]):
        raise UserError(f"{recipe}: experts or experts_sha256 hold other things than texts; {advice}")
    settings = validate(Merge, record["settings"], str(recipe))
    experts, expected = [_beside(recipe, e) for e in record["experts"]], [base["sha256"], *record["experts_sha256"]]
    yield from merge_models(base["name"], experts, settings, out, dry_run, expected)


def _beside(recipe: Path, name: str) -> Path:
    """Find an input where its name says, or from the recipe's folder on, which is where runs count from."""
    return recipe.parent / name if not Path(name).exists() and (recipe.parent / name).exists() else Path(name)


def describe_model(model: Path) -> Iterator[str]:
    """Say what a model's files hold, and how it was merged if it was."""
    opened = open_expert(model)
    files, kind = opened.files, "LoRA" if isinstance(opened, Lora) else "weights"
    sizes: dict[str, int] = {}
    for entry in files.entries.values():
        name = NAMES[entry.dtype]
        sizes[name] = sizes.get(name, 0) + math.prod(entry.shape)
    yield f"{model}: {kind}, {len(files.entries):,} tensors, {files.num_bytes:,} bytes"
    yield "elements: " + ", ".join(f"{n:,} {name}" for name, n in sorted(sizes.items()))
    yield f"sha256 of the tensors: {files.sha256()}"
    recipe = model / "merge.json"
    advice = "remove the record, or merge again"
    text = read_text(recipe, advice) if recipe.is_file() else files.metadata.get("merge")
    if text is None:
        yield "no record of a merge"
    else:
        yield json.dumps(parse_json(text, model, advice), indent=2)
