"""Baselines and controls as settings of a run: what the search combines, sums of weights, soups, kept checkpoints."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from decouple_merge.analysis import figures
from decouple_merge.config import Config, Search, load_config
from decouple_merge.experiment import workflow
from decouple_merge.experiment.dry_run import describe
from decouple_merge.merging import recipes
from decouple_merge.merging.arithmetic import merge
from decouple_merge.models.base import tensors_sha256
from decouple_merge.searching.candidates import (
    check_weights,
    first_candidates,
    fixed_candidates,
    num_candidates,
    ranked,
)
from decouple_merge.searching.levels import search
from decouple_merge.searching.strategies import Space, onto_sum
from decouple_merge.searching.study import open_study
from decouple_merge.searching.trial import Level, Score, Trial
from decouple_merge.storage.files import read_records

MakeConfig = Callable[..., Config]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
STRATEGIES = [s for s in get_args(Search.model_fields["strategy"].annotation) if s not in ("uniform", "gradient")]


def in_memory() -> Callable[[str], Any]:
    studies: dict[str, Any] = {}
    return lambda level: studies.setdefault(level, open_study(None, level))


def searched(num: int, value: Callable[[tuple[float, ...]], float], **settings: Any) -> list[Trial]:
    asked = {"gradient_batches": 0, "num_trials": 20, "num_images": 10, "num_finalists": 0, **settings}
    config = Config.model_validate({"search": asked})
    check_weights(config.search, num)

    def objective(weights: tuple[float, ...], level: Level) -> Score:
        return Score(value(weights), "")

    return list(search(in_memory(), config, num, objective))


def trained(folder: Path) -> set[str]:
    return {p.parent.relative_to(folder).as_posix() for p in folder.rglob("model.safetensors")}


def models(folder: Path) -> list[str]:
    return list(dict.fromkeys(r["model"] for r in read_records(folder / "metrics.jsonl")))


# -- what is combined
def test_checkpoints_of_the_baseline_are_kept_and_combined(tmp_path: Path, tiny_config: MakeConfig) -> None:
    config = tiny_config(
        finetune={"keep_every": 4},
        search={"over": "baseline-checkpoints", "total": 1, "strategy": "evolution", "num_trials": 7, "low": -1},
    )
    out = tmp_path / "run"
    list(workflow.run(config, out))
    folder = out / "baselines/baseline-finetuned"
    assert trained(out) == {"baselines/baseline-finetuned"}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"4.safetensors", "8.safetensors", "12.safetensors"}
    kept = [load_file(folder / f"checkpoints/{u}.safetensors") for u in (4, 8, 12)]
    # The last is the model itself.
    assert tensors_sha256(kept[-1]) == tensors_sha256(load_file(folder / "model.safetensors"))
    assert len({tensors_sha256(k) for k in kept}) == 3
    record = json.loads((out / "merged/merge.json").read_text())
    assert sum(record["weights"]) == pytest.approx(1)
    assert record["ranges"] is None
    merged = load_file(out / "merged" / WEIGHTS)
    assert tensors_sha256(merged) == tensors_sha256(
        merge(load_file(Path(config.base) / WEIGHTS), kept, record["weights"])
    )
    assert models(out) == ["pretrained", "baseline-finetuned", "merged"]
    list(recipes.repeat_merge(out / "merged/merge.json", tmp_path / "again"))
    assert tensors_sha256(load_file(tmp_path / "again" / WEIGHTS)) == tensors_sha256(merged)


def test_the_baselines_own_scale_is_searched_in_one_dimension(tmp_path: Path, tiny_config: MakeConfig) -> None:
    config = tiny_config(search={"over": "baseline", "num_trials": 6, "strategy": "random"})
    out = tmp_path / "run"
    list(workflow.run(config, out))
    assert trained(out) == {"baselines/baseline-finetuned"}
    trials = [t for t in read_records(out / "search/trials.jsonl") if t["level"] == "screen"]
    assert [t["weights"] for t in trials[:2]] == [[0.0], [1.0]]
    assert len(trials) == 6
    tuned, base = (
        load_file(p) for p in (out / "baselines/baseline-finetuned/model.safetensors", Path(config.base) / WEIGHTS)
    )
    assert trials[1]["merged_sha256"] == tensors_sha256(merge(base, [tuned], [1.0]))
    assert models(out) == ["pretrained", "baseline-finetuned", "merged"]


def test_a_run_of_a_baseline_alone_searches_nothing(tmp_path: Path, tiny_config: MakeConfig) -> None:
    config = tiny_config(search={"over": "nothing"}, finetune={"weighting": "min_snr"})
    out = tmp_path / "run"
    said = list(describe(config, out))
    assert "search: none" in said
    assert not any(line.startswith("experts:") for line in said)
    list(workflow.run(config, out))
    assert trained(out) == {"baselines/baseline-finetuned"}
    assert models(out) == ["pretrained", "baseline-finetuned"]
    assert not (out / "search").exists()
    assert load_config(out / "config.yaml") == config


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"search": {"over": "baseline-checkpoints"}}, "keep_every keeps 0, expected at least 2"),
        ({"search": {"over": "baseline-checkpoints"}, "finetune": {"keep_every": 12}}, "keeps 1, expected at least 2"),
        ({"search": {"over": "baseline"}, "finetune": {"baseline": False}}, "finetune.baseline is false"),
        ({"search": {"over": "baseline", "checkpoints": ["a"]}}, "checkpoints are listed and over is baseline"),
    ],
)
def test_what_is_not_made_is_not_searched_over(sections: dict[str, Any], match: str, tiny_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_config(**sections)


def test_kept_weights_of_a_training_that_was_stopped_are_those_of_one_that_was_not(
    tmp_path: Path, tiny_config: MakeConfig
) -> None:
    config = tiny_config(finetune={"keep_every": 5}, search={"over": "nothing"})
    kept = []
    for name in ("whole", "stopped"):
        events = workflow.run(config, tmp_path / name)
        if name == "stopped":
            folder = tmp_path / name / "baselines/baseline-finetuned"
            next(e for e in events if (folder / "checkpoints/5.safetensors").exists())
            events.close()
            assert not (folder / "model.safetensors").exists()
            events = workflow.run(config, tmp_path / name)
        list(events)
        kept.append({p.name: p.read_bytes() for p in (tmp_path / name).rglob("checkpoints/*")})
    assert kept[0] == kept[1]
    assert kept[0].keys() == {"5.safetensors", "10.safetensors"}


# -- sums of weights
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=8), st.floats(-1, 0), st.floats(0.5, 2), st.floats(0.05, 0.95))
def test_weights_moved_onto_a_sum_are_the_nearest(
    given_weights: list[float], low: float, high: float, part: float
) -> None:
    total = round(len(given_weights) * (low + part * (high - low)), 3)
    found = onto_sum(given_weights, total, low, high)
    assert math.fsum(found) == pytest.approx(total, abs=1e-6)
    assert all(low - 1e-5 <= w <= high + 1e-5 for w in found)
    # The conditions of Karush, Kuhn and Tucker: moved by one λ, but for those that a bound holds back.
    moved = [a - b for a, b in zip(given_weights, found, strict=True)]
    inside = [m for m, w in zip(moved, found, strict=True) if low + 1e-4 < w < high - 1e-4]
    for shift in inside:
        assert shift == pytest.approx(inside[0], abs=1e-4)
        assert all(m <= shift + 1e-4 for m, w in zip(moved, found, strict=True) if w <= low + 1e-5)
        assert all(m >= shift - 1e-4 for m, w in zip(moved, found, strict=True) if w >= high - 1e-5)


def test_a_space_with_a_total_holds_what_it_made_and_each_block_has_its_own() -> None:
    space = Space(-0.5, 2.0, (None, None, 0.25, None, None, None), total=1.0, num_blocks=2)
    for free in ([0.1, 0.2, 0.3, 0.4, 0.5], [2.0, 2.0, -0.5, 2.0, 0.333333]):
        made = space.embed(free)
        assert made in space
        assert [round(sum(made[i : i + 3]), 6) for i in (0, 3)] == [1.0, 1.0]
        assert made[2] == 0.25


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_the_total_and_finds_more_than_the_soup(strategy: str) -> None:
    target = (1.4, 0.3, -0.7)
    found = searched(
        3, lambda w: 1 + sum((a - b) ** 2 for a, b in zip(w, target, strict=True)), strategy=strategy, total=1,
        low=-1.0, high=2.0, num_trials=30, grid_step=0.75,
    )  # fmt: skip
    assert [t.weights for t in found[:3]] == fixed_candidates(3)
    assert all(sum(t.weights) == pytest.approx(1, abs=2e-6) for t in found[3:])
    assert (0.0, 0.0, 1.0) in [t.weights for t in found]
    asked = Search(strategy=strategy, total=1, low=-1.0, high=2.0)
    num_first = len(first_candidates(asked, 3))
    assert min(t.value for t in found[num_first:]) < found[1].value
    assert all(sum(t.weights) == pytest.approx(1, abs=2e-6) for t in ranked(found, asked))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"total": 1, "high": 0.3, "low": -0.2}, "total is 1, and 3 weights add up to -0.6 to 0.9"),
        ({"total": 1, "start": [[1.0, 1.0, 0.0]]}, "adds up to 2, expected search.total, 1"),
        ({"total": 2, "strategy": "uniform"}, "the weights of strategy uniform add up to 1"),
        ({"frozen": {0: 1.0}, "strategy": "uniform"}, "frozen fixes weights, and strategy uniform"),
    ],
)
def test_totals_that_no_weights_have_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_weights(Search.model_validate(settings), 3)


# -- the uniform soup
def test_the_uniform_soup_wins_its_search_whatever_scores_better() -> None:
    found = searched(4, sum, strategy="uniform", num_trials=50, gradient_batches=200)
    assert [t.weights for t in found] == fixed_candidates(4)
    asked = Search(strategy="uniform")
    assert num_candidates(asked, 4) == 3
    assert ranked(found, asked)[0].weights == (0.25,) * 4
    assert ranked(found)[0].weights == (0.0,) * 4


def test_the_surfaces_of_many_weights_are_those_of_the_largest(tmp_path: Path) -> None:
    draws = random.Random(0)
    trials = [
        Trial("screen", i, tuple(draws.uniform(-1, 1) for _ in range(20)), 1.0 + i, "", 1.0, "main") for i in range(6)
    ]
    axes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", lambda figure, out: axes.extend(figure.axes))
        figures.search_surfaces(trials, "kd", tmp_path / "out.png")
    largest = sorted(range(20), key=lambda i: -abs(trials[0].weights[i]))[:8]
    shown = {axis.get_xlabel() for axis in axes if axis.get_visible() and axis.get_xlabel()}
    shown |= {axis.get_ylabel() for axis in axes if axis.get_visible() and axis.get_xlabel()}
    assert shown == {f"weight {i}" for i in largest}
