"""What ``deme evaluate`` measures, by name in protocols.yaml."""

from pathlib import Path
from typing import Any

from pydantic import Field

from ..errors import UserError
from .document import read_document
from .loader import validate
from .numbers import Integer, NonNegativeInt, PositiveInt
from .pieces import Pieces
from .sample import Sample, Text
from .stats import Metrics, Stats


class Protocol(Stats, Pieces):
    """How ``deme evaluate`` scores: what on which images, and how a model draws them; keys of ``--set``.

    Such keys are ``sample.sampler``, ``sample.num_steps`` or ``text.guidance_scale``. protocols.yaml has the values of
    papers by name. The pieces are shares of the batches of a model or of images; batches that are given, and the
    reference, are this process's.

    Attributes:
        metrics: of ``evaluation.metrics.METRICS``.
        num_images: drawn from a model, 5,000 where it isn't set; of images the first so many, all where it isn't.
        images_split: of scored images, as ``data.split``.
        caption_column: of scored images, as ``data.caption_column``, where metrics take texts.
        num_reference_images: that the reference must have, where it isn't statistics.
        seed: of the first image, which has the first prompt; of images the number of the first.
        sample: how a model draws.
        text: prompts and guidance, where models are text-to-image; of images, what the CLIP score says that they show.
    """

    metrics: Metrics = ["fd_effnetlite0"]
    num_images: Integer | None = Field(None, ge=2)
    images_split: str = "train"
    caption_column: str = "text"
    num_reference_images: PositiveInt | None = None
    seed: NonNegativeInt = 0
    sample: Sample = Sample()
    text: Text = Text()


def load_protocol(name: str | None, given: dict[str, Any], overrides: list[str] | None = None) -> Protocol:
    """Look up a protocol by name, change what is given, then what ``a.b=c`` overrides say.

    Args:
        name: of protocols.yaml; None starts from the defaults of every value.
        given: values, in sections as in that file; None is none.

    Raises:
        UserError: there is no such protocol, or as ``load_config``.
    """
    known = read_document(Path(__file__).with_name("protocols.yaml"))
    if name is not None and name not in known:
        raise UserError(f"--protocol is {name!r}, expected one of {', '.join(known)}")
    values = known[name] if name else {}
    for key, value in given.items():
        if isinstance(value, dict):
            values[key] = values.get(key, {}) | {k: v for k, v in value.items() if v is not None}
        elif value is not None:
            values[key] = value
    return validate(Protocol, values, f"protocol {name}" if name else "deme evaluate", overrides)
