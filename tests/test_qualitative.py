"""The same seeds by every model: which are shown follows a rule, and an interrupted drawing goes on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from decouple_merge.analysis import qualitative
from decouple_merge.analysis.subject import Finding, Kept, Subject
from decouple_merge.config import Analyze
from decouple_merge.diffusion.process import Flow
from decouple_merge.models.base import Base
from decouple_merge.models.families.unet import UNet

MODELS = ["pretrained", "ensemble", "merged"]


def draw(model: str, seeds: Sequence[int]) -> Tensor:
    """Draw grey images; the merge makes image s brighter by s² mod 7."""
    change = {"pretrained": 0, "ensemble": 1, "merged": None}[model]
    values = [100 + (s**2 % 7 if change is None else change) for s in seeds]
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def subject_of(draw: Callable[[str, Sequence[int]], Tensor] = draw) -> Subject:
    return Subject(
        Base(UNet(), None, torch.nn.Identity(), Flow(), ""),
        (),
        models=MODELS,
        draw=draw,
        prompts_of=lambda seeds: [f"a picture of the number {s}" for s in seeds],
        first_seed=5,
        calls_per_image=3,
        settings=Analyze.model_validate({"qualitative": {"num_shown": 3, "num_candidates": 20}}),
    )


def result(subject: Subject) -> Finding:
    events = qualitative.compute(subject)
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def test_shown_are_the_first_seeds_and_those_that_changed_most() -> None:
    finding = result(subject_of())
    changes = {s: s**2 % 7 for s in range(5, 25)}
    largest = sorted(changes, key=lambda s: -changes[s])[:3]
    assert finding.summary["shown"] == {"": [5, 6, 7], "largest": largest}
    assert [row["change_merged"] for row in finding.rows] == [float(c) for c in changes.values()]
    assert {row["change_ensemble"] for row in finding.rows} == {1.0}
    np.testing.assert_array_equal(finding.arrays["images-largest"][2], draw("merged", largest).numpy())
    assert finding.rows[0]["prompt"] == "a picture of the number 5"
    figures = qualitative.draw(finding)
    assert figures.keys() == {"", "largest"}
    for figure in figures.values():
        qualitative.plt.close(figure)


def test_what_it_costs_is_every_step_of_every_candidate() -> None:
    assert qualitative.cost(subject_of()).num_forward == 3 * 20 * 3


def test_images_that_were_drawn_are_not_drawn_again(tmp_path: Path) -> None:
    drawn: list[tuple[str, int]] = []

    def counted(model: str, seeds: Sequence[int]) -> Tensor:
        if model == "merged" and not drawn.count(("killed", 0)):
            drawn.append(("killed", 0))
            raise KeyboardInterrupt
        drawn.append((model, len(seeds)))
        return draw(model, seeds)

    subject = replace(subject_of(counted), kept=Kept(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        result(subject)
    found = result(subject)
    rest = [("merged", 16), ("merged", 4)]
    assert drawn == [("pretrained", 16), ("pretrained", 4), ("ensemble", 16), ("ensemble", 4), ("killed", 0), *rest]
    assert found.rows == result(subject_of()).rows
