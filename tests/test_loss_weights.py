"""The merge as a weighting of the loss: the weights of a linear merge are found again, and known ones compared."""

from typing import Any

import pytest
import torch

from decouple_merge.analysis import loss_weights
from decouple_merge.analysis.subject import Finding, Subject
from decouple_merge.diffusion.process import VP, Flow, Process
from decouple_merge.diffusion.weightings import weight_of
from decouple_merge.merging.arithmetic import Tensors, merge
from decouple_merge.models.base import Base
from decouple_merge.models.families.unet import UNet

WEIGHTS = [0.5, -0.25]
ALPHAS = torch.linspace(0.99, 0.01, 20)


def subject_of(process: Process, **fields: Any) -> Subject:
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    base = {k: v.detach().clone() for k, v in network.state_dict().items()}
    draws = torch.Generator().manual_seed(0)
    experts = [{k: v + torch.randn(v.shape, generator=draws) for k, v in base.items()} for _ in WEIGHTS]
    merged: Tensors = merge(base, experts, WEIGHTS)
    ranges = tuple(process.split(2))
    return Subject(Base(UNet(), None, network, process, ""), ranges, experts, merged, **fields)


def result(subject: Subject) -> tuple[list[str], Finding]:
    events, lines = loss_weights.compute(subject), []
    while True:
        try:
            lines.append(next(events))
        except StopIteration as end:
            return lines, end.value


def test_the_weights_of_a_linear_merge_are_its_own() -> None:
    _, finding = result(subject_of(VP(ALPHAS, "epsilon")))
    assert finding.summary["weights"] == pytest.approx(WEIGHTS, abs=1e-5)
    assert finding.summary["share_of_change"] == pytest.approx(1, abs=1e-6)


def test_in_x0_space_an_epsilon_models_loss_is_weighed_by_the_snr() -> None:
    _, finding = result(subject_of(VP(ALPHAS, "epsilon")))
    for row, alpha in zip(finding.rows, ALPHAS.double().tolist(), strict=True):
        snr = alpha / (1 - alpha)
        weight = WEIGHTS[0] if row["timestep"] < 10 else WEIGHTS[1]
        assert row["merge"] == pytest.approx(weight * snr, rel=1e-4)
        expected = {
            "standard": snr,
            "snr_plus_one": snr + 1,
            "truncated_snr": max(snr, 1),
            "min_snr": min(snr, 5),
            "p2": snr / (1 + snr),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_flows_loss_is_weighed_by_one_over_the_squared_noise_level() -> None:
    _, finding = result(subject_of(Flow()))
    row = finding.rows[30]
    assert row["merge"] == pytest.approx(WEIGHTS[0] * (1000 / row["timestep"]) ** 2, rel=1e-4)


def test_the_experts_own_weighting_counts_too() -> None:
    _, plain = result(subject_of(VP(ALPHAS, "v_prediction")))
    _, weighed = result(subject_of(VP(ALPHAS, "v_prediction"), weight=weight_of("min_snr")))
    for a, b in zip(plain.rows, weighed.rows, strict=True):
        own = WEIGHTS[0] if a["timestep"] < 10 else WEIGHTS[1]
        assert b["merge"] == pytest.approx(own * b["min_snr"], rel=1e-4)


def test_a_model_that_changed_as_the_merge_has_a_cosine_of_one() -> None:
    subject = subject_of(VP(ALPHAS, "epsilon"))
    base, merged = subject.base.network.state_dict(), subject.merged
    assert merged is not None
    same = {k: v + 3 * (merged[k] - v) for k, v in base.items()}
    opposite = {k: v - 3 * (merged[k] - v) for k, v in base.items()}
    lines, finding = result(subject_of(VP(ALPHAS, "epsilon"), others={"a": same, "b": opposite}))
    assert finding.summary["cosines"] == pytest.approx({"a": 1, "b": -1})
    assert len(lines) == 3
    assert loss_weights.draw(finding).keys() == {"", "other"}
    loss_weights.plt.close("all")


@pytest.mark.parametrize("process", [VP(ALPHAS, "epsilon"), Flow()], ids=["epsilon", "flow"])
def test_negative_weights_can_be_drawn(process: Process) -> None:
    _, finding = result(subject_of(process))
    for figure in loss_weights.draw(finding).values():
        figure.savefig("/dev/null", format="png")
        loss_weights.plt.close(figure)
