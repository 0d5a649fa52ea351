"""Score anything: a model, images from wherever they come, against images, statistics or another model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Protocol
from ..data.decoding import resize_images
from ..data.images import ArrayImages, Images
from ..data.sources import open_images
from ..errors import UserError
from ..executors import run_all
from ..executors.devices import default_device
from ..executors.local import in_order, shares
from ..storage.files import append_record
from ..storage.outputs import RECORDS, check_output
from .extractors import Extractor, load_extractor, weights_of
from .metrics import METRICS, check_metrics, check_num_images, extractors_of
from .records import make_record
from .references import (
    NUM_ROWS,
    Compared,
    Reference,
    check_reference,
    holds_images,
    holds_statistics,
    make_reference,
    names_of,
    read_statistics,
    text_reference,
)
from .score import Features, Output, extract, score_features
from .scored_images import Scored, check_batch, is_model, open_scored


def evaluate_model(
    model: str | Iterable[Tensor],
    reference: str | Iterable[Tensor] | None,
    settings: Protocol,
    out: Path | None = None,
    name: str | None = None,
) -> Iterator[dict[str, Any] | str]:
    """Score a model on images drawn on the fly, or images, against images or statistics; yields records and warnings.

    Args:
        model: a pipeline or a run (its ensemble); images as a folder, zip, tar, npz, npy or ``datasets:NAME``; or
            batches of uint8 [N, C, H, W], of which nothing is kept.
        reference: any of these, or npz statistics; a model draws as many images from the seeds that follow. None where
            no metric compares.
        settings: metrics, images, weights of feature networks, how a model draws.
        out: a metrics file that records are appended to.
        name: of the model in the records; the path where not given.

    Raises:
        UserError: a metric, its weights, the model, the images or the reference is wrong, or ``out`` holds something
            else than records.
    """
    if out is not None:
        check_output(out, RECORDS, [given for given in (model, reference) if isinstance(given, str)])
    check_metrics(settings.metrics, settings)
    name = name or (model if isinstance(model, str) else "images")
    scored = _open(model, name, settings)
    if scored.has_jpeg:
        yield (
            f"warning: {name} holds JPEG files, whose compression moves every metric; compare only with images that "
            "were compressed alike, or store PNG"
        )
    yield from scored.notes
    compared, sha256 = _open_compared(reference, scored, settings), scored.sha256()
    features = _features(model, scored, settings, [extractor for extractor, _ in compared.values()])
    values, num_images = score_features(features, settings.metrics, list(compared.values()))
    for metric, value in values.items():
        used = compared[METRICS[metric].extractor]
        if warning := rank_warning(metric, num_images, used):
            yield warning
        depends_on = names_of(metric, used) | scored.sampling
        record = make_record(name, metric, value, num_images, scored.seeds, depends_on, sha256)
        if out is not None:
            append_record(out, record)
        yield record


def _open(model: str | Iterable[Tensor], name: str, settings: Protocol) -> Scored:
    """Open what is scored, and require that the metrics can be computed of it."""
    with_texts = [m for m in settings.metrics if METRICS[m].needs == "texts"]
    scored = open_scored(model, settings, bool(with_texts))
    if with_texts and not scored.texts:
        raise UserError(
            f"{with_texts[0]} needs the texts that the images of {name} show: give --prompts, or take another metric "
            "for a model that reads none"
        )
    if scored.num_images is not None:
        for metric in settings.metrics:
            check_num_images(metric, scored.num_images)
    return scored


def _open_compared(reference: str | Iterable[Tensor] | None, scored: Scored, settings: Protocol) -> dict[str, Compared]:
    """Open the feature networks that the metrics need, by name, each with what images are compared with in it."""
    extractors = [load_extractor(n, default_device(), weights_of(n, settings)) for n in extractors_of(settings.metrics)]
    against: Against | None = None
    compared: dict[str, Compared] = {}
    for extractor in extractors:
        needed = [m for m in settings.metrics if METRICS[m].extractor == extractor.name]
        needs, found = {METRICS[m].needs for m in needed} - {None}, None
        if extractor.embed is not None:
            found = text_reference(scored.prompts, scored.texts, extractor)
        elif reference is not None and needs:
            against = against or _open_reference(reference, scored, settings)
            found = against.reference(extractor, with_rows=bool(needs & NUM_ROWS.keys()))
        for metric in needed:
            check_reference(metric, found)
        compared[extractor.name] = (extractor, found)
    return compared


@dataclass(frozen=True)
class Against:
    """What images are compared with, before any network looks at it.

    Attributes:
        name: as records carry it.
        images: opens them, as what is scored has them; None where there are only statistics.
        statistics: the file that has them.
    """

    name: str
    images: Callable[[], Images] | None
    statistics: Path | None = None

    def reference(self, extractor: Extractor, with_rows: bool) -> Reference:
        """Measure it in a network.

        Args:
            with_rows: features of images are needed, too, where there are any.
        """
        if self.statistics is not None:
            return read_statistics(self.statistics, extractor, self.images() if self.images and with_rows else None)
        assert self.images is not None
        return make_reference(self.name, self.images(), extractor)


def _open_reference(reference: str | Iterable[Tensor], scored: Scored, settings: Protocol) -> Against:
    """Find out what images are compared with: a file of statistics, or images with the name of where they are from."""
    if isinstance(reference, str) and holds_statistics(path := Path(reference)):
        images = partial(_opened_images, reference, scored, settings) if holds_images(path) else None
        return Against(reference, images, path)
    if not isinstance(reference, str):
        name, found = "images", _alike(_collect(reference, settings.image_size), "the reference", scored)
    elif is_model(reference):
        first = scored.seeds.stop if scored.seeds else 0
        others = settings.model_copy(update={"num_images": scored.num_images, "seed": first})
        drawn = _collect(open_scored(reference, others).batches(slice(None)))
        name, found = reference, _alike(drawn, f"--reference {reference}", scored)
    else:
        name, found = reference, _opened_images(reference, scored, settings)
    return Against(name, lambda: found)


def _opened_images(reference: str, scored: Scored, settings: Protocol) -> Images:
    # Grey shows the same in colour; a reference in colour would be another one in grey.
    channels = 3 if settings.image_size and scored.channels == 3 else None
    skips, split, column = settings.skip_damaged, settings.split, settings.column
    images = open_images(reference, settings.image_size, channels, skips, split, column)
    num_expected = settings.num_reference_images
    if num_expected is not None and len(images) != num_expected:
        raise UserError(
            f"--reference {reference}: found {len(images)} images, expected {num_expected}; give the whole data set, "
            "or say with --set num_reference_images=N that another is meant"
        )
    return _alike(images, f"--reference {reference}", scored)


def _alike(images: Images, what: str, scored: Scored) -> Images:
    """Require that images have the size and channels of what is scored."""
    found, height, width = images[0].shape
    if (found, height, width) != (scored.channels, scored.size, scored.size):
        raise UserError(
            f"{what}: found images {width}×{height} with {found} channel(s), expected {scored.size}×{scored.size} with "
            f"{scored.channels}, as what is scored: resize or convert one of them"
        )
    return images


def _collect(batches: Iterable[Tensor], size: int | None = None) -> Images:
    """Hold the images of batches in memory, resized where asked."""
    found = []
    for batch in batches:
        check_batch(batch)
        found.append(batch if size is None else resize_images(batch, size))
    if not found:
        raise UserError("the reference has no images, expected batches of them")
    return ArrayImages(torch.cat(found).numpy())


def _features(
    model: str | Iterable[Tensor], scored: Scored, settings: Protocol, extractors: list[Extractor]
) -> Iterator[Features]:
    """Extract the features of all images, here or in several processes."""
    dealt = shares(scored.num_batches, settings.num_processes)
    if len(dealt) == 1:
        return extract(scored.batches(slice(None)), extractors)
    # What was opened here to look at it need not stay in memory.
    scored.batches, scored.sha256 = lambda share: iter(()), lambda: None
    names = [extractor.name for extractor in extractors]
    calls = [(model, settings, names, share) for share in dealt]
    arrays = in_order(run_all(_extract_share, calls, *settings.where))
    return ({key: torch.from_numpy(value) for key, value in found.items()} for found in arrays)


def _extract_share(
    model: str, settings: Protocol, extractors: list[str], share: slice
) -> Iterator[tuple[int, dict[Output, np.ndarray]]]:
    """Extract the features of some batches in a process of its own; yields them with their numbers.

    As arrays: tensors would be sent as handles of memory that goes with the process.
    """
    scored = open_scored(model, settings)
    loaded = [load_extractor(name, default_device(), weights_of(name, settings)) for name in extractors]
    numbers = range(scored.num_batches)[share]
    for number, features in zip(numbers, extract(scored.batches(share), loaded), strict=True):
        yield number, {key: value.cpu().numpy() for key, value in features.items()}


def rank_warning(metric: str, num_images: int, compared: Compared) -> str | None:
    """Say where a covariance of too few images is singular, which biases the Fréchet distance."""
    extractor, reference = compared
    width = extractor.outputs.get(METRICS[metric].output, 0)
    # Of statistics the number of images isn't known.
    few = [n for n in (num_images, reference.num_images if reference else 0) if 0 < n <= width]
    if not METRICS[metric].sums_moments or not few:
        return None
    what = f"{num_images} images" if num_images in few else f"a reference of {few[0]} images"
    return (
        f"warning: {metric} of {what} with {width} features each: the covariance is singular and the "
        "value much too large; compare it only with values of as many images, or use a kernel distance"
    )
