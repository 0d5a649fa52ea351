"""What ``deme stats`` measures images with."""

from .numbers import PositiveInt
from .paths import FilePath, Name
from .section import Section


class Stats(Section):
    """The feature networks that images are measured on, and the size they are brought to; keys of ``--set``.

    Attributes:
        image_size: images are cut to a square and resized to this before they are measured; None leaves them.
        inception_weights: the file ``pt_inception-2015-12-05-6726825d.pth``.
        judge: folder of a small classifier of the data's kind of images, such as ``models/fashion-judge``.
        dinov2, clip: folder or hub name of such a model; for ``clip_score`` and ``r_precision`` clip may also be the
            folder of an image–text model, such as ``models/emoji-judge``.
    """

    image_size: PositiveInt | None = None
    inception_weights: FilePath | None = None
    judge: Name | None = None
    dinov2: Name | None = None
    clip: Name | None = None
