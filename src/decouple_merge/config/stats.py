"""What ``deme stats`` measures images with."""

from typing import Annotated

from pydantic import AfterValidator, Field

from .numbers import PositiveInt
from .paths import FilePath, Name
from .section import Section


def _once(metrics: list[str]) -> list[str]:
    if twice := [name for i, name in enumerate(metrics) if name in metrics[:i]]:
        raise ValueError(f"{twice[0]} stands twice, expected every metric once")
    return metrics


Metrics = Annotated[list[str], Field(min_length=1), AfterValidator(_once)]


class Stats(Section):
    """The feature networks that images are measured on, and the size they are brought to; keys of ``--set``.

    Attributes:
        split: of the reference, as ``data.split``, such as ``test``.
        column: of a ``datasets`` data set, as ``data.column``.
        image_size: images are cut to a square and resized to this before they are measured; None leaves them.
        skip_damaged: leave out images that can't be decoded; otherwise they are an error.
        inception_weights: the file ``pt_inception-2015-12-05-6726825d.pth``.
        judge: folder of a small classifier of the data's kind of images, such as ``fashion-judge``.
        dinov2, clip: folder or hub name of such a model; for ``clip_score`` and ``r_precision`` clip may also be the
            folder of an image–text model, such as ``emoji-judge``.
    """

    split: str = "train"
    column: str = "image"
    image_size: PositiveInt | None = None
    skip_damaged: bool = False
    inception_weights: FilePath | None = None
    judge: Name | None = None
    dinov2: Name | None = None
    clip: Name | None = None
