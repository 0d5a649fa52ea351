"""The verbs that need no run: merge, describe and sample any model."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from . import __version__
from .card import model_card
from .config import Merge, Sample, load_config, validate
from .merging import NUM_AHEAD, Lora, Progress, Sources, merge_files, open_expert
from .models import Base, load_base, load_network, new_network, pipeline_folder
from .plan import check, default_device
from .results import denoiser_of, write_images
from .sample import Denoiser, denoiser, sample_images, sampling_copy
from .tensors import NAMES, PROJECTIONS_FILE, num_bytes_of


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
        ValueError: the counts differ, a file is missing or damaged, keys or shapes don't fit the base's, an expert
            is of another base, an input is not the expected one, or has NaN or infinity.
    """
    folder = pipeline_folder(base)
    if folder.is_file() != (out.suffix == ".safetensors"):
        raise ValueError(
            f"--out is {out}, expected a {'.safetensors file' if folder.is_file() else 'folder'}, as the base is one"
        )
    sources = Sources(folder, experts, settings)
    yield from _merge_plan(sources, settings)
    if dry_run and expected_sha256 is None:
        return
    found = [sources.base.sha256(), *(e.files.sha256() for e in sources.experts)]
    for path, sha256, expected in zip([base, *experts], found, expected_sha256 or found, strict=True):
        if sha256 != expected:
            raise ValueError(
                f"{path} is not what the recipe was made with: found {sha256[:16]}, expected {expected[:16]}"
            )
    if dry_run:
        return
    record = {
        "method": settings.method,
        "weights": settings.weights,
        "base": {"name": base, "sha256": found[0]},
        "experts": [str(e) for e in experts],
        "experts_sha256": found[1:],
        "settings": settings.model_dump(mode="json"),
        "decouple_merge": __version__,
    }
    yield from merge_files(folder, out, sources, record, model_card)


def _merge_plan(sources: Sources, settings: Merge) -> Iterator[str]:
    largest = max(math.prod(shape) for _, shape in sources.output.values())
    num_bytes = sum(num_bytes_of(*tensor) for tensor in sources.output.values())
    # Base, sum and a temporary in float32 for each tensor in the making, whatever the number of experts.
    memory = (NUM_AHEAD + 1) * 3 * 4 * largest * (1 if settings.method == "linear" else 1 + len(sources.experts))
    yield (
        f"{settings.method} merge of {len(sources.experts)} experts: {len(sources.output):,} tensors, "
        f"{num_bytes / 1e9:.3g} GB to write, {sum(e.files.num_bytes for e in sources.experts) / 1e9:.3g} GB of experts "
        f"to read, about {memory / 1e9:.2g} GB of memory"
    )


def repeat_merge(recipe: Path, out: Path, dry_run: bool = False) -> Iterator[str | Progress]:
    """Do a merge again from its merge.json, to the same bytes.

    Raises:
        ValueError: the file is no recipe, or an input is gone or is not what it was.
    """
    try:
        record = json.loads(recipe.read_text())
        base, experts = record["base"]["name"], [Path(e) for e in record["experts"]]
        settings = validate(Merge, record["settings"], str(recipe))
        expected = [record["base"]["sha256"], *record["experts_sha256"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{recipe}: expected the merge.json of a deme merge ({error})") from error
    yield from merge_models(base, experts, settings, out, dry_run, expected)


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
    text = recipe.read_text() if recipe.is_file() else files.metadata.get("merge")
    if text is None:
        yield "no record of a merge"
    else:
        yield json.dumps(json.loads(text), indent=2)


def open_model(model: str, device: torch.device) -> tuple[Base, Denoiser]:
    """Open a pipeline, or the ensemble of a run folder."""
    settings = Sample()
    if (Path(model) / "config.yaml").exists():
        plan = check(load_config(Path(model) / "config.yaml"), Path(model))
        return plan.base, denoiser_of(plan, "ensemble", device)
    base = load_base(model)
    if (Path(model) / PROJECTIONS_FILE).exists():
        network = new_network(base, "trunk")
        network.load_state_dict(load_network(Path(model)))
    else:
        network = base.network
    return base, denoiser(sampling_copy(network, settings, device))


def sample_model(model: str, out: Path, num_images: int, seed: int, num_steps: int, sampler: str) -> None:
    """Draw images from a pipeline, or from a run's ensemble, as ``<seed>.png``."""
    device = default_device()
    base, network = open_model(model, device)
    settings = Sample(sampler=sampler, num_steps=num_steps)
    seeds = list(range(seed, seed + num_images))
    write_images(sample_images(network, base, seeds, settings, device), seeds, out)
