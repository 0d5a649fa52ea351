"""Sensitivity: curves from runs that differ in a setting, and what doesn't compare is refused."""

from typing import Any

import pytest
import torch

from decouple_merge.analysis import sensitivity
from decouple_merge.analysis.subject import Finding, RunResults, Subject
from decouple_merge.config import Analyze, Config
from decouple_merge.diffusion.process import Flow
from decouple_merge.models.base import Base
from decouple_merge.models.families.unet import UNet

METRIC = "fd_effnetlite0"


def run(num_ranges: int, seed: int, value: float, **record: Any) -> RunResults:
    config = Config.model_validate({"seed": seed, "finetune": {"num_ranges": num_ranges}}).model_dump(mode="json")
    base: dict[str, Any] = {"metric": METRIC, "seeds": [0, 9], "num_images": 10, "extractor": "net", **record}
    values = {"pretrained": 20.0, "merged": value}
    # Two sets of report seeds, around the value.
    records = [base | {"model": m, "value": v + step} for m, v in values.items() for step in (-0.5, 0.5)]
    return RunResults(f"n{num_ranges}-{seed}", config, records)


RUNS = [run(4, 0, 12.0), run(1, 0, 18.0), run(4, 1, 14.0), run(2, 0, 15.0)]


def finding_of(runs: list[RunResults], **settings: Any) -> tuple[list[str], Finding]:
    subject = Subject(
        Base(UNet(), None, torch.nn.Identity(), Flow(), ""),
        (),
        runs=runs,
        settings=Analyze.model_validate({"sensitivity": {"over": "finetune.num_ranges", **settings}}),
    )
    events, lines = sensitivity.compute(subject), []
    while True:
        try:
            lines.append(next(events))
        except StopIteration as end:
            return lines, end.value


def test_a_curve_has_the_mean_and_the_reach_over_training_seeds_in_the_order_of_the_setting() -> None:
    lines, finding = finding_of(RUNS)
    assert lines == []
    assert finding.summary["curves"]["merged"] == [
        {"value": 1, "mean": 18.0, "smallest": 18.0, "largest": 18.0, "num_runs": 1},
        {"value": 2, "mean": 15.0, "smallest": 15.0, "largest": 15.0, "num_runs": 1},
        {"value": 4, "mean": 13.0, "smallest": 12.0, "largest": 14.0, "num_runs": 2},
    ]
    assert finding.sentence == (
        "fd_effnetlite0 of the merged model is 13 at finetune.num_ranges = 4 and 18 at 1, the means of 2 and 1 runs."
    )
    assert {row["num_seed_sets"] for row in finding.rows} == {2}
    figure = sensitivity.draw(finding)[""]
    assert figure.axes[0].get_xlabel() == "finetune.num_ranges"
    sensitivity.plt.close(figure)


def test_a_mean_of_equal_numbers_has_no_reach_below_0() -> None:
    """It may be off by a rounding."""
    value = 831.0831446915306
    assert sum([value] * 3) / 3 != value
    runs = [run(n, seed, value) for n in (1, 2) for seed in range(3)]
    for one in runs:
        one.records[:] = [r | {"value": value} for r in one.records]
    _, finding = finding_of(runs)
    sensitivity.plt.close(sensitivity.draw(finding)[""])


def test_settings_that_are_no_numbers_keep_their_names() -> None:
    _, finding = finding_of(RUNS, over="search.strategy")
    (point,) = finding.summary["curves"]["merged"]
    assert point["num_runs"] == 4
    figure = sensitivity.draw(finding)[""]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [point["value"]]
    sensitivity.plt.close(figure)


def test_what_else_differs_is_said() -> None:
    lines, finding = finding_of(RUNS, over="seed")
    assert lines == ["the runs differ in other settings, too: finetune.num_ranges"]
    assert finding.summary["also_differ_in"] == ["finetune.num_ranges"]


@pytest.mark.parametrize(
    ("runs", "settings", "message"),
    [
        ([*RUNS, run(8, 0, 11.0, metric="kid")], {}, r"run n8-0 has no fd_effnetlite0, it has kid"),
        (RUNS, {"over": "finetune.num_range"}, r"--over finetune.num_range: no such setting"),
        (RUNS, {"over": None}, r"give --over"),
    ],
)
def test_runs_that_do_not_compare_are_refused(runs: list[RunResults], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finding_of(runs, **settings)
