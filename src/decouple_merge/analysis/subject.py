"""What an analysis looks at, what it costs and what it finds: plain data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Analyze
from ..data.batches import Batch
from ..diffusion.timesteps import TimestepRange
from ..diffusion.weightings import Weight, weight_of
from ..errors import UserError
from ..merging.arithmetic import Tensors
from ..models.base import Base
from ..storage.files import read_tensors, write_tensors


@dataclass(frozen=True)
class Progress:
    """How far a long analysis is."""

    name: str
    num_done: int
    num_total: int


@dataclass(frozen=True)
class Cost:
    """What an analysis will cost.

    Attributes:
        num_forward: images that go through the network.
        num_backward: images that go through it with gradients.
        num_bytes: that are held besides the models, in memory or on disk.
    """

    num_forward: int = 0
    num_backward: int = 0
    num_bytes: int = 0

    @property
    def is_any(self) -> bool:
        return bool(self.num_forward or self.num_backward)


def _no_images(num: int) -> Batch:
    raise UserError(f"the analysis needs {num} images, and found none: give its Subject some")


def _no_drawing(model: str, seeds: Sequence[int]) -> Tensor:
    raise UserError(f"the analysis draws images of {model}, and can't: give its Subject a function that does")


@dataclass(frozen=True)
class Kept:
    """Parts of a result, each computed once: what was killed goes on from them.

    Attributes:
        folder: of their files; None keeps nothing.
    """

    folder: Path | None = None

    def get(self, key: str, make: Callable[..., Tensors], *arguments: Any) -> Tensors:
        """Read a part, or compute and write it."""
        if self.folder is None:
            return make(*arguments)
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            write_tensors(path, make(*arguments))
        # Read also where it was just written, so that an interrupted analysis sees the same bytes.
        return read_tensors(path)[0]

    def tensor(self, key: str, make: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Read a part that is one tensor, or compute and write it."""
        return self.get(key, lambda: {"tensor": make(*arguments)})["tensor"]


@dataclass(frozen=True)
class RunResults:
    """What a finished run says of itself.

    Attributes:
        config: plain values, by section.
        records: of its metrics, of the models as they are now; those of one metric compare with other runs'.
    """

    name: str
    config: dict[str, Any]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A base and what was made from it.

    Attributes:
        experts: one for each of the ranges, with the base's keys.
        merged: what the run's search chose.
        checkpoints: of the base's own training, by their updates; each is read when it is called.
        weight: of the loss that the experts were trained with.
        others: models of another run of the same base, by name.
        runs: that are compared with each other.
        hashes: of what single analyses read besides, by their names.
        trials: weights and values of the search's first level, where each weight is an expert's.
        metric: of the values.
        models: that can draw, by name.
        draw: gives the images of some seeds by a model, uint8 [n, c, h, w].
        prompts_of: gives the prompts of some seeds; none of a model that reads none.
        first_seed: of the report.
        calls_per_image: of the network, to draw one.
        batch_size: images that go through the network at once.
        images: gives so many of the training images; the first are always the same.
        kept: parts of the result that were computed before.
    """

    base: Base
    ranges: tuple[TimestepRange, ...]
    experts: list[Tensors] = field(default_factory=list)
    merged: Tensors | None = None
    checkpoints: dict[int, Callable[[], Tensors]] = field(default_factory=dict)
    weight: Weight = field(default_factory=lambda: weight_of(None))
    others: dict[str, Tensors] = field(default_factory=dict)
    runs: list[RunResults] = field(default_factory=list)
    hashes: dict[str, dict[str, Any]] = field(default_factory=dict)
    trials: list[tuple[list[float], float]] = field(default_factory=list)
    metric: str = ""
    models: Sequence[str] = ()
    draw: Callable[[str, Sequence[int]], Tensor] = _no_drawing
    prompts_of: Callable[[Sequence[int]], list[str]] = lambda seeds: []
    first_seed: int = 0
    calls_per_image: int = 0
    settings: Analyze = field(default_factory=Analyze)
    batch_size: int = 64
    images: Callable[[int], Batch] = _no_images
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kept: Kept = field(default_factory=Kept)

    def with_kept(self, kept: Kept) -> "Subject":
        return replace(self, kept=kept)


@dataclass(frozen=True)
class Finding:
    """What an analysis found.

    Attributes:
        rows: of its table, all with the same columns.
        summary: what is no table, in JSON's types.
        sentence: what was found, with a number.
        arrays: what is too large for a table.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    sentence: str
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
