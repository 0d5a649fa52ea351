"""Settings of a rule that are searched with the weights, and weights of every layer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decouple_merge.config import Config, Search
from decouple_merge.errors import UserError
from decouple_merge.experiment.plan import check
from decouple_merge.experiment.workflow import run
from decouple_merge.merging.arithmetic import Tensors, merge
from decouple_merge.merging.keys import group_keys
from decouple_merge.merging.merger import Merger
from decouple_merge.merging.recipes import repeat_merge
from decouple_merge.merging.rules.rule import Context, Settings
from decouple_merge.searching.candidates import check_weights, first_candidates, ranked
from decouple_merge.searching.levels import search
from decouple_merge.searching.strategies import Space, Weights
from decouple_merge.searching.study import open_study
from decouple_merge.searching.trial import Level, Score, Trial


def settings(**changes: Any) -> Search:
    chosen = {"method": "ties", "density": 0.7, "tune": {"density": None, "scale": [0.5, 1.5]}, "gradient_batches": 0}
    return Search.model_validate(chosen | {"num_trials": 40, "num_finalists": 0} | changes)


def tensors(seed: int) -> Tensors:
    return {"a.weight": torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))}


def test_a_merge_with_other_settings_is_that_merge_and_back_again() -> None:
    base, experts = tensors(0), [tensors(1), tensors(2)]
    given = {"density": 0.7, "scale": 1.0}
    context = Context(settings=Settings(density=0.7))
    merger = Merger(
        base, experts, method="ties", context_of=lambda key: context, tuned=given, device=torch.device("cpu")
    )
    for density, scale in ((0.7, 1.0), (0.2, 1.3), (0.7, 1.0)):
        found = merger.merge([0.8, 1.2, density, scale])
        expected = merge(base, experts, [0.8, 1.2], "ties", Settings(density=density, scale=scale))
        assert torch.equal(found["a.weight"], expected["a.weight"])
    with pytest.raises(UserError, match="2 weights for 2 experts and 1 patterns and settings density, scale"):
        merger.merge([0.8, 1.2])


@pytest.mark.parametrize("bounds", [(0.1, 1.0), (0.0, 2000.0), (1e-5, 3e-5)])
def test_a_setting_comes_back_from_its_place_in_the_cube(bounds: tuple[float, float]) -> None:
    space = Space(-0.6, 2.2, (None, 1.0), tuned=(bounds,))
    for share in (0.0, 0.1234567, 1 / 3, 1.0):
        candidate = space.embed([0.3, -0.6 + 2.8 * share])
        assert space.embed(space.free(candidate)) == candidate
        assert candidate[:2] == (0.3, 1.0)
        assert candidate[2] == pytest.approx(bounds[0] + share * (bounds[1] - bounds[0]), abs=1e-6)


@pytest.mark.parametrize("strategy", ["gp", "tpe", "cmaes", "evolution", "coordinate", "random"])
def test_every_strategy_tunes_within_the_bounds(strategy: str) -> None:
    asked = settings(strategy=strategy)

    def objective(candidate: Weights, level: Level) -> Score:
        *weights, density, scale = candidate
        return Score(sum((w - 0.7) ** 2 for w in weights) + 4 * (density - 0.35) ** 2 + (scale - 0.8) ** 2, "")

    study = open_study(None, strategy)
    config = Config.model_validate({"search": asked.model_dump()})
    found = list(search(lambda name: study, config, 2, objective))
    assert all(0.1 <= t.weights[2] <= 1 and 0.5 <= t.weights[3] <= 1.5 for t in found)
    assert [t.weights for t in found[:3]] == [(0, 0, 0.7, 1), (0.5, 0.5, 0.7, 1), (1, 1, 0.7, 1)]
    best, first = ranked(found, asked)[0], ranked(found[:5], asked)[0]
    assert best.value < first.value
    assert best.weights[2:] != (0.7, 1.0)


def test_what_is_frozen_or_given_holds_for_weights_alone() -> None:
    asked = settings(frozen={0: 1.0}, start=[[1.0, 0.2]])
    check_weights(asked, 2)
    assert (1.0, 0.2, 0.7, 1.0) in first_candidates(asked, 2)
    trials = [
        Trial("screen", i, w, float(i), "", 0.0, "") for i, w in enumerate([(0.9, 0.0, 0.7, 1.0), (1.0, 0.0, 0.2, 1.4)])
    ]
    assert [t.number for t in ranked(trials, asked)] == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": {"gamma": None}}, "search.tune has gamma, and method ties reads no such number: .* density, scale"),
        ({"tune": {"density": None}, "density": [0.5, 0.7]}, "search.tune has density, and method ties reads no such"),
        ({"tune": {"vote": None}}, "search.tune has vote"),
        ({"tune": {"scale": None}}, r"scale without bounds, and the method has none: give \[low, high\]"),
        ({"tune": {"density": [0.8, 1.0]}}, r"density in \[0.8, 1\], .* search.density, 0.7, between them"),
        ({"tune": {"density": [0, 1]}}, r"search.tune in \[0, 1\]: density.*: Input should be greater than 0"),
        (
            {"tune": {"gamma": [0.0, 1.0]}, "method": "breadcrumbs"},
            r"search.tune in \[0, 1\]: gamma: Input should be less",
        ),
        ({"strategy": "greedy"}, "tune has density, scale, and strategy greedy tunes nothing"),
    ],
)
def test_a_setting_that_cannot_be_tuned_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_weights(settings(**changes), 2)


def test_a_run_writes_what_it_tuned_and_its_recipe_gives_the_same_bytes(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    tuned = {"method": "ties", "tune": {"density": [0.2, 1.0]}, "strategy": "random", "num_trials": 8}
    config = tiny_config(search=tuned | {"num_finalists": 0}, finetune={"baseline": False})
    list(run(config, tmp_path / "run"))
    record = json.loads((tmp_path / "run/merged/merge.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run/search/trials.jsonl").read_text().splitlines()]
    assert all(len(line["weights"]) == 2 and 0.2 <= line["settings"]["density"] <= 1 for line in lines)
    assert len({line["settings"]["density"] for line in lines}) > 1
    won = next(line for line in lines if line["merged_sha256"] == record["merged_sha256"])
    assert (record["weights"], record["settings"]["density"]) == (won["weights"], won["settings"]["density"])
    list(repeat_merge(tmp_path / "run/merged/merge.json", tmp_path / "again"))
    name = "unet/diffusion_pytorch_model.safetensors"
    once, again = (load_file(folder / name) for folder in (tmp_path / "run/merged", tmp_path / "again"))
    assert all(torch.equal(once[key], again[key]) for key in once)


def test_layers_are_a_pattern_for_each_layer_of_the_base(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    plan = check(tiny_config(search={"blocks": ["layers"]}), tmp_path / "run")
    groups = group_keys(list(plan.base.network.state_dict()), plan.config.search.blocks)
    assert len(groups) > 20
    assert all(len({key.rpartition(".")[0] for key in keys}) == 1 for keys in groups)
