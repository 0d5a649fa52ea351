"""What ``deme evaluate`` measures, by name in protocols.yaml."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveInt

from .loader import validate
from .sample import Sample, Text
from .section import Section


class Protocol(Section):
    """What ``deme evaluate`` measures on which images; protocols.yaml has those of papers by name.

    Attributes:
        metrics: of ``features.METRICS``.
        num_images: drawn from a model, 5,000 where it isn't set; of images the first so many, all where it isn't.
        num_reference_images: that the reference must have, where it isn't statistics.
        image_size: images and reference are cut to a square and resized to this before they are scored.
    """

    metrics: list[str] = Field(["fd_effnetlite0"], min_length=1)
    num_images: int | None = Field(None, ge=2)
    num_reference_images: PositiveInt | None = None
    image_size: PositiveInt | None = None
    sample: Sample = Sample()
    text: Text = Text()


def load_protocol(name: str | None, given: dict[str, Any], overrides: list[str] | None = None) -> Protocol:
    """Look up a protocol by name, change what is given, then what ``a.b=c`` overrides say.

    Args:
        name: of protocols.yaml; None starts from the defaults of every value.
        given: values, in sections as in that file; None is none.

    Raises:
        ValueError: there is no such protocol, or as ``load_config``.
    """
    known = yaml.safe_load(Path(__file__).with_name("protocols.yaml").read_text(encoding="utf-8"))
    if name is not None and name not in known:
        raise ValueError(f"--protocol is {name!r}, expected one of {', '.join(known)}")
    values = known[name] if name else {}
    for key, value in given.items():
        if isinstance(value, dict):
            values[key] = values.get(key, {}) | {k: v for k, v in value.items() if v is not None}
        elif value is not None:
            values[key] = value
    return validate(Protocol, values, f"protocol {name}" if name else "deme evaluate", overrides)
