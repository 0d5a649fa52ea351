"""What a run's metrics ask of its config, checked before anything is computed."""

import torch

from ..config import Config, Distance, Evaluate
from ..errors import UserError
from ..models.base import Base
from .extractors import load_extractor, weights_of
from .metrics import METRICS, check_is_distance, check_metrics, check_num_images, extractors_of


def check_evaluate(config: Config, base: Base) -> None:
    """Require that what is reported and searched by can be measured, on as many images as there will be.

    Raises:
        UserError: a metric is unknown, no distance, has too few images, or compares with texts that the base doesn't
            read; its network takes no such images, or has wrong weights.
    """
    evaluate, search = config.evaluate, config.search
    check_is_distance(search.metric, "search.metric")
    check_extractors([*evaluate.metrics, search.metric], evaluate)
    for metric in evaluate.metrics:
        check_num_images(metric, evaluate.num_images, "evaluate.num_images")
    check_num_images(search.metric, search.num_images, "search.num_images")
    if search.num_finalists:
        where = "search.num_final_images" if search.num_final_images else "evaluate.num_images"
        check_num_images(search.metric, len(config.final_seeds), where)
    for metric in [*evaluate.metrics, search.metric]:
        # A judge is of the data's own kind of images.
        if METRICS[metric].extractor != "judge" and base.channels not in (1, 3):
            raise UserError(
                f"{metric} is measured on images in grey or colour, and {config.base} draws {base.channels} channels: "
                "take metrics of a judge"
            )
    with_texts = [m for m in evaluate.metrics if METRICS[m].needs == "texts"]
    if with_texts and (base.encoders is None or base.encoders.classes):
        raise UserError(f"evaluate.metrics has {with_texts[0]}, but {config.base} reads no texts; take another metric")


def check_num_references(config: Config, num_images: int, num_reported: int) -> None:
    """Require that there are as many images as the metrics compare with.

    Args:
        num_images: of the data, with which the search compares.
        num_reported: of the images with which the report compares.

    Raises:
        UserError: as said.
    """
    watched = [d.metric for d in (config.finetune.distance,) if d is not None]
    compared = [(metric, num_reported) for metric in config.evaluate.metrics]
    for metric, found in [*compared, *((m, num_images) for m in (config.search.metric, *watched))]:
        num = min(config.evaluate.num_reference_images or found, found)
        least = METRICS[metric].min_reference_images
        if METRICS[metric].needs not in (None, "texts") and num < least:
            raise UserError(
                f"{metric} compares with {num} image(s), expected at least {least}: take more data, raise "
                "evaluate.num_reference_images, or take another metric"
            )


def check_watched(distance: Distance, settings: Evaluate) -> None:
    """Require that a training can be watched by a distance.

    Raises:
        UserError: as ``check_evaluate``.
    """
    check_is_distance(distance.metric, "distance.metric")
    check_extractors([distance.metric], settings)
    check_num_images(distance.metric, distance.num_images, "distance.num_images")


def check_extractors(metrics: list[str], settings: Evaluate) -> None:
    """Require that metrics exist and that the networks which they are measured on can be loaded."""
    check_metrics(metrics, settings)
    for name in extractors_of(metrics):
        if (weights := weights_of(name, settings)) is not None:
            load_extractor(name, torch.device("cpu"), weights)
