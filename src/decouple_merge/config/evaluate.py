"""The section ``evaluate``: what is reported."""

from typing import Any

from pydantic import field_validator

from .numbers import NonNegativeInt, PositiveInt
from .paths import FilePath, Name
from .section import Section
from .stats import Metrics


class Reference(Section):
    """Images that neither training nor search sees; a source alone may stand for it.

    Attributes:
        source: as ``data.source``; None is that one, of which ``split`` is then another.
        split: as ``data.split``, such as ``test``.
    """

    source: Name | None = None
    split: str = "train"


class Evaluate(Section):
    """What is reported.

    Attributes:
        metrics: ``fd_effnetlite0``, ``kd_effnetlite0`` and others of that network or of ``effnetlite1``; with
            ``judge``, ``fd_judge`` and others; with ``inception_weights``, ``fid``, ``kid``, ``sfid``,
            ``inception_score`` and others; with ``dinov2`` or ``clip``, ``fd_dinov2``, ``cmmd`` and others: all of
            ``evaluation.metrics.METRICS``.
        num_images: in each of num_seed_sets sets of consecutive seeds from first_seed on.
        reference: what the report compares with; None is the data, with which the search compares in any case.
        num_reference_images: of either, from the start; None takes all.
        sampler, num_steps: how the images are drawn; None is as ``sample`` says, as the search draws.
        num_sample_images: written as PNG for each model.
        inception_weights: the file ``pt_inception-2015-12-05-6726825d.pth``.
        judge: folder of a small classifier of the data's kind of images, such as ``fashion-judge``.
        dinov2, clip: folder or hub name of such a model; for ``clip_score`` and ``r_precision`` clip may also be the
            folder of an image–text model, such as ``emoji-judge``.
    """

    metrics: Metrics = ["fd_effnetlite0", "kd_effnetlite0"]
    num_images: PositiveInt = 5000
    num_seed_sets: PositiveInt = 3
    first_seed: NonNegativeInt = 0
    reference: Reference | None = None
    num_reference_images: PositiveInt | None = None
    sampler: str | None = None
    num_steps: PositiveInt | None = None
    num_sample_images: PositiveInt = 64
    inception_weights: FilePath | None = None
    judge: Name | None = None
    dinov2: Name | None = None
    clip: Name | None = None

    @field_validator("reference", mode="before")
    @classmethod
    def _source_alone(cls, reference: Any) -> Any:
        return {"source": reference} if isinstance(reference, str) else reference
