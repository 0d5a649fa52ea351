"""What all sections of a config share: unknown keys are refused, values don't change."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Precision = Literal["fp32", "fp16", "bf16"]


class Section(BaseModel):
    """A part of the config; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
