"""What tells a model from any other: its weights, its configs, its schedule, and the parts around the denoiser."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..storage.made_from import MadeFrom, plain
from ..storage.tensors import hash_tensors
from .base import Base
from .parts import encoder_sha256


def config_sha256(base: Base) -> str:
    """Hash the denoiser's config."""
    return _sha256(_settings(base.network.config))


def base_parts(base: Base) -> MadeFrom:
    """List what tells a base from others, by what a user may have changed.

    Returns:
        ``weights``, ``config`` and ``encoders``, the hashes of the denoiser's tensors, of its config, and of the files
        of VAE, text encoders and tokenizers, None where there are none; ``classes``, their names' hash; and
        ``scheduler``, its class and settings.
    """
    encoders = base.encoders
    parts = None if encoders is None else encoder_sha256(encoders, "vae", *encoders.text_parts)
    told = None if encoders is None else [encoders.classes, encoders.zeros_for_empty]
    scheduler: Any = base.pipeline.scheduler
    return plain(
        {
            "weights": base.sha256,
            "config": config_sha256(base),
            "scheduler": {"class": type(scheduler).__name__, **_settings(scheduler.config)},
            "encoders": parts,
            "classes": told and _sha256(told),
        }
    )


def model_sha256(
    base: Base,
    weights: Sequence[Mapping[str, Tensor]] | None = None,
    routing: Any = (),
    configs: Sequence[Any] = (),
) -> str:
    """Hash all that the images of a model depend on but seeds, prompts and the settings that it is drawn with.

    Weights count as float32, in which they are loaded, whatever a file has.

    Args:
        weights: of the network, or of a mixture's networks; the base's own where not given.
        routing: what decides which of them runs, ``Router.record``.
        configs: of networks of another architecture than the base's; None of the others.
    """
    parts = base_parts(base)
    own = parts.pop("weights")
    hashes: list[Any] = [own] if weights is None else [_float_sha256(each) for each in weights]
    for i, config in enumerate(configs):
        if config is not None:
            hashes[i] = [hashes[i], _settings(config)]
    return _sha256([hashes, routing, parts])


def _float_sha256(tensors: Mapping[str, Tensor]) -> str:
    def widened() -> Iterator[tuple[str, Tensor]]:
        for key in sorted(tensors):
            tensor = tensors[key]
            yield key, tensor.float() if tensor.is_floating_point() else tensor

    return hash_tensors(widened())


def _settings(config: Any) -> dict[str, Any]:
    # Names with an underscore say where and by which version it was saved.
    return {key: value for key, value in sorted(dict(config).items()) if not key.startswith("_")}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
