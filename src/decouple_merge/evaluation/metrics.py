"""The metrics by name: what each computes, on which features, against what of a reference, of how many images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..config import Evaluate, Stats
from ..errors import UserError
from .distances import (
    clip_score,
    frechet_infinity,
    frechet_of,
    gaussian_kernel_distance,
    inception_score,
    kernel_distance,
    r_precision,
)
from .extractors import check_weights
from .neighbours import density_coverage, precision_recall
from .sliced import monge_distance


@dataclass(frozen=True)
class Metric:
    """What a number is, and what it takes.

    Attributes:
        compute: maps the images' side and the reference's to the number, or to several, of which this metric is one.
            Metrics of the same function and features share one call.
        extractor, output: whose features are meant.
        needs: what of the reference: ``moments``, rows kept for ``kernel`` distances or for ``neighbours``, ``texts``
            of the images; None compares with nothing.
        sums_moments: the images' side is their ``FeatureStats``; otherwise it is their features [n, d].
        part: which of several numbers.
        min_images, min_reference_images: fewer have no such number.
        is_distance: smaller is better.
    """

    compute: Callable[[Any, Any], float | tuple[float, ...]]
    extractor: str
    output: str = "features"
    needs: str | None = "moments"
    sums_moments: bool = False
    part: int | None = None
    min_images: int = 2
    min_reference_images: int = 2
    is_distance: bool = True


def _precision_recall(found: Tensor, real: Tensor) -> tuple[float, float]:
    return precision_recall(real, found)


def _density_coverage(found: Tensor, real: Tensor) -> tuple[float, float]:
    return density_coverage(real, found)


def _cmmd(found: Tensor, real: Tensor) -> float:
    return 1000 * gaussian_kernel_distance(found, real)


def _inception_score(found: Tensor, real: None) -> tuple[float, float]:
    return inception_score(found)


def _frechet_of(extractor: str, output: str = "features") -> Metric:
    return Metric(frechet_of, extractor, output, sums_moments=True)


def _kernel_of(extractor: str) -> Metric:
    return Metric(kernel_distance, extractor, needs="kernel")


def _infinity_of(extractor: str) -> Metric:
    return Metric(frechet_infinity, extractor, min_images=20)


def _mind_of(extractor: str) -> Metric:
    return Metric(monge_distance, extractor, needs="neighbours")


def _neighbours_of(extractor: str) -> dict[str, Metric]:
    def near(part: int) -> Metric:
        return replace(shared, compute=_precision_recall, part=part, min_images=4, min_reference_images=4)

    def dense(part: int) -> Metric:
        return replace(shared, compute=_density_coverage, part=part, min_reference_images=6)

    shared = Metric(_precision_recall, extractor, needs="neighbours", is_distance=False)
    return {
        f"precision_{extractor}": near(0),
        f"recall_{extractor}": near(1),
        f"density_{extractor}": dense(0),
        f"coverage_{extractor}": dense(1),
    }


def _all_of(extractor: str) -> dict[str, Metric]:
    return {
        f"fd_{extractor}": _frechet_of(extractor),
        f"kd_{extractor}": _kernel_of(extractor),
        f"mind_{extractor}": _mind_of(extractor),
        f"fd_infinity_{extractor}": _infinity_of(extractor),
        **_neighbours_of(extractor),
    }


METRICS = {
    **_all_of("effnetlite0"),
    **_all_of("effnetlite1"),
    **_all_of("judge"),
    "fid": _frechet_of("inception"),
    "kid": _kernel_of("inception"),
    "mind": _mind_of("inception"),
    "sfid": _frechet_of("inception", "spatial"),
    "fid_infinity": _infinity_of("inception"),
    "inception_score": Metric(
        _inception_score, "inception", "logits", needs=None, part=0, min_images=10, is_distance=False
    ),
    **_neighbours_of("inception"),
    **_all_of("dinov2"),
    **_all_of("clip"),
    "cmmd": Metric(_cmmd, "clip", needs="neighbours"),
    "clip_score": Metric(clip_score, "clip_text", needs="texts", min_reference_images=1, is_distance=False),
    "r_precision": Metric(r_precision, "clip_text", needs="texts", min_reference_images=1, is_distance=False),
}


def extractors_of(metrics: list[str]) -> list[str]:
    """List the extractors that metrics need, each once."""
    return list(dict.fromkeys(METRICS[m].extractor for m in metrics))


def check_known(metric: str) -> None:
    """Refuse a metric that doesn't exist.

    Raises:
        UserError: as said.
    """
    if metric not in METRICS:
        raise UserError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")


def check_metrics(metrics: list[str], settings: Evaluate | Stats) -> None:
    """Refuse metrics that don't exist or whose weights the settings don't name.

    Raises:
        UserError: as said.
    """
    for metric in metrics:
        check_known(metric)
        check_weights(metric, METRICS[metric].extractor, settings)


def check_is_distance(metric: str, where: str) -> None:
    """Refuse what is no distance as the number by which models are chosen.

    Raises:
        UserError: it is none.
    """
    check_known(metric)
    if not METRICS[metric].is_distance:
        raise UserError(
            f"{where} is {metric!r}, expected a distance, which is smaller for better images, such as fd_effnetlite0"
        )


def check_num_images(metric: str, num_images: int, where: str = "") -> None:
    """Refuse fewer images than a metric can be computed of.

    Args:
        where: the setting that says how many; empty where they were counted.

    Raises:
        UserError: as said.
    """
    if num_images < (least := METRICS[metric].min_images):
        found = f"{where} is {num_images}" if where else f"found {num_images} image(s) to score"
        raise UserError(f"{found}, expected at least {least} for {metric}: take more, or another metric")
