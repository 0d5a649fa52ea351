"""What all sections of a config share: unknown keys and NaN are refused, values don't change."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Precision = Literal["fp32", "fp16", "bf16"]


class Section(BaseModel):
    """A part of the config; unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
