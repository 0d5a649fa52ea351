"""The search on cheap objectives: its candidates, its budget, and that an interruption leaves no trace."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import optuna
import pytest

from decouple_merge.config import Search
from decouple_merge.search import (
    Score,
    Trial,
    Weights,
    best,
    first_candidates,
    fixed_candidates,
    num_candidates,
    open_study,
    search,
    trials,
)

TARGET = (1.7, 0.4)
STRATEGIES = [s for s in get_args(Search.model_fields["strategy"].annotation) if s != "grid"]


def objective(weights: Weights) -> Score:
    value = sum((w - t) ** 2 for w, t in zip(weights, TARGET, strict=True))
    return Score(value, hashlib.sha256(repr(weights).encode()).hexdigest())


def settings(strategy: str, **changes: object) -> Search:
    return Search.model_validate({"strategy": strategy, "num_trials": 12, **changes})


def in_memory() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="minimize")


def plain(found: list[Trial]) -> list[tuple[int, Weights, float, str]]:
    return [(t.number, t.weights, t.value, t.merged_sha256) for t in found]


def interrupting(seen: set[Weights]) -> Callable[[Weights], Score]:
    """Make an objective that fails on every candidate once."""

    def fail_once(weights: Weights) -> Score:
        if weights not in seen:
            seen.add(weights)
            raise KeyboardInterrupt
        return objective(weights)

    return fail_once


@pytest.fixture(scope="module")
def uninterrupted() -> Callable[[str], list[Trial]]:
    """Search with a strategy, once for all tests of this file."""
    known: dict[str, list[Trial]] = {}

    def run(strategy: str) -> list[Trial]:
        if strategy not in known:
            known[strategy] = list(search(in_memory(), settings(strategy), 2, objective, 3))
        return known[strategy]

    return run


@pytest.mark.parametrize(
    ("num_experts", "expected"),
    [
        (1, [(0.0,), (1.0,)]),
        (2, [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]),
        (4, [(0.0,) * 4, (0.25,) * 4, (1.0,) * 4]),
    ],
)
def test_fixed_candidates_are_base_uniform_and_sum(num_experts: int, expected: list[Weights]) -> None:
    assert fixed_candidates(num_experts) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fixed_candidates_come_first(strategy: str, uninterrupted: Callable[[str], list[Trial]]) -> None:
    assert [t.weights for t in uninterrupted(strategy)[:3]] == fixed_candidates(2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_ends_at_its_budget_within_its_bounds(
    strategy: str, uninterrupted: Callable[[str], list[Trial]]
) -> None:
    found = uninterrupted(strategy)
    assert [t.number for t in found] == list(range(12))
    assert num_candidates(settings(strategy), 2) == 12
    assert all(-0.2 <= w <= 2.5 for t in found for w in t.weights)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_improves_on_what_it_was_given(strategy: str, uninterrupted: Callable[[str], list[Trial]]) -> None:
    found, num = uninterrupted(strategy), len(first_candidates(settings(strategy), 2))
    assert min(t.value for t in found) < min(t.value for t in found[:num])


def test_the_gaussian_process_comes_near_the_optimum_of_a_quadratic(
    uninterrupted: Callable[[str], list[Trial]],
) -> None:
    assert min(t.value for t in uninterrupted("gp")) < 0.05


def test_trials_record_the_value_and_the_hash_that_the_objective_gave(
    uninterrupted: Callable[[str], list[Trial]],
) -> None:
    for t in uninterrupted("random"):
        assert objective(t.weights) == Score(t.value, t.merged_sha256)
        assert t.seconds >= 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_study_interrupted_at_every_trial_ends_as_one_that_was_not(
    strategy: str, uninterrupted: Callable[[str], list[Trial]], tmp_path: Path
) -> None:
    # A file is slow, and what is not a model of the trials has little to read from it.
    url = f"sqlite:///{tmp_path / 'study.db'}" if strategy in ("gp", "tpe") else None
    study = open_study(url) if url else in_memory()
    seen, num_interruptions = set[Weights](), 0
    # A search that goes another way after an interruption would meet new candidates, and be interrupted, for ever.
    while num_interruptions < 13:
        try:
            list(search(study, settings(strategy), 2, interrupting(seen), 3))
            break
        except KeyboardInterrupt:
            num_interruptions += 1
            study = open_study(url) if url else study
    assert num_interruptions == 12
    assert plain(trials(study)) == plain(uninterrupted(strategy))


@pytest.mark.parametrize("stop", [2, 9])
def test_a_study_stopped_between_trials_goes_on_where_it_stopped(
    stop: int, uninterrupted: Callable[[str], list[Trial]], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    running = search(open_study(url), settings("tpe"), 2, objective, 3)
    first = [next(running) for _ in range(stop)]
    running.close()
    rest = list(search(open_study(url), settings("tpe"), 2, objective, 3))
    assert plain(first + rest) == plain(uninterrupted("tpe")) == plain(trials(open_study(url)))


def test_a_kill_between_queueing_a_candidate_and_starting_it_leaves_no_trace(
    uninterrupted: Callable[[str], list[Trial]], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    open_study(url).enqueue_trial({"w0": 0.0, "w1": 0.0})
    assert plain(list(search(open_study(url), settings("tpe"), 2, objective, 3))) == plain(uninterrupted("tpe"))


def test_a_finished_study_is_not_searched_again(uninterrupted: Callable[[str], list[Trial]]) -> None:
    study = in_memory()
    first = list(search(study, settings("random"), 2, objective, 3))
    assert list(search(study, settings("random"), 2, objective, 3)) == []
    assert plain(trials(study)) == plain(first) == plain(uninterrupted("random"))


def test_another_seed_proposes_other_candidates(uninterrupted: Callable[[str], list[Trial]]) -> None:
    other = list(search(in_memory(), settings("random"), 2, objective, 4))
    num = len(first_candidates(settings("random"), 2))
    assert all(a.weights != b.weights for a, b in zip(other[num:], uninterrupted("random")[num:], strict=True))


@pytest.mark.parametrize("strategy", ["random", "grid"])
def test_first_candidates_are_the_fixed_ones_and_then_more_of_the_diagonal_within_the_bounds(strategy: str) -> None:
    narrow, wide = (first_candidates(settings(strategy, high=high), 4) for high in (1.2, 2.5))
    assert narrow[:3] == wide[:3] == fixed_candidates(4)
    assert all(len(set(w)) == 1 and w[0] <= 1.2 for w in narrow)
    assert [w[0] for w in wide[3:]] == ([] if strategy == "grid" else [0.5, 1.5])


def test_first_candidates_are_evaluated_even_where_the_budget_is_smaller() -> None:
    few = settings("random", num_trials=1)
    found = list(search(in_memory(), few, 2, objective, 3))
    assert [t.weights for t in found] == first_candidates(few, 2)
    assert num_candidates(few, 2) == len(found)


# -- the grid: (0.5, 0.5) and its neighbours are inside, TARGET is nearest to (1.5, 0.5)
GRID = settings("grid", low=-0.5, high=2.0, grid_step=0.5)
AXIS = [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0]


def test_the_grid_visits_every_coarse_point_then_the_neighbours_of_the_best() -> None:
    found = list(search(in_memory(), GRID, 2, objective, 0))
    visited = [t.weights for t in found]
    coarse = {(a, b) for a in AXIS for b in AXIS}
    assert visited[:3] == fixed_candidates(2)
    assert set(visited[: len(coarse)]) == coarse
    around = {(1.5 + a, 0.5 + b) for a in (-0.25, 0, 0.25) for b in (-0.25, 0, 0.25)}
    assert set(visited[len(coarse) :]) == around - coarse
    assert best_of(found) == (1.75, 0.5)


def best_of(found: list[Trial]) -> Weights:
    return min(found, key=lambda t: t.value).weights


def test_the_grid_does_not_evaluate_equal_candidates_twice() -> None:
    asked: list[Weights] = []

    def counted(weights: Weights) -> Score:
        asked.append(weights)
        return objective(weights)

    found = list(search(in_memory(), GRID, 2, counted, 0))
    assert len(asked) == len(set(asked)) == len(found) <= num_candidates(GRID, 2)


def test_a_grid_interrupted_at_every_trial_ends_as_one_that_was_not(tmp_path: Path) -> None:
    one = settings("grid", low=-0.5, high=1.5, grid_step=0.5)
    expected = list(search(in_memory(), one, 1, lambda w: Score((w[0] - 0.6) ** 2, ""), 0))
    url, seen = f"sqlite:///{tmp_path / 'study.db'}", set[Weights]()

    def fail_once(weights: Weights) -> Score:
        if weights not in seen:
            seen.add(weights)
            raise KeyboardInterrupt
        return Score((weights[0] - 0.6) ** 2, "")

    while True:
        try:
            list(search(open_study(url), one, 1, fail_once, 0))
            break
        except KeyboardInterrupt:
            pass
    assert plain(trials(open_study(url))) == plain(expected)
    assert {t.weights for t in expected} == {(-0.5,), (0.0,), (0.5,), (1.0,), (1.5,), (0.25,), (0.75,)}


@pytest.mark.filterwarnings("error")
def test_the_fine_grid_stays_within_the_bounds() -> None:
    one = settings("grid", low=0.0, high=1.0, grid_step=0.5)
    found = list(search(in_memory(), one, 1, lambda w: Score(-w[0], ""), 0))
    assert {t.weights for t in found} == {(0.0,), (0.5,), (1.0,), (0.75,)}


def test_equal_candidates_of_a_sampler_take_the_value_from_before() -> None:
    asked: list[Weights] = []

    def counted(weights: Weights) -> Score:
        asked.append(weights)
        return Score(float(len(asked)), "")

    study = in_memory()
    list(search(study, settings("random"), 2, counted, 3))
    # Everything seen is forgotten by the caller, but not by the study.
    study.enqueue_trial({"w0": 1.0, "w1": 1.0})
    repeated = study.ask({f"w{i}": optuna.distributions.FloatDistribution(-0.2, 2.5) for i in range(2)})
    study.tell(repeated, state=optuna.trial.TrialState.FAIL)
    list(search(study, settings("random", num_trials=14), 2, counted, 3))
    assert len(asked) == len(set(asked)) == 14


def test_best_is_the_first_of_equal_trials() -> None:
    study = in_memory()
    list(search(study, settings("random"), 2, lambda w: Score(min(w[0], 0.5), ""), 3))
    lowest = min(t.value for t in trials(study))
    assert best(study).number == min(t.number for t in trials(study) if t.value == lowest)


def test_a_single_expert_is_searched_too() -> None:
    found = list(search(in_memory(), settings("tpe", num_trials=6), 1, lambda w: Score((w[0] - 2) ** 2, ""), 0))
    assert [t.weights for t in found[:2]] == [(0.0,), (1.0,)]
    assert len(found) == 6
