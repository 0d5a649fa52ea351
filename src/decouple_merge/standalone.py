"""The verbs that need no run: merge, sample and evaluate any model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__
from .card import model_card
from .config import Data, Sample, load_config
from .data import load_images, open_images
from .evaluate import (
    Reference,
    make_reference,
    metrics_record,
    read_statistics,
    score,
    write_statistics,
)
from .features import METRICS, Extractor, check_metrics, load_extractor
from .models import (
    PROJECTIONS_FILE,
    Base,
    export_pipeline,
    load_base,
    load_network,
    new_network,
    tensors_sha256,
)
from .plan import check, default_device, git_commit
from .results import denoiser_of, write_images
from .runs import append_record, read_tensors, write_tensors
from .sample import Denoiser, denoiser, sample_images, sampling_copy
from .weights import cast, check_same_keys, merge


def merge_models(base: str, experts: list[Path], weights: list[float], out: Path) -> None:
    """Merge experts into a base by task arithmetic.

    Args:
        base: a pipeline (``out`` is then a pipeline folder) or a ``.safetensors`` file (``out`` is one).
        experts: expert folders of a run, pipeline folders, or ``.safetensors`` files.

    Raises:
        ValueError: the counts differ, a file is missing or damaged, or keys or shapes don't fit the base's.
    """
    if len(weights) != len(experts):
        raise ValueError(f"{len(weights)} weights for {len(experts)} experts, expected one each")
    single = Path(base).suffix == ".safetensors"
    if single != (out.suffix == ".safetensors"):
        raise ValueError(
            f"--out is {out}, expected a {'.safetensors file' if single else 'folder'}, as the base is one"
        )
    opened = None if single else load_base(base)
    start = read_tensors(Path(base))[0] if opened is None else opened.network.state_dict()
    loaded = [load_network(e) for e in experts]
    for expert, path in zip(loaded, experts, strict=True):
        check_same_keys(start, expert, str(path))
    merged = merge(start, loaded, weights)
    if opened is None:
        write_tensors(out, merged)
        return
    merged = cast(merged, opened.dtype)
    record = {
        "method": "linear",
        "weights": weights,
        "base": {"name": base, "sha256": opened.sha256},
        "experts_sha256": [tensors_sha256(e) for e in loaded],
        "merged_sha256": tensors_sha256(merged),
        "decouple_merge": __version__,
    }
    export_pipeline(opened, merged, out, model_card(record), record)


def _open_model(model: str, device: torch.device) -> tuple[Base, Denoiser]:
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
    base, network = _open_model(model, device)
    settings = Sample(sampler=sampler, num_steps=num_steps)
    seeds = list(range(seed, seed + num_images))
    write_images(sample_images(network, base, seeds, settings, device), seeds, out)


def evaluate_model(
    model: str,
    reference: str,
    metrics: list[str],
    num_images: int,
    seed: int,
    out: Path,
    inception_weights: Path | None,
) -> Iterator[dict[str, Any]]:
    """Score a model, on images drawn on the fly, or images, against images or npz statistics.

    Raises:
        ValueError: a metric, the model, the images or the reference is wrong.
    """
    check_metrics(metrics, inception_weights)
    device, seeds, settings = default_device(), range(seed, seed + num_images), Sample()
    is_model = _is_model(model)
    batches: Iterator[torch.Tensor]
    if is_model:
        base, network = _open_model(model, device)
        batches = sample_images(network, base, seeds, settings, device)
        channels, size = base.channels, base.image_size
    else:
        images = open_images(model)
        channels, size = images[0].shape[0], images[0].shape[1]
        batches = (images.stack(b.tolist()) for b in torch.arange(len(images)).split(256))
        num_images = len(images)
    compared = {}
    for name in dict.fromkeys(METRICS[m] for m in metrics):
        extractor = load_extractor(name, device, inception_weights)
        compared[name] = (extractor, _any_reference(reference, extractor, channels, size))
    drawn = seeds if is_model else None
    sampling = settings.model_dump() if is_model else {}
    for metric, value in score(batches, metrics, list(compared.values())).items():
        found = compared[METRICS[metric]]
        record = metrics_record(model, metric, value, num_images, drawn, found, sampling, git_commit())
        append_record(out, record)
        yield record


def _is_model(name: str) -> bool:
    path = Path(name)
    is_hub_name = not path.exists() and "/" in name and ":" not in name
    return is_hub_name or (path / "model_index.json").exists() or (path / "config.yaml").exists()


def _any_reference(reference: str, extractor: Extractor, channels: int, size: int) -> Reference:
    path = Path(reference)
    if path.suffix == ".npz" and path.is_file() and "mu" in np.load(path, allow_pickle=False).files:
        return read_statistics(path, extractor.num_features)
    return make_reference(reference, load_images(Data(source=reference), channels, size), extractor)


def write_reference(images: str, out: Path, metric: str, inception_weights: Path | None) -> None:
    """Write the mean and covariance of a data set's features as an npz file."""
    check_metrics([metric], inception_weights)
    extractor = load_extractor(METRICS[metric], default_device(), inception_weights)
    write_statistics(make_reference(images, open_images(images), extractor), out)
