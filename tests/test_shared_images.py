"""One set of images drawn by several workers: its number is one worker's, to the bit, whoever is killed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decouple_merge.config import Config, Sample
from decouple_merge.data.sources import open_images
from decouple_merge.errors import NotFiniteError
from decouple_merge.evaluation.extractors import load_extractor
from decouple_merge.evaluation.references import make_reference
from decouple_merge.evaluation.score import Features
from decouple_merge.evaluation.shared_features import SharedFeatures
from decouple_merge.experiment import scoring
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.results import evaluate_models, wanted_records
from decouple_merge.merging.merger import Merger
from decouple_merge.models.base import load_base
from decouple_merge.searching.scorer import Scorer
from decouple_merge.searching.study import evaluate_all, help_others, open_study
from decouple_merge.searching.trial import Level, Score

CPU = torch.device("cpu")
KEY = ("net", "features")


def draw_numbers(share: slice) -> Iterator[Features]:
    """Draw 10 images in batches of 4: the features of image i are drawn by i."""
    for batch in torch.arange(10).split(4)[share]:
        rows = [torch.randn(3, generator=torch.Generator().manual_seed(int(i))) for i in batch]
        yield {KEY: torch.stack(rows)}


def die(share: slice) -> Iterator[Features]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield {}


def draw_and_die(folder: Path) -> None:
    shared = SharedFeatures(folder, 10, 4)
    shared.begin()
    assert shared.draw_next(draw_numbers)
    shared.draw_next(die)


def equal(found: list[Features], expected: list[Features]) -> bool:
    return [f.keys() for f in found] == [e.keys() for e in expected] and all(
        torch.equal(f[KEY], e[KEY]) for f, e in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("num_helpers", [0, 1, 2])
def test_features_come_in_order_and_in_the_same_batches_whoever_draws_them(num_helpers: int, tmp_path: Path) -> None:
    SharedFeatures(tmp_path, 10, 4).begin()
    for _ in range(num_helpers):
        assert SharedFeatures(tmp_path, 10, 4).draw_next(draw_numbers)
    asked: list[slice] = []

    def noting(share: slice) -> Iterator[Features]:
        asked.append(share)
        return draw_numbers(share)

    assert equal(list(SharedFeatures(tmp_path, 10, 4).gather(noting)), list(draw_numbers(slice(None))))
    assert len(asked) == 3 - num_helpers


def test_a_share_whose_drawer_was_killed_is_drawn_again(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=draw_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["0.safetensors"]
    helper = SharedFeatures(tmp_path, 10, 4)
    assert [helper.draw_next(draw_numbers) for _ in range(2)] == [True, False]
    assert equal(list(SharedFeatures(tmp_path, 10, 4).gather(draw_numbers)), list(draw_numbers(slice(None))))


def test_a_share_that_another_draws_is_waited_for(tmp_path: Path) -> None:
    may_go_on, has_begun = threading.Event(), threading.Event()

    def slow(share: slice) -> Iterator[Features]:
        has_begun.set()
        may_go_on.wait(10)
        return draw_numbers(share)

    SharedFeatures(tmp_path, 10, 4).begin()
    helper = threading.Thread(target=lambda: SharedFeatures(tmp_path, 10, 4).draw_next(slow))
    helper.start()
    has_begun.wait(10)
    features = SharedFeatures(tmp_path, 10, 4)
    threading.Timer(0.3, may_go_on.set).start()
    assert equal(list(features.gather(draw_numbers)), list(draw_numbers(slice(None))))
    helper.join()
    assert not features.draw_next(draw_numbers)


def test_of_several_shares_that_failed_the_first_is_told_as_who_draws_alone_tells_it(tmp_path: Path) -> None:
    def failing(share: slice) -> Iterator[Features]:
        if share.start > 0:
            raise NotFiniteError(f"NaN in batch {share.start}")
        return draw_numbers(share)

    shared = SharedFeatures(tmp_path, 10, 4)
    shared.begin()
    while shared.draw_next(failing):
        pass
    with pytest.raises(NotFiniteError, match="NaN in batch 1"):
        list(SharedFeatures(tmp_path, 10, 4).gather(draw_numbers))


def test_many_batches_are_few_shares() -> None:
    shares = SharedFeatures(Path("nowhere"), 30_000, 8).shares
    assert [n for share in shares for n in range(3750)[share]] == list(range(3750))
    assert len(shares) == 938


@pytest.fixture
def open_scorer(tiny_base: Path, tiny_images: Path) -> Callable[[Path | None], Scorer]:
    base, extractor = load_base(str(tiny_base)), load_extractor("effnetlite0", CPU)
    start = base.network.state_dict()
    experts = [{k: (1 + 0.05 * (i + 1)) * v for k, v in start.items()} for i in range(2)]
    images = open_images(str(tiny_images), None, None)
    compared = extractor, make_reference("images", images, extractor)
    sample = Sample(num_steps=2, batch_size=4)
    return lambda folder: Scorer(
        base, Merger(start, experts, device=CPU), "fd_effnetlite0", compared, sample, folder=folder
    )


LEVEL = Level("final", 2, range(10), None)


def test_a_candidate_that_others_help_with_has_the_value_that_one_worker_gives_it(
    open_scorer: Callable[[Path | None], Scorer], tmp_path: Path
) -> None:
    alone, together, helper = open_scorer(None), open_scorer(tmp_path / "shares"), open_scorer(tmp_path / "shares")
    expected = alone((0.5, 0.5), LEVEL)
    assert not helper.help((0.5, 0.5), LEVEL)  # Nobody has begun.
    num_drawn = []

    def once(level: Level, share: slice = slice(None)) -> Iterator[Features]:
        """Before each share of the scorer's own, the helper draws one."""
        together._features = Scorer._features.__get__(together)  # type: ignore[method-assign]
        num_drawn.append(helper.help((0.5, 0.5), level))
        return together._features(level, share)

    helper((1.0, 0.2), Level("screen", 2, range(4), None))  # Its network holds another merge.
    together._features = once  # type: ignore[method-assign,assignment]
    found = together((0.5, 0.5), LEVEL)
    assert num_drawn == [True]
    assert (found.value, found.merged_sha256) == (expected.value, expected.merged_sha256)
    assert found.seconds_of_others > 0
    assert list((tmp_path / "shares").iterdir()) == []


def test_who_finds_no_candidate_that_waits_helps_with_one_that_runs() -> None:
    study, helped = open_study(None, "final"), list[tuple[float, ...]]()

    def helper(weights: tuple[float, ...], level: Level) -> bool:
        helped.append(weights)
        return False

    def objective(weights: tuple[float, ...], level: Level) -> Score:
        assert not help_others(study, level, helper)
        return Score(1.0, "")

    places = {0: (0.25, 0.5), 1: (1.0, 1.0)}
    list(evaluate_all(study, places, LEVEL, (0.0, 1.0), objective, helper))
    assert helped == [(0.25, 0.5), (1.0, 1.0)]


def in_threads(function: Any, calls: list[Any], num_processes: int, *others: Any, **options: Any) -> Iterator[Any]:
    """Run all calls at once."""
    found: list[Any] = []
    threads = [threading.Thread(target=lambda call=call: found.extend(function(*call))) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield from found


def test_numbers_of_models_are_the_same_with_one_two_and_three_processes(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(evaluate={"num_seed_sets": 1}, sample={"batch_size": 3, "num_steps": 2})
    plan, found = prepare(config, tmp_path / "run"), []
    wanted = wanted_records(plan, ["pretrained"])
    monkeypatch.setattr(scoring, "run_all", in_threads)
    for num in (1, 2, 3):
        plan.config = config.model_copy(update={"num_processes": num})
        plan.run.metrics.unlink(missing_ok=True)
        found.append({r["metric"]: r["value"] for r in evaluate_models(plan, wanted)})
        assert not plan.run.shares.exists()
    assert found[0] == found[1] == found[2]
    assert found[0].keys() == {"fd_effnetlite0", "kd_effnetlite0"}


def test_a_killed_evaluation_goes_on_with_the_shares_that_are_there(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(
        tiny_config(evaluate={"num_seed_sets": 1}, sample={"batch_size": 3, "num_steps": 2}), tmp_path / "run"
    )
    wanted, drawn, draw = wanted_records(plan, ["pretrained"]), list[slice](), scoring.sample_images

    def dying(*arguments: Any, share: slice, **options: Any) -> Any:
        drawn.append(share)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*arguments, share=share, **options)

    monkeypatch.setattr(scoring, "sample_images", dying)
    with pytest.raises(KeyboardInterrupt):
        list(evaluate_models(plan, wanted))
    assert len(list(evaluate_models(plan, wanted))) == 2
    assert [share.start for share in drawn] == [0, 1, 2, 2, 3]
