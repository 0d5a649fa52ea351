"""What ``deme merge`` is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field

from .numbers import Number, PositiveInt
from .paths import FilePath
from .rule import RuleSettings


class Merge(RuleSettings):
    """How models are merged.

    Attributes:
        weights: one for each expert.
        blocks: weights of the tensors whose keys match a pattern such as ``down_blocks.*``; the first that matches.
        fishers: a file for each expert with its diagonal Fisher information under the network's keys, for ``fisher``.
        grams: the same with the inner products of its layers' inputs, for ``regmean``.
        dtype: of the floating tensors written, F64, F32, F16 or BF16; None keeps the base's.
        max_shard_bytes: a larger network is written as several files with an index.
        allow_non_finite: merge NaN and infinity as they come, and let sums overflow.
        min_delta_cosine: between the change that the merge wants and what its dtype leaves of it; below, it is refused.
        component: the part of the pipelines that is merged, such as text_encoder; None means all denoisers.
        extra_keys: what is done with tensors that an expert has and the base doesn't: ``keep`` writes them as they are.
        missing_keys: what is done with tensors that an expert lacks: ``base`` takes the base's.
    """

    weights: list[Number] = Field(min_length=1)
    blocks: dict[str, list[Number]] = {}
    fishers: list[FilePath] = []
    grams: list[FilePath] = []
    dtype: Literal["F64", "F32", "F16", "BF16"] | None = None
    max_shard_bytes: PositiveInt = 10_000_000_000
    allow_non_finite: bool = False
    min_delta_cosine: Number = Field(0.9, ge=-1, le=1)
    component: str | None = None
    extra_keys: Literal["error", "keep", "drop"] = "error"
    missing_keys: Literal["error", "base"] = "error"

    @property
    def statistics(self) -> list[Path]:
        """The files that a method needs beside the models."""
        return [*self.fishers, *self.grams]

    def with_statistics(self, place: Callable[[Path], Path]) -> "Merge":
        """Name the same files by other paths."""
        return self.model_copy(update={"fishers": [*map(place, self.fishers)], "grams": [*map(place, self.grams)]})
