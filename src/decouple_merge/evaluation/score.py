"""Score images against references: features to the numbers of metrics, in one pass over the images."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from ..errors import NotFiniteError, UserError
from .distances import FeatureStats
from .extractors import Extractor
from .metrics import METRICS, Metric, check_num_images
from .references import Compared, Reference, check_reference

# An extractor's name and the name of one of its outputs.
Output = tuple[str, str]
Features = dict[Output, Tensor]


def score(
    batches: Iterable[UInt8[Tensor, "_ c h w"]],
    metrics: list[str],
    compared: list[Compared],
) -> dict[str, float]:
    """Compute metrics in one pass over the images, which feeds every extractor.

    Moments are summed as the images come, whatever their number; all metrics but the Fréchet distances keep the
    features of every image.

    Args:
        metrics: of ``METRICS``.
        compared: the extractors that the metrics need, each with its reference.

    Raises:
        UserError: a reference lacks what a metric needs, the images are not uint8, or there are too few.
    """
    return score_features(extract(batches, [extractor for extractor, _ in compared]), metrics, compared)[0]


def extract(batches: Iterable[UInt8[Tensor, "_ c h w"]], extractors: list[Extractor]) -> Iterator[Features]:
    """Run the extractors over the images; features stay on their device, which may not be done with them.

    Raises:
        UserError: the images are not uint8.
    """
    for batch in batches:
        if batch.dtype != torch.uint8:
            raise UserError(f"found {batch.dtype} images, expected uint8 [N, C, H, W], 0 to 255: quantise them")
        yield {(e.name, output): found for e in extractors for output, found in e.extract(batch).items()}


def score_features(
    batches: Iterable[Features], metrics: list[str], compared: list[Compared]
) -> tuple[dict[str, float], int]:
    """Compute metrics as ``score`` does, from features that were extracted already, in the order of the images.

    Returns:
        The values by metric, and the number of images.
    """
    references = {extractor.name: reference for extractor, reference in compared}
    for metric in metrics:
        check_reference(metric, references[METRICS[metric].extractor])
    stats, rows, num = _collect(batches, metrics, [extractor for extractor, _ in compared])
    numbers: dict[Any, Any] = {}

    def value(metric: Metric) -> float:
        output = metric.extractor, metric.output
        if (metric.compute, output) not in numbers:
            found = stats[output] if metric.sums_moments else rows[output]
            against = _reference_side(metric, references[metric.extractor], num)
            numbers[metric.compute, output] = metric.compute(found, against)
        number = numbers[metric.compute, output]
        return number if metric.part is None else number[metric.part]

    return {metric: value(METRICS[metric]) for metric in metrics}, num


def _reference_side(metric: Metric, reference: Reference | None, num_images: int) -> Any:
    """Pick what a metric compares with; the texts are repeated for as many images."""
    if metric.needs is None:
        return None
    assert reference is not None
    if metric.needs == "moments":
        return reference.moments[metric.output]
    rows = reference.rows[metric.needs]
    return rows[torch.arange(num_images) % len(rows)] if metric.needs == "texts" else rows


def _collect(
    batches: Iterable[Features], metrics: list[str], extractors: list[Extractor]
) -> tuple[dict[Output, FeatureStats], dict[Output, Tensor], int]:
    """Sum the moments of outputs for the Fréchet distance, and keep all features for the rest; counts the images.

    A thread of its own fetches a batch's features from the device and sums them, while the next batch is drawn. It does
    no more: a feature network there would turn off TF32 for the sampler too, since the switch is the process's.
    """
    widths = {(e.name, output): width for e in extractors for output, width in e.outputs.items()}
    used = [METRICS[m] for m in metrics]
    summed = [(m.extractor, m.output) for m in used if m.sums_moments]
    stats = {output: FeatureStats.empty(widths[output]) for output in summed}
    kept: dict[Output, list[Tensor]] = {(m.extractor, m.output): [] for m in used if not m.sums_moments}

    def take(features: Features) -> int:
        for output, found in features.items():
            rows = found.cpu()
            if not bool(rows.isfinite().all()):
                raise NotFiniteError(
                    f"the {output[1]} of {output[0]} have NaN or infinity for images {num} to {num + len(rows) - 1}; "
                    "expected finite ones: check the network's weights and its precision"
                )
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
    for metric in metrics:
        check_num_images(metric, num)
    return stats, {key: torch.cat(kept.pop(key)) for key in list(kept)}, num
