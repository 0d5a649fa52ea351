"""Score images against a reference, and record the numbers with all that they depend on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from .distances import (
    FeatureStats,
    clip_score,
    frechet_distance,
    frechet_infinity,
    gaussian_kernel_distance,
    inception_score,
    kernel_distance,
    r_precision,
)
from .features import MEASURED, METRICS, Extractor, Metric
from .neighbours import density_coverage, precision_recall
from .references import Reference

# An extractor's name and the name of one of its outputs.
Output = tuple[str, str]
Features = dict[Output, Tensor]
# Which of a reference's rows a measure needs; measures that aren't here do with its moments.
ROWS = {
    "kd": "kernel",
    "cmmd": "neighbours",
    **dict.fromkeys(["clip_score", "r_precision"], "texts"),
    **dict.fromkeys(["precision", "recall", "density", "coverage"], "neighbours"),
}


def needs_reference(metric: str) -> bool:
    """Say whether a metric compares with a reference: all do but the Inception Score."""
    return MEASURED[metric].measure != "inception_score"


def needs_rows(metric: str) -> bool:
    """Say whether a metric needs the features of the reference's images, not only their moments."""
    return MEASURED[metric].measure in ROWS


def metrics_record(
    model: str,
    metric: str,
    value: float,
    num_images: int,
    seeds: range | None,
    compared: tuple[Extractor, Reference | None],
    sampling: dict[str, Any],
    git: str | None,
) -> dict[str, Any]:
    """Make a record of metrics.jsonl. Records that differ in extractor, reference, sampling or count don't compare.

    Args:
        seeds: of the images, where a model drew them.
        sampling: sampler, num_steps and what else the images depend on, and what they were resized to.
    """
    extractor, reference = compared
    return {
        "model": model,
        "metric": metric,
        "value": value,
        "num_images": num_images,
        "seeds": None if seeds is None else [seeds.start, seeds.stop - 1],
        "extractor": extractor.label,
        "reference": reference.name if reference and needs_reference(metric) else None,
        "sampler": sampling.get("sampler"),
        "num_steps": sampling.get("num_steps"),
        "timestep_spacing": sampling.get("timestep_spacing"),
        "precision": sampling.get("precision"),
        "prompts": sampling.get("prompts"),
        "resize": sampling.get("resize"),
        "git": git,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_reference(metric: str, reference: Reference | None) -> None:
    """Require that a reference has what a metric compares with.

    Raises:
        ValueError: as said.
    """
    if not needs_reference(metric):
        return
    if reference is None:
        raise ValueError(f"{metric} needs a reference to compare with: give --reference")
    if needs_rows(metric) and not reference.rows:
        raise ValueError(f"{metric} needs the reference's images; {reference.name} holds only mean and covariance")
    if not needs_rows(metric) and MEASURED[metric].output not in reference.moments:
        raise ValueError(
            f"{metric} needs the reference's {MEASURED[metric].output} statistics (mu_s, sigma_s); {reference.name} "
            "has none: give images, or a file of deme stats"
        )


def score(
    batches: Iterable[UInt8[Tensor, "_ c h w"]],
    metrics: list[str],
    compared: list[tuple[Extractor, Reference | None]],
) -> dict[str, float]:
    """Compute metrics in one pass over the images, which feeds every extractor.

    Moments are summed as the images come, whatever their number; all metrics but the Fréchet distances keep the
    features of every image.

    Args:
        metrics: of ``METRICS``.
        compared: the extractors that the metrics need, each with its reference.

    Raises:
        ValueError: a reference lacks what a metric needs, the images are not uint8, or there are under two.
    """
    return score_features(extract(batches, [extractor for extractor, _ in compared]), metrics, compared)


def extract(batches: Iterable[UInt8[Tensor, "_ c h w"]], extractors: list[Extractor]) -> Iterator[Features]:
    """Run the extractors over the images; features stay on their device, which may not be done with them.

    Raises:
        ValueError: the images are not uint8.
    """
    for batch in batches:
        if batch.dtype != torch.uint8:
            raise ValueError(f"found {batch.dtype} images, expected uint8 [N, C, H, W], 0 to 255: quantise them")
        yield {(e.name, output): found for e in extractors for output, found in e.extract(batch).items()}


def score_features(
    batches: Iterable[Features], metrics: list[str], compared: list[tuple[Extractor, Reference | None]]
) -> dict[str, float]:
    """Compute metrics as ``score`` does, from features that were extracted already, in the order of the images."""
    references = {extractor.name: reference for extractor, reference in compared}
    for metric in metrics:
        check_reference(metric, references[METRICS[metric]])
    stats, rows = _collect(batches, [MEASURED[m] for m in metrics], [extractor for extractor, _ in compared])

    @cache
    def neighbours(function: Callable[[Tensor, Tensor], tuple[float, float]], name: str) -> tuple[float, float]:
        reference = references[name]
        assert reference is not None
        return function(reference.rows["neighbours"], rows[name, "features"])

    def value(metric: str) -> float:
        measure, name, output = MEASURED[metric]
        if measure in ("precision", "recall"):
            return neighbours(precision_recall, name)[measure == "recall"]
        if measure in ("density", "coverage"):
            return neighbours(density_coverage, name)[measure == "coverage"]
        if measure == "inception_score":
            return inception_score(rows[name, output])[0]
        reference = references[name]
        assert reference is not None
        if measure == "kd":
            return kernel_distance(rows[name, output], reference.rows["kernel"])
        if ROWS.get(measure) == "texts":
            found = rows[name, output]
            texts = reference.rows["texts"][torch.arange(len(found)) % len(reference.rows["texts"])]
            return (clip_score if measure == "clip_score" else r_precision)(found, texts)
        if measure == "cmmd":
            return 1000 * gaussian_kernel_distance(rows[name, output], reference.rows["neighbours"])
        moments = reference.moments[output]
        if measure == "fd_infinity":
            return frechet_infinity(rows[name, output], moments.mean, moments.covariance, moments.root)
        summed = stats[name, output]
        return frechet_distance(summed.mean, summed.covariance, moments.mean, moments.covariance, moments.root)

    return {metric: value(metric) for metric in metrics}


def _collect(
    batches: Iterable[Features], measured: list[Metric], extractors: list[Extractor]
) -> tuple[dict[Output, FeatureStats], dict[Output, Tensor]]:
    """Sum the moments of outputs for the Fréchet distance, and keep all features for the rest.

    A thread of its own fetches a batch's features from the device and sums them, while the next batch is drawn. It does
    no more: a feature network there would turn off TF32 for the sampler too, since the switch is the process's.
    """
    widths = {(e.name, output): width for e in extractors for output, width in e.outputs.items()}
    stats = {m[1:]: FeatureStats.empty(widths[m[1:]]) for m in measured if m.measure == "fd"}
    kept: dict[Output, list[Tensor]] = {m[1:]: [] for m in measured if m.measure != "fd"}

    def take(features: Features) -> int:
        for output, found in features.items():
            rows = found.cpu()
            if output in stats:
                stats[output].add(rows)
            if output in kept:
                kept[output].append(rows)
        return len(rows)

    num, taken = 0, None
    with ThreadPoolExecutor(1) as thread:
        for features in batches:
            # One batch waits at most.
            num += taken.result() if taken else 0
            taken = thread.submit(take, features)
        num += taken.result() if taken else 0
    if num < 2:
        raise ValueError(f"found {num} image(s) to score, expected at least 2")
    return stats, {key: torch.cat(kept.pop(key)) for key in list(kept)}
