"""Score anything: a model, images from wherever they come, against images, statistics or another model."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Sample, Text
from ..data.images import ArrayImages, Images
from ..data.sources import open_images
from ..executors.devices import default_device
from ..executors.local import in_order, run_all, shares
from ..storage.files import append_record
from ..storage.provenance import git_commit
from .features import MEASURED, METRICS, Extractor, check_metrics, load_extractor, weights_of
from .images import Scored, Source, is_model, open_scored
from .references import Reference, holds_statistics, make_reference, read_statistics, text_reference, write_statistics
from .scores import (
    Features,
    Output,
    check_reference,
    extract,
    metrics_record,
    needs_reference,
    needs_rows,
    score_features,
)


def evaluate_model(
    model: str | Iterable[Tensor],
    reference: str | Iterable[Tensor] | None,
    metrics: list[str],
    num_images: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    inception_weights: Path | None = None,
    encoders: dict[str, str] | None = None,
    settings: Sample | None = None,
    name: str | None = None,
    text: Text | None = None,
    num_processes: int = 1,
    image_size: int | None = None,
    num_reference_images: int | None = None,
) -> Iterator[dict[str, Any] | str]:
    """Score a model on images drawn on the fly, or images, against images or statistics; yields records and warnings.

    Args:
        model: a pipeline or a run (its ensemble); images as a folder, zip, tar, npz, npy or ``datasets:NAME``; or
            batches of uint8 [N, C, H, W], of which nothing is kept.
        reference: any of these, or npz statistics; a model draws as many images from the seeds that follow. None where
            no metric compares.
        metrics: of ``features.METRICS``.
        num_images: of a model, 5,000 where not given; of images the first so many, all where not given.
        out: a metrics file that records are appended to.
        encoders: folder or hub name of ``dinov2`` and ``clip``.
        settings: how a model draws; DDIM with 50 steps where not given.
        name: of the model in the records; the path where not given.
        text: prompts and guidance, where models are text-to-image; of images, what the CLIP score says that they show.
        num_processes: share the batches of a model or of images, each with the networks in its memory. The numbers are
            those of one process. Batches that are given, and the reference, are this one's.
        image_size: images and reference are cut to a square and resized to this before they are scored; what a model
            draws is never enlarged.
        num_reference_images: that the reference must have, where it isn't statistics.

    Raises:
        ValueError: a metric, its weights, the model, the images or the reference is wrong.
    """
    check_metrics(metrics, inception_weights, encoders)
    name = name or (model if isinstance(model, str) else "images")
    device = default_device()
    with_texts = [m for m in metrics if METRICS[m] == "clip_text"]
    source = Source(model, num_images, seed, settings or Sample(), text or Text(), image_size)
    scored = open_scored(source, device, bool(with_texts))
    if with_texts and not scored.texts:
        raise ValueError(
            f"{with_texts[0]} needs the texts that the images of {name} show: give --prompts, or take another metric "
            "for a model that reads none"
        )
    if scored.has_jpeg:
        yield (
            f"warning: {name} holds JPEG files, whose compression moves every metric; compare only with images that "
            "were compressed alike, or store PNG"
        )
    against = reference if reference is None or isinstance(reference, str) else _collect(reference)
    compared: dict[str, tuple[Extractor, Reference | None]] = {}
    for extractor_name in dict.fromkeys(METRICS[m] for m in metrics):
        extractor = load_extractor(extractor_name, device, weights_of(extractor_name, inception_weights, encoders))
        needed = [m for m in metrics if METRICS[m] == extractor_name]
        found = None
        if extractor.embed is not None:
            found = text_reference(scored.prompts, scored.texts, extractor)
        elif against is not None and any(map(needs_reference, needed)):
            with_rows = any(map(needs_rows, needed))
            found = _any_reference(against, extractor, source, scored, with_rows, num_reference_images)
        for metric in needed:
            check_reference(metric, found)
        compared[extractor_name] = (extractor, found)
    extracted = extract(scored.batches, [extractor for extractor, _ in compared.values()])
    if num_processes > 1 and scored.num_batches > 1:
        weights = {extractor: weights_of(extractor, inception_weights, encoders) for extractor in compared}
        calls = [(source, weights, share) for share in shares(scored.num_batches, num_processes)]
        arrays = in_order(run_all(_extract_share, calls, num_processes))
        extracted = ({key: torch.from_numpy(value) for key, value in found.items()} for found in arrays)
        # What was opened here to look at it need not stay in memory.
        scored.batches = []
    num = 0

    def counted() -> Iterator[Features]:
        nonlocal num
        for features in extracted:
            num += len(next(iter(features.values())))
            yield features

    for metric, value in score_features(counted(), metrics, list(compared.values())).items():
        used = compared[METRICS[metric]]
        if warning := rank_warning(metric, num, used[0]):
            yield warning
        record = metrics_record(name, metric, value, num, scored.seeds, used, scored.sampling, git_commit())
        if out is not None:
            append_record(out, record)
        yield record


def _extract_share(
    source: Source, weights: dict[str, Any], share: slice
) -> Iterator[tuple[int, dict[Output, np.ndarray]]]:
    """Extract the features of some batches in a process of its own; yields them with their numbers.

    As arrays: tensors would be sent as handles of memory that goes with the process.
    """
    device = default_device()
    scored = open_scored(source, device, share=share)
    extractors = [load_extractor(name, device, path) for name, path in weights.items()]
    numbers = range(scored.num_batches)[share]
    for number, features in zip(numbers, extract(scored.batches, extractors), strict=True):
        yield number, {key: value.cpu().numpy() for key, value in features.items()}


def rank_warning(metric: str, num_images: int, extractor: Extractor) -> str | None:
    """Say where a covariance of too few images is singular, which biases the Fréchet distance."""
    measure, _, output = MEASURED[metric]
    if measure != "fd" or num_images > extractor.outputs[output]:
        return None
    return (
        f"warning: {metric} of {num_images} images with {extractor.outputs[output]} features each: the covariance is "
        "singular and the value much too large; compare it only with values of as many images, or use a kernel distance"
    )


def _collect(batches: Iterable[Tensor]) -> Images:
    return ArrayImages(torch.cat(list(batches)).numpy())


def _any_reference(
    reference: str | Images,
    extractor: Extractor,
    source: Source,
    scored: Scored,
    with_rows: bool,
    num_images: int | None,
) -> Reference:
    if not isinstance(reference, str):
        return make_reference("images", reference, extractor)
    if holds_statistics(Path(reference)):
        return read_statistics(Path(reference), extractor, with_rows)
    if is_model(reference):
        first = scored.seeds.stop if scored.seeds else 0
        other = replace(source, model=reference, num_images=scored.num_images, seed=first)
        return make_reference(reference, _collect(open_scored(other, default_device()).batches), extractor)
    images = open_images(reference, source.image_size, scored.channels if source.image_size else None)
    if num_images is not None and len(images) != num_images:
        raise ValueError(
            f"--reference {reference}: found {len(images)} images, expected {num_images}; give the whole data set, or "
            "say with --set num_reference_images=N that another is meant"
        )
    channels, height, width = images[0].shape
    if (channels, height, width) != (scored.channels, scored.size, scored.size):
        raise ValueError(
            f"--reference {reference}: found images {width}×{height} with {channels} channel(s), expected "
            f"{scored.size}×{scored.size} with {scored.channels}, as what is scored: resize or convert one of them"
        )
    return make_reference(reference, images, extractor)


def write_reference(
    images: str,
    out: Path,
    metric: str,
    inception_weights: Path | None,
    encoders: dict[str, str] | None = None,
    image_size: int | None = None,
) -> None:
    """Write the mean and covariance of a data set's features as an npz file, of images resized where asked."""
    check_metrics([metric], inception_weights, encoders)
    if METRICS[metric] == "clip_text":
        raise ValueError(f"{metric} compares images with texts, for which there are no statistics; take another metric")
    weights = weights_of(METRICS[metric], inception_weights, encoders)
    extractor = load_extractor(METRICS[metric], default_device(), weights)
    write_statistics(make_reference(images, open_images(images, image_size), extractor), out)
