"""What all sections of a config share: unknown keys are refused, values don't change."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

Precision = Literal["fp32", "fp16", "bf16"]


class Section(BaseModel):
    """A part of the config; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_distance(metric: str) -> str:
    if metric.startswith(
        ("precision", "recall", "density", "coverage", "inception_score", "clip_score", "r_precision")
    ):
        raise ValueError("expected a distance, which is smaller for better images")
    return metric


DistanceName = Annotated[str, AfterValidator(_check_distance)]
