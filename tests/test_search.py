"""The search on cheap objectives: its candidates, budgets, levels and workers, and that a kill leaves no trace."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from decouple_merge.config import Config, Search
from decouple_merge.searching.candidates import (
    check_weights,
    first_candidates,
    fixed_candidates,
    num_candidates,
    ranked,
)
from decouple_merge.searching.levels import levels, search
from decouple_merge.searching.strategies import Space, Weights
from decouple_merge.searching.study import Study, open_storage, open_study, trials
from decouple_merge.searching.trial import Level, Score, Trial

TARGET = (1.7, 0.4)
STRATEGIES = [
    s
    for s in get_args(Search.model_fields["strategy"].annotation)
    if s not in ("grid", "greedy", "uniform", "gradient")
]


def objective(weights: Weights, level: Level) -> Score:
    value = sum((w - t) ** 2 for w, t in zip(weights, TARGET, strict=True))
    return Score(value, hashlib.sha256(repr(weights).encode()).hexdigest())


def of(function: Callable[[Weights], float]) -> Callable[[Weights, Level], Score]:
    return lambda weights, level: Score(function(weights), "")


def settings(strategy: str, **changes: Any) -> Search:
    return Search.model_validate(
        {"strategy": strategy, "num_trials": 12, "num_finalists": 0, "gradient_batches": 0} | changes
    )


def config(strategy: str, seed: int = 3, **changes: Any) -> Config:
    return Config.model_validate({"seed": seed, "search": settings(strategy, **changes).model_dump()})


def in_memory() -> Callable[[str], Study]:
    studies: dict[str, Study] = {}
    return lambda name: studies.setdefault(name, open_study(None, name))


def in_file(folder: Path) -> Callable[[str], Study]:
    storage = open_storage(folder / "study.jsonl")
    return lambda name: open_study(storage, name)


def plain(found: list[Trial]) -> list[tuple[str, int, Weights, float, str]]:
    return [(t.level, t.number, t.weights, t.value, t.merged_sha256) for t in found]


def interrupting(seen: set[tuple[str, Weights]]) -> Callable[[Weights, Level], Score]:
    """Make an objective that fails on every candidate once."""

    def fail_once(weights: Weights, level: Level) -> Score:
        if (level.name, weights) not in seen:
            seen.add((level.name, weights))
            raise KeyboardInterrupt
        return objective(weights, level)

    return fail_once


def drive(open_level: Callable[[], Callable[[str], Study]], asked: Config, num_experts: int = 2) -> int:
    """Search with an interruption at every candidate, to the end; returns how many there were."""
    seen, num_interruptions = set[tuple[str, Weights]](), 0
    # A search that goes another way after an interruption would meet new candidates, and be interrupted, for ever.
    while num_interruptions < 100:
        try:
            list(search(open_level(), asked, num_experts, interrupting(seen)))
            break
        except KeyboardInterrupt:
            num_interruptions += 1
    return num_interruptions


@pytest.fixture(scope="module")
def uninterrupted() -> Callable[[str], list[Trial]]:
    """Search with a strategy, once for all tests of this file."""
    known: dict[str, list[Trial]] = {}

    def run(strategy: str) -> list[Trial]:
        if strategy not in known:
            known[strategy] = list(search(in_memory(), config(strategy), 2, objective))
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
        assert objective(t.weights, levels(config("random"), 2)[0]) == Score(t.value, t.merged_sha256)
        assert t.seconds >= 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_study_interrupted_at_every_trial_ends_as_one_that_was_not(
    strategy: str, uninterrupted: Callable[[str], list[Trial]], tmp_path: Path
) -> None:
    open_level = in_memory()
    # A file is slow: two strategies are enough to see that the storage keeps all.
    num = drive(lambda: in_file(tmp_path) if strategy in ("tpe", "cmaes") else open_level, config(strategy))
    study = in_file(tmp_path)("screen") if strategy in ("tpe", "cmaes") else open_level("screen")
    assert num == 12
    assert plain(trials(study)) == plain(uninterrupted(strategy))


@pytest.mark.parametrize("stop", [2, 9])
def test_a_study_stopped_between_trials_goes_on_where_it_stopped(
    stop: int, uninterrupted: Callable[[str], list[Trial]], tmp_path: Path
) -> None:
    running = search(in_file(tmp_path), config("tpe"), 2, objective)
    first = [next(running) for _ in range(stop)]
    running.close()
    rest = list(search(in_file(tmp_path), config("tpe"), 2, objective))
    assert plain(first + rest) == plain(uninterrupted("tpe")) == plain(trials(in_file(tmp_path)("screen")))


def test_a_kill_between_queueing_a_candidate_and_starting_it_leaves_no_trace(
    uninterrupted: Callable[[str], list[Trial]],
) -> None:
    open_level = in_memory()
    attributes = {"level": "screen", "place": 0, "weights": (0.0, 0.0)}
    open_level("screen").enqueue_trial({"w0": 0.0, "w1": 0.0}, user_attrs=attributes)
    assert plain(list(search(open_level, config("tpe"), 2, objective))) == plain(uninterrupted("tpe"))


def test_a_worker_that_was_ahead_of_a_kill_leaves_no_gap(uninterrupted: Callable[[str], list[Trial]]) -> None:
    open_level = in_memory()
    later = uninterrupted("random")[3]
    attributes = {"level": "screen", "place": later.number, "weights": later.weights, "worker": "another"}
    study = open_level("screen")
    study.enqueue_trial({f"w{i}": w for i, w in enumerate(later.weights)}, user_attrs=attributes)
    taken = study.ask()
    taken.set_user_attr("merged_sha256", later.merged_sha256)
    taken.set_user_attr("seconds", 1.0)
    study.tell(taken, later.value)
    list(search(open_level, config("random"), 2, objective))
    assert plain(trials(study)) == plain(uninterrupted("random"))


def test_a_finished_study_is_not_searched_again(uninterrupted: Callable[[str], list[Trial]]) -> None:
    open_level = in_memory()
    first = list(search(open_level, config("random"), 2, objective))
    assert list(search(open_level, config("random"), 2, objective)) == []
    assert plain(trials(open_level("screen"))) == plain(first) == plain(uninterrupted("random"))


def test_another_seed_proposes_other_candidates(uninterrupted: Callable[[str], list[Trial]]) -> None:
    other = list(search(in_memory(), config("random", seed=4), 2, objective))
    num = len(first_candidates(settings("random"), 2))
    assert all(a.weights != b.weights for a, b in zip(other[num:], uninterrupted("random")[num:], strict=True))


@pytest.mark.parametrize("strategy", ["random", "grid"])
def test_first_candidates_are_the_fixed_ones_and_then_more_of_the_diagonal_within_the_bounds(strategy: str) -> None:
    narrow, wide = (first_candidates(settings(strategy, high=high), 4) for high in (1.2, 2.5))
    assert narrow[:3] == wide[:3] == fixed_candidates(4)
    assert all(len(set(w)) == 1 and w[0] <= 1.2 for w in narrow)
    assert [w[0] for w in wide[3:]] == ([] if strategy == "grid" else [0.5, 1.5])


def test_first_candidates_are_evaluated_even_where_the_budget_is_smaller() -> None:
    few = config("random", num_trials=1)
    found = list(search(in_memory(), few, 2, objective))
    assert [t.weights for t in found] == first_candidates(few.search, 2)
    assert num_candidates(few.search, 2) == len(found)


def test_start_points_are_evaluated_after_the_fixed_candidates_and_replace_the_diagonal() -> None:
    found = list(search(in_memory(), config("random", start=[[1.6, 0.4], [1.0, 1.0]]), 2, objective))
    assert [t.weights for t in found[:4]] == [*fixed_candidates(2), (1.6, 0.4)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_weights_stay(strategy: str) -> None:
    asked = config(strategy, frozen={1: 0.4}, num_trials=16)
    found = list(search(in_memory(), asked, 2, objective))
    num = len(first_candidates(asked.search, 2))
    assert len(found) > num
    assert [t.weights for t in found[:3]] == fixed_candidates(2)
    assert {t.weights[1] for t in found[3:]} == {0.4}
    assert {t.weights[1] for t in ranked(found, asked.search)} == {0.4}


@pytest.mark.parametrize(("frozen", "winner"), [({}, (0, 0)), ({0: 0.0}, (0, 0)), ({0: 1.0}, (1, 0))])
def test_a_fixed_candidate_wins_only_where_nothing_is_frozen_to_another_weight(
    frozen: dict[int, float], winner: Weights
) -> None:
    asked = config("grid", frozen=frozen, grid_step=0.9, num_finalists=2, num_final_images=4)
    open_level = in_memory()
    list(search(open_level, asked, 2, of(lambda w: 1 + w[0] ** 2 + w[1] ** 2)))
    for level in levels(asked, 2):
        assert ranked(trials(open_level(level.name)), asked.search)[0].weights == winner


@pytest.mark.parametrize("strategy", ["random", "gp", "grid", "cmaes", "coordinate"])
def test_a_fixed_candidate_outside_the_bounds_does_not_win(strategy: str) -> None:
    asked = config(strategy, low=0.2, high=0.4, num_trials=6)
    found = list(search(in_memory(), asked, 2, of(lambda w: 1 + w[0] ** 2 + w[1] ** 2)))
    assert [t.weights for t in found[:3]] == fixed_candidates(2)
    assert ranked(found)[0].weights == (0, 0)
    assert ranked(found, asked.search)[0].weights == (0.2, 0.2)


def test_everything_frozen_leaves_the_fixed_candidates_and_one_more() -> None:
    found = list(search(in_memory(), config("random", frozen={0: 1.0, 1: 0.4}), 2, objective))
    assert [t.weights for t in found] == [*fixed_candidates(2), (1.0, 0.4)]


def test_blocks_have_weights_of_their_own() -> None:
    asked = config("coordinate", blocks=["up.*", "*"], num_trials=300, high=2.0, frozen={3: 0.5})
    found = list(search(in_memory(), asked, 2, of(lambda w: abs(w[0] - 2) + abs(w[1]) + abs(w[2] - 1) + abs(w[3] - 1))))
    assert [t.weights for t in found[:3]] == [(0.0,) * 4, (0.5,) * 4, (1.0,) * 4]
    assert ranked(found)[0].weights == pytest.approx((2, 0, 1, 0.5), abs=0.05)


# -- budgets
def test_a_budget_of_images_limits_the_candidates() -> None:
    found = list(search(in_memory(), config("random", num_images=10, max_images=79), 2, objective))
    assert len(found) == 7


def test_a_budget_of_minutes_ends_the_search_and_a_second_run_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(30.0 * i for i in range(1000))
    monkeypatch.setattr("decouple_merge.searching.study.time.monotonic", lambda: next(clock))
    open_level, asked = in_memory(), config("random", num_trials=100, max_minutes=4)
    found = list(search(open_level, asked, 2, objective))
    assert 5 <= len(found) < 100
    assert sum(t.seconds for t in found[:-1]) < 4 * 60 <= sum(t.seconds for t in found)
    assert list(search(open_level, asked, 2, objective)) == []


def test_the_candidates_that_everyone_asks_for_are_scored_whatever_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(6000.0 * i for i in range(1000))
    monkeypatch.setattr("decouple_merge.searching.study.time.monotonic", lambda: next(clock))
    asked = config("random", num_trials=100, max_minutes=1, batch_size=1)
    found = list(search(in_memory(), asked, 2, objective))
    assert [t.weights for t in found] == first_candidates(asked.search, 2)


def test_of_a_search_that_ended_early_one_in_three_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(30.0 * i for i in range(1000))
    monkeypatch.setattr("decouple_merge.searching.study.time.monotonic", lambda: next(clock))
    asked = config("random", num_trials=100, max_minutes=4, num_images=5, num_finalists=2, num_final_images=400)
    found = Counter(t.level for t in search(in_memory(), asked, 2, objective))
    assert [level.num_candidates for level in levels(asked, 2)] == [100, 34, 12, 4, 2]
    num = found["screen"]
    assert 5 <= num < 20
    assert list(found.values()) == [num, -(-num // 3), 2, 2, 2]


# -- the levels
def halved(**changes: Any) -> Config:
    return config("random", num_trials=12, num_images=5, num_finalists=2, num_final_images=40, num_steps=4, **changes)


def test_levels_keep_one_in_three_and_draw_three_times_the_images_until_the_finalists_meet_fresh_seeds() -> None:
    found = levels(halved(), 2)
    first = halved().search.first_seed
    assert found == [
        Level("screen", 12, range(first, first + 5), 4),
        Level("rung-1", 4, range(first, first + 15), None),
        Level("final", 2, range(first + 40, first + 80), None),
    ]


def test_no_level_draws_again_what_the_one_before_has_drawn() -> None:
    same = config("random", num_trials=40, num_images=50, num_finalists=2, num_final_images=50)
    assert [(level.name, level.num_candidates) for level in levels(same, 2)] == [("screen", 40), ("final", 2)]
    # Images of fewer steps are others, and the next level has no fewer of them.
    other = config("random", num_trials=12, num_images=50, num_finalists=2, num_final_images=10, num_steps=4)
    assert [len(level.seeds) for level in levels(other, 2)] == [50, 50, 10]


def test_the_seeds_of_the_finalists_chose_nobody_before() -> None:
    for asked in (halved(), halved(halving=2), config("gp", num_images=50, num_finalists=1, num_final_images=10)):
        *before, final = levels(asked, 2)
        assert final.name == "final"
        assert all(level.seeds.stop <= final.seeds.start for level in before)
        assert final.seeds.stop == asked.all_search_seeds.stop


def test_the_best_of_each_level_are_promoted_by_that_levels_values() -> None:
    def by_level(weights: Weights, level: Level) -> Score:
        """Each level has an optimum of its own."""
        target = {"screen": 1.0, "rung-1": 2.0, "final": 0.0}[level.name]
        return Score((weights[0] - target) ** 2, "")

    found = list(search(in_memory(), halved(), 2, by_level))
    screen, rung, final = ([t for t in found if t.level == name] for name in ("screen", "rung-1", "final"))
    assert (len(screen), len(rung), len(final)) == (12, 4, 2)
    for above, below in ((screen, rung), (rung, final)):
        chosen = {t.weights for t in sorted(above, key=lambda t: (t.value, t.number))[: len(below)]}
        assert {t.weights for t in below} == chosen
    assert [t.number for t in final] == [0, 1]


def test_an_interrupted_search_of_several_levels_ends_as_one_that_was_not() -> None:
    expected, open_level = list(search(in_memory(), halved(), 2, objective)), in_memory()
    assert drive(lambda: open_level, halved()) == len(expected) == 18
    found = [t for level in levels(halved(), 2) for t in trials(open_level(level.name))]
    assert plain(found) == plain(expected)


@pytest.mark.parametrize(("low", "high"), [(-0.8, 1.4), (-1.0, 1.2), (-0.6, 0.5)])
def test_a_setting_at_its_upper_bound_stays_within_the_space(low: float, high: float) -> None:
    space = Space(low, high, (None,), tuned=((0.1, 1.0),))
    assert space.free((0.0, 1.0)) == [0.0, high]
    asked = config("gp", method="ties", density=1.0, low=low, high=high, tune={"density": None}, num_trials=6)
    assert len(list(search(in_memory(), asked, 2, of(lambda w: abs(w[0] - w[2]))))) == 6


# -- the grid: (0.5, 0.5) and its neighbours are inside, TARGET is nearest to (1.5, 0.5)
GRID = {"low": -0.5, "high": 2.0, "grid_step": 0.5}
AXIS = [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0]


def test_the_grid_visits_every_coarse_point_then_the_neighbours_of_the_best() -> None:
    found = list(search(in_memory(), config("grid", **GRID), 2, objective))
    visited = [t.weights for t in found]
    coarse = {(a, b) for a in AXIS for b in AXIS}
    assert visited[:3] == fixed_candidates(2)
    assert set(visited[: len(coarse)]) == coarse
    around = {(1.5 + a, 0.5 + b) for a in (-0.25, 0, 0.25) for b in (-0.25, 0, 0.25)}
    assert set(visited[len(coarse) :]) == around - coarse
    assert ranked(found)[0].weights == (1.75, 0.5)


def test_no_strategy_evaluates_equal_candidates_twice() -> None:
    for strategy in (*STRATEGIES, "grid", "greedy"):
        asked: list[Weights] = []

        def counted(weights: Weights, level: Level, asked: list[Weights] = asked) -> Score:
            asked.append(weights)
            return objective(weights, level)

        limits = config(strategy, **GRID, num_trials=30)
        found = list(search(in_memory(), limits, 2, counted))
        assert len(asked) == len(set(asked)) == len(found) <= num_candidates(limits.search, 2)


def test_a_grid_interrupted_at_every_trial_ends_as_one_that_was_not() -> None:
    asked = config("grid", low=-0.5, high=1.5, grid_step=0.5)
    expected, open_level = list(search(in_memory(), asked, 2, objective)), in_memory()
    assert drive(lambda: open_level, asked) == len(expected)
    assert plain(trials(open_level("screen"))) == plain(expected)


def test_a_grid_that_the_images_do_not_pay_for_is_refused() -> None:
    asked = {"num_images": 10, "low": -0.5, "high": 1.5, "grid_step": 0.5}
    check_weights(settings("grid", max_images=340, **asked), 2)
    with pytest.raises(ValueError, match=r"has up to 34 candidates, and search.max_images pays for 33: raise it or"):
        check_weights(settings("grid", max_images=339, **asked), 2)


def test_the_fine_grid_stays_within_the_bounds() -> None:
    asked = config("grid", low=0.0, high=1.0, grid_step=0.5)
    found = list(search(in_memory(), asked, 1, of(lambda w: -w[0])))
    assert {t.weights for t in found} == {(0.0,), (0.5,), (1.0,), (0.75,)}


# -- single strategies
def test_the_compass_search_ends_at_the_optimum_of_a_quadratic() -> None:
    found = list(search(in_memory(), config("coordinate", num_trials=500), 2, objective))
    assert len(found) < 200
    assert ranked(found)[0].weights == pytest.approx(TARGET, abs=0.03)


@pytest.mark.parametrize("strategy", ["cmaes", "evolution"])
def test_populations_come_near_the_optimum_of_a_quadratic(strategy: str) -> None:
    found = list(search(in_memory(), config(strategy, num_trials=150), 2, objective))
    assert ranked(found)[0].value < 0.04


def test_the_greedy_soup_keeps_an_expert_only_where_it_helps() -> None:
    values = {(1.0, 0.0, 0.0): 3.0, (0.0, 1.0, 0.0): 1.0, (0.0, 0.0, 1.0): 2.0, (0.0, 0.5, 0.5): 0.5}
    found = list(search(in_memory(), config("greedy"), 3, of(lambda w: values.get(w, 9.0))))
    # The pair, and then all three, which the fixed candidates hold already to six digits.
    assert (0.0, 0.5, 0.5) in [t.weights for t in found[6:]]
    assert ranked(found)[0].weights == (0.0, 0.5, 0.5)


def test_each_block_has_a_greedy_soup_of_its_own() -> None:
    asked = config("greedy", blocks=["up.*", "*"])
    best = (0.5, 0.5, 0.0, 1.0)
    found = list(search(in_memory(), asked, 2, of(lambda w: sum(abs(a - b) for a, b in zip(w, best, strict=True)))))
    assert ranked(found)[0].weights == best


def test_a_third_each_is_a_candidate_that_a_sampler_is_told_of() -> None:
    assert (1 / 3,) * 3 in Space(-0.2, 1.2, (None,) * 3)
    assert (1 / 3,) * 3 not in Space(-0.2, 0.3, (None,) * 3)


def test_learned_weights_are_evaluated_before_the_strategy_chooses_and_moved_into_the_space() -> None:
    asked = config("random", gradient_batches=5, frozen={1: 0.4})
    found = list(search(in_memory(), asked, 2, objective, (3.0, 1.0)))
    num = len(first_candidates(asked.search, 2))
    assert found[num].weights == (2.5, 0.4)
    assert len(found) == 12


def test_the_gradient_strategy_tries_multiples_of_what_was_learned() -> None:
    asked = config("gradient", gradient_batches=5)
    found = list(search(in_memory(), asked, 2, objective, (0.9, 0.2)))
    expected = [(0.9, 0.2), (0.45, 0.1), (1.35, 0.3), (1.8, 0.4)]
    assert [t.weights for t in found] == [*first_candidates(asked.search, 2), *expected]
    assert num_candidates(asked.search, 2) == len(found)
    with pytest.raises(ValueError, match="leaves the strategy gradient nothing to try"):
        settings("gradient")


def test_a_batch_of_proposals_holds_different_candidates() -> None:
    found = list(search(in_memory(), config("gp", batch_size=3, num_trials=14), 2, objective))
    assert len({t.weights for t in found}) == 14
    assert ranked(found)[0].value < 0.3


@pytest.mark.parametrize("strategy", ["gp", "tpe"])
def test_an_optimum_in_a_corner_doesnt_end_the_search(strategy: str) -> None:
    asked = config(strategy, num_trials=24, low=-1.0, high=1.0)
    found = list(search(in_memory(), asked, 2, of(lambda w: 10.0 - w[0] - w[1])))
    assert len({t.weights for t in found}) == 24
    assert ranked(found)[0].weights == (1.0, 1.0)


def test_best_is_the_first_of_equal_trials() -> None:
    found = list(search(in_memory(), config("random"), 2, of(lambda w: min(w[0], 0.5))))
    lowest = min(t.value for t in found)
    assert ranked(found)[0].number == min(t.number for t in found if t.value == lowest)


def test_a_single_expert_is_searched_too() -> None:
    for strategy in ("tpe", "cmaes", "evolution", "coordinate"):
        found = list(search(in_memory(), config(strategy, num_trials=8), 1, of(lambda w: (w[0] - 2) ** 2)))
        assert [t.weights for t in found[:2]] == [(0.0,), (1.0,)]
        assert len(found) == 8
