"""Score images against a reference, whose statistics are computed once and cached."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .data import Images
from .features import METRICS, Extractor
from .metrics import FeatureStats, frechet_distance, kernel_distance, matrix_root
from .runs import atomic_path, cache_folder, read_tensors, write_tensors

# The kernel distance needs features themselves; this many, evenly spaced, keep its cache small.
NUM_KERNEL_FEATURES = 5000


@dataclass(frozen=True)
class Reference:
    """What images are compared with.

    Attributes:
        name: of the data, with its hash, as records carry it.
        mean, covariance: float64 moments of the features; ``root`` is the covariance's square root.
        features: float32 rows for the kernel distance; none where the reference is statistics only.
    """

    name: str
    num_images: int
    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    root: Float[Tensor, "d d"]
    features: Float[Tensor, "n d"] | None


def make_reference(name: str, images: Images, extractor: Extractor, num_images: int | None = None) -> Reference:
    """Compute the statistics of the first images of a data set, or read them from the cache.

    The cache's key is the hash of the data, of the extractor and the number of images.

    Raises:
        ValueError: there are fewer than two images.
    """
    num = min(num_images or len(images), len(images))
    if num < 2:
        raise ValueError(f"{name}: found {num} image(s), expected at least 2 to compare with")
    key = hashlib.sha256(f"{images.sha256} {extractor.label} {num}".encode()).hexdigest()[:24]
    path = cache_folder() / "reference" / f"{key}.safetensors"
    if not path.exists():
        stats = FeatureStats.empty(extractor.num_features)
        wanted = set(np.linspace(0, num - 1, min(num, NUM_KERNEL_FEATURES)).astype(int).tolist())
        kept = []
        for batch in torch.arange(num).split(256):
            features = extractor.extract(images.stack(batch.tolist()))
            stats.add(features)
            kept.append(features[[i for i, index in enumerate(batch.tolist()) if index in wanted]])
        covariance = stats.covariance
        tensors = {
            "mean": stats.mean,
            "covariance": covariance,
            "root": matrix_root(covariance),
            "features": torch.cat(kept),
        }
        write_tensors(path, tensors)
    tensors, _ = read_tensors(path)
    return Reference(f"{name}:{images.sha256[:16]}:{num}", num, **tensors)


def write_statistics(reference: Reference, path: Path) -> None:
    """Write mean and covariance as ``mu`` and ``sigma`` of an npz file, which pytorch-fid and others read."""
    if path.suffix != ".npz":
        raise ValueError(f"{path}: expected a name that ends in .npz")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=reference.mean.numpy(), sigma=reference.covariance.numpy())


def read_statistics(path: Path, num_features: int) -> Reference:
    """Read ``mu`` and ``sigma`` from an npz file as pytorch-fid and ADM write them.

    Raises:
        ValueError: the file is damaged, lacks the two arrays, or is of another extractor's size.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            mean, covariance = torch.from_numpy(file["mu"]).double(), torch.from_numpy(file["sigma"]).double()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected an npz file with arrays mu and sigma ({error})") from error
    if mean.shape != (num_features,) or covariance.shape != (num_features, num_features):
        raise ValueError(
            f"{path}: found {tuple(mean.shape)} features, expected {num_features}: made by another extractor"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Reference(f"{path.name}:{digest[:16]}", 0, mean, covariance, matrix_root(covariance), None)


def metrics_record(
    model: str,
    metric: str,
    value: float,
    num_images: int,
    seeds: range | None,
    compared: tuple[Extractor, Reference],
    sampling: dict[str, Any],
    git: str | None,
) -> dict[str, Any]:
    """Make a record of metrics.jsonl. Records that differ in extractor, reference, sampling or count don't compare.

    Args:
        seeds: of the images, where a model drew them.
        sampling: sampler, num_steps and what else the images depend on; empty for images that were given.
    """
    extractor, reference = compared
    return {
        "model": model,
        "metric": metric,
        "value": value,
        "num_images": num_images,
        "seeds": None if seeds is None else [seeds.start, seeds.stop - 1],
        "extractor": extractor.label,
        "reference": reference.name,
        "sampler": sampling.get("sampler"),
        "num_steps": sampling.get("num_steps"),
        "timestep_spacing": sampling.get("timestep_spacing"),
        "precision": sampling.get("precision"),
        "git": git,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def score(
    batches: Iterable[UInt8[Tensor, "batch c h w"]], metrics: list[str], compared: list[tuple[Extractor, Reference]]
) -> dict[str, float]:
    """Compute metrics in one pass over the images, which feeds every extractor.

    Args:
        metrics: of ``METRICS``.
        compared: the extractors that the metrics need, each with its reference.

    Raises:
        ValueError: the kernel distance is asked of a reference that has only statistics, or there are under two images.
    """
    by_name = {extractor.name: (extractor, reference) for extractor, reference in compared}
    kernel = [m for m in metrics if m.startswith("k")]
    for metric in kernel:
        reference = by_name[METRICS[metric]][1]
        if reference.features is None:
            raise ValueError(f"{metric} needs the reference's images; {reference.name} holds only mean and covariance")
    keeps_rows = {METRICS[m] for m in kernel}
    stats = {e.name: FeatureStats.empty(e.num_features) for e, _ in compared}
    rows: dict[str, list[Tensor]] = {e.name: [] for e, _ in compared}
    for batch in batches:
        for extractor, _ in compared:
            features = extractor.extract(batch)
            stats[extractor.name].add(features)
            if extractor.name in keeps_rows:
                rows[extractor.name].append(features)
    num = max(s.num for s in stats.values())
    if num < 2:
        raise ValueError(f"found {num} image(s) to score, expected at least 2")
    values = {}
    for metric in metrics:
        name = METRICS[metric]
        reference = by_name[name][1]
        if metric in kernel:
            assert reference.features is not None
            values[metric] = kernel_distance(torch.cat(rows[name]), reference.features)
        else:
            found = stats[name]
            values[metric] = frechet_distance(
                found.mean, found.covariance, reference.mean, reference.covariance, reference.root
            )
    return values
