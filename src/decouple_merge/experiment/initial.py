"""A config that runs, written for a base and its data: both are asked what they are; settings fit the base's size."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, Data, dump_commented, validate
from ..data.captions import load_captions
from ..data.sources import load_images, located_source, open_source
from ..errors import UserError
from ..models.base import SUPPORTED
from ..models.families import FAMILIES
from ..models.family import Encoders, Family, read_index
from ..models.network import empty_network, num_parameters
from ..storage.files import write_text
from ..storage.hub import pipeline_folder
from ..storage.reading import read_record
from .located import located_name

# By the parameters of the network, at most: what a training and its images are sized by, and where that is from.
SMALL = {"num_updates": 1000, "batch_size": 64, "learning_rate": 4e-4, "schedule": "cosine", "consistency_weight": 0.0}
MEDIUM = {"num_updates": 20_000, "batch_size": 64, "learning_rate": 2e-4, "mixed_precision": "bf16"}
LARGE = {
    "num_updates": 20_000,
    "batch_size": 16,
    "accumulation": 4,
    "learning_rate": 5e-5,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
}
HUGE = LARGE | {"num_updates": 5000, "batch_size": 4, "learning_rate": 1e-4, "lora": {"rank": 32}}
SCALES = (
    (5e6, "our configs of Fashion-MNIST", SMALL, 125, "fp32"),
    (300e6, "the paper's CIFAR10", MEDIUM, 64, "fp32"),
    (1.5e9, "the paper's Stable Diffusion 1.4", LARGE, 16, "bf16"),
    (float("inf"), "our config of SDXL", HUGE, 4, "bf16"),
)
# Of fewer images the Fréchet distance is mostly bias.
MIN_IMAGES_FOR_FRECHET = 5000


@dataclass(frozen=True)
class _Asked:
    """What a base says of itself, without its weights; ``num_steps`` is how many its sampler takes."""

    name: str
    kind: str
    family: Family
    num_parameters: int
    channels: int
    image_size: int
    encoders: Encoders | None
    has_two: bool
    num_steps: int

    @property
    def told(self) -> str:
        if self.encoders is None:
            return "told nothing"
        classes = self.encoders.classes
        return "told texts" if classes is None else f"told one of {len(set(classes.values()))} classes"

    @property
    def guidance_scale(self) -> float | None:
        """What its kind is drawn with; None where it has no guidance, or is a large one, whose scale is the default."""
        if self.encoders is None or self.encoders.guidance is None:
            return None
        if self.encoders.guidance == "embedded":
            return 3.5
        if self.encoders.classes is not None:
            return 1.5
        return 3.0 if self.num_parameters <= 300e6 else None


def write_config(base: str, source: str, out: Path | None = None, overrides: list[str] | None = None) -> Iterator[str]:
    """Ask a base and images what they are and write a commented config of a run; yields lines for the user.

    Args:
        base: a pipeline's folder, the name of a base that we ship, or a hub name.
        source: as ``data.source``.
        out: a YAML file that isn't there; named by base and data, in the current folder, where not given.
        overrides: ``a.b=c``, which the config says too; those of the section ``data`` also open the images.

    Raises:
        UserError: the base is of no known family, the images can't be opened, or have no captions or classes where the
            base is told some; or ``out`` exists.
    """
    out = out or Path(f"{Path(base).name}-{_stem(source)}.yaml")
    if os.path.lexists(out):
        raise UserError(f"{out} is there already, and may have been edited; remove it, or give another --out")
    asked = _ask(base)
    shape = f"{asked.image_size} x {asked.image_size}, {asked.channels} channel(s)"
    yield f"base {base}: {asked.kind}, {asked.num_parameters:,} parameters, {shape}, {asked.told}"
    values: dict[str, Any] = {"base": asked.name, "data": {"source": located_source(source)}}
    given = validate(Config, values, "deme init", overrides).data
    channels, size = open_source(given).natural_shape()
    if (channels, size) != (asked.channels, asked.image_size) and "fit" not in given.model_fields_set:
        values["data"]["fit"] = "resize"
    data = validate(Config, values, "deme init").data
    images = load_images(data, asked.channels, asked.image_size)
    captions = load_captions(images, data, asked.encoders.classes) if asked.encoders else []
    shown = f", such as {captions[0][:60]!r}" if captions else ""
    yield f"data {source}: {len(images):,} images, the first {size} wide, {channels} channel(s){shown}"
    config = validate(Config, {"base": asked.name, **_settings(asked, len(images), data)}, "deme init", overrides)
    title = f"# Finetune and merge experts of {base} on {source}. Written by deme init; every value may be changed.\n"
    written = config.model_dump(mode="json", exclude_unset=True)
    write_text(out, title + dump_commented(written, _comments(asked, len(images))))
    yield f"config: {out}; deme run {shlex.quote(str(out))} --dry-run says what it will do and what memory it needs"


def _stem(source: str) -> str:
    return Path(source.rstrip("/").rpartition(":")[2]).stem or "data"


def _ask(name: str) -> _Asked:
    folder = pipeline_folder(name)
    index = read_index(folder)
    if "_class_name" not in index:
        raise UserError(f"base {name!r} has no model_index.json with a pipeline's class; supported is {SUPPORTED}")
    kind = str(index["_class_name"])
    if kind not in FAMILIES:
        raise UserError(f"base {name!r} is a {kind}; supported is {SUPPORTED}")
    family, network = FAMILIES[kind], empty_network(folder)
    encoders = family.find_encoders(name, folder, network)
    channels, _, side = (encoders.channels, 0, encoders.image_size) if encoders else family.shape(network, None)
    has_two = family.second_component is not None and index.get(family.second_component, [None])[0] is not None
    schedule = read_record(folder / "scheduler" / "scheduler_config.json", "fetch or copy it again")
    # An offset of the scheduler must not lead out of a short schedule.
    num_steps = max(1, min(50, int(schedule.get("num_train_timesteps", 1000)) // 2))
    return _Asked(
        located_name(name), kind, family, num_parameters(network), channels, side, encoders, has_two, num_steps
    )


def _settings(asked: _Asked, num: int, data: Data) -> dict[str, Any]:
    """Choose the settings for a base and a number of images."""
    _, _, finetune, batch_size, precision = _scale(asked)
    held_out = data.num_held_out if "num_held_out" in data.model_fields_set else max(1, min(1024, num // 10))
    every = finetune["num_updates"] // 4
    trained = {
        "num_ranges": 4,
        "global_prob": 0.3 if asked.encoders else 0.4,
        **finetune,
        "batch_size": max(1, min(finetune["batch_size"], num - held_out)),
        "projection": {"placement": "none"},
        "validate_every": every,
        "checkpoint_every": every,
    }
    scale = asked.guidance_scale
    return {
        "data": data.model_dump(exclude_unset=True) | {"num_held_out": held_out},
        "finetune": {"experts": "denoisers", "baseline": False} if asked.has_two else trained,
        "sample": {"num_steps": asked.num_steps, "batch_size": batch_size, "precision": precision},
        **({} if scale is None else {"text": {"guidance_scale": scale}}),
        "search": {
            **{"method": "ties", "density": 0.7, "low": -0.6, "high": 2.2, "num_trials": 20, "num_images": 500},
            "metric": "kd_effnetlite0" if num < MIN_IMAGES_FOR_FRECHET else "fd_effnetlite0",
        },
        "evaluate": {
            "metrics": ["fd_effnetlite0", "kd_effnetlite0"],
            "num_images": 1000 if num < MIN_IMAGES_FOR_FRECHET else 5000,
        },
    }


def _scale(asked: _Asked) -> tuple[float, str, dict[str, Any], int, str]:
    return next(scale for scale in SCALES if asked.num_parameters <= scale[0])


def _comments(asked: _Asked, num: int) -> dict[str, str]:
    """Say why of some settings, by their keys."""
    is_few = num < MIN_IMAGES_FOR_FRECHET
    return {
        "base": f"{asked.kind}, {asked.num_parameters:,} parameters, {asked.image_size} x {asked.image_size}",
        "data.source": f"{num:,} images",
        "data.fit": "cut to a square, resized and converted to what the base draws",
        "data.num_held_out": "never trained on; where the base saw the data, take what its own training held out",
        "finetune.experts": "the base's own two, which are merged into one without training",
        "finetune.num_ranges": "one expert each",
        "finetune.global_prob": "share of an expert's samples that are of all timesteps",
        "finetune.num_updates": f"of each expert; size, rate and precision are those of {_scale(asked)[1]}",
        "finetune.lora": "low-rank adapters: training all weights of this base takes several times the memory",
        "finetune.projection": "folded and trunk are the paper's channel-wise projections",
        "sample.num_steps": "of the sampler, in search and report",
        "text.guidance_scale": "1 is none, at half the cost",
        "search.method": "elects signs; linear is plain task arithmetic",
        "search.num_trials": "candidates, each drawn as num_images images",
        "search.metric": "the Fréchet distance to so few images is mostly bias" if is_few else "what is minimised",
        "evaluate.num_images": "of each of three sets of seeds",
    }
