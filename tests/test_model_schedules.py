"""Schedules of models: costs, the predictor, the evolution, and what is drawn by one."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from conftest import make_unet
from decouple_merge import load_ensemble
from decouple_merge.config import Sample, Schedule, Text, Zoo, load_schedule, load_zoo
from decouple_merge.config.document import dump
from decouple_merge.experiment.scheduling import find_schedule
from decouple_merge.models.base import load_base
from decouple_merge.models.mixture import describe_mixture, open_schedule
from decouple_merge.models.schedulers import make_scheduler
from decouple_merge.sampling.model import open_model
from decouple_merge.searching.predictor import fit_predictor, hinge, kendall_tau, predict
from decouple_merge.searching.schedules import cost_of, even_slots, evolve, longest_even, random_slots
from decouple_merge.searching.zoo import OpenedZoo

CPU = torch.device("cpu")
SECONDS = [2.0, 1.0, 0.25]


def test_a_schedule_costs_what_its_steps_take_together() -> None:
    assert cost_of((0, 1, 3, 0, 2, 3), SECONDS) == 3.5
    assert even_slots(2, 3, 6) == (2, 0, 2, 0, 2, 0)
    assert longest_even(1, 4, SECONDS, 5.9) == (1, 0, 1, 0)
    assert longest_even(3, 4, SECONDS, 100.0) == (3, 3, 3, 3)
    assert longest_even(1, 4, SECONDS, 1.9) is None


def test_random_schedules_lie_around_the_budget_and_use_every_model() -> None:
    chance = random.Random(0)
    drawn = [random_slots(20, SECONDS, 8.0, chance) for _ in range(300)]
    assert all(0 < cost_of(slots, SECONDS) <= 1.1 * 8 for slots in drawn)
    assert {k for slots in drawn for k in slots} == {0, 1, 2, 3}
    assert random_slots(5, SECONDS, 0.1, chance) == (3, 0, 0, 0, 0)


def test_the_hinge_counts_pairs_in_the_wrong_order_or_too_near() -> None:
    values = torch.tensor([0.0, 1.0, 1.0])
    # Of two pairs, one is apart by more than the margin, the other by 0.25 in the wrong order.
    assert float(hinge(torch.tensor([0.0, 1.5, -0.25]), values)) == pytest.approx(1.25 / 2)


def test_kendalls_tau_is_that_of_its_definition() -> None:
    assert kendall_tau([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0]) == pytest.approx(4 / 6)
    assert kendall_tau([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1
    # Ties in one leave fewer pairs: 2 that agree, of √(2·3).
    assert kendall_tau([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(2 / 6**0.5)


def planted(slots: tuple[int, ...]) -> float:
    """A distance to which each slot adds: model 1 is good where there is noise, model 3 where there is none."""
    gains = {0: (0.0, 0.0), 1: (1.0, 0.1), 2: (0.5, 0.5), 3: (0.0, 0.9)}
    places = np.linspace(0, 1, len(slots))
    return -float(sum(gains[k][0] * (1 - p) + gains[k][1] * p for k, p in zip(slots, places, strict=True)))


def test_the_predictor_learns_a_planted_quality() -> None:
    chance = random.Random(1)
    schedules = [random_slots(12, SECONDS, 10.0, chance) for _ in range(140)]
    values = [planted(slots) for slots in schedules]
    predictor = fit_predictor(schedules[:100], values[:100], 3, 150, seed=0)
    assert kendall_tau(predict(predictor, schedules[100:]), values[100:]) > 0.8
    again = fit_predictor(schedules[:100], values[:100], 3, 5, seed=0)
    assert predict(again, schedules) == predict(fit_predictor(schedules[:100], values[:100], 3, 5, seed=0), schedules)


def test_the_evolution_finds_the_best_schedule_that_the_budget_pays_for() -> None:
    def score(schedules: list[tuple[int, ...]]) -> list[float]:
        return [planted(slots) for slots in schedules]

    num, budget, chance = 6, 5.0, random.Random(2)
    every = np.stack(np.meshgrid(*[range(4)] * num), -1).reshape(-1, num).tolist()
    paid = [tuple(slots) for slots in every if any(slots) and cost_of(tuple(slots), SECONDS) <= budget]
    start = [random_slots(num, SECONDS, budget, chance) for _ in range(20)]
    last = evolve(score, start, SECONDS, budget, 100, 20, chance)
    assert planted(last[0]) == pytest.approx(min(map(planted, paid)))
    assert all(cost_of(slots, SECONDS) <= budget for slots in last)
    assert len(set(last)) == len(last) == 20


def save(folder: Path, seed: int, scheduler: Any = None, **changes: Any) -> Path:
    network = make_unet(**changes)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=draws)
    DDPMPipeline(network, scheduler or DDPMScheduler(num_train_timesteps=40)).save_pretrained(folder)
    return folder


def draw(name: Path, num_steps: int = 50) -> torch.Tensor:
    return next(open_model(str(name), Sample(num_steps=num_steps, batch_size=2), Text()).draw([3, 4], CPU))


def write_schedule(folder: Path, base: Path, steps: list[Any], **models: str) -> Path:
    path = folder / "schedule.yaml"
    path.write_text(dump({"base": str(base), "models": models, "steps": steps}))
    return path


@pytest.mark.parametrize("flow", [False, True])
def test_one_model_at_every_slot_is_the_plain_sampler_to_the_bit(tmp_path: Path, flow: bool) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else None
    base = save(tmp_path / "base", 1, scheduler)
    path = write_schedule(tmp_path, base, ["it"] * 8, it="base")
    assert torch.equal(draw(path), draw(base, num_steps=8))
    with pytest.raises(ValueError, match=r"sampler is UniPCMultistep and .* has the grid of the base"):
        open_model(str(path), Sample(sampler="UniPCMultistep"), Text())


def test_every_second_slot_is_the_sampler_with_half_the_steps(tmp_path: Path) -> None:
    base = save(tmp_path / "base", 1)
    # DDIM's grid of 8 steps is 35, 30, …, 0.
    scheduler = make_scheduler(load_base(str(base)), None, 8, None, [1, 3, 5, 7])
    assert scheduler.timesteps.tolist() == [30, 20, 10, 0]
    path = write_schedule(tmp_path, base, [0, "it"] * 4, it="base")
    assert torch.equal(draw(path), draw(base, num_steps=4))


def test_each_step_has_its_own_model_in_a_stock_pipeline_too(tmp_path: Path) -> None:
    base = save(tmp_path / "base", 1)
    noisy = save(tmp_path / "noisy", 2, block_out_channels=(4, 12))
    path = write_schedule(
        tmp_path, base, ["noisy", 0, 0, "clean", 0, "noisy", "clean", 0], clean="base", noisy=str(noisy)
    )
    pipeline: Any = DDIMPipeline.from_pretrained(base)
    mixture = open_schedule(load_schedule(path))  # type: ignore[arg-type]
    pipeline.unet = load_ensemble(path)
    asked: list[tuple[int, float]] = []
    for i, network in enumerate(pipeline.unet.networks):
        network.register_forward_pre_hook(lambda m, args, i=i: asked.append((i, float(args[1]))))
    pipeline.scheduler = make_scheduler(mixture.base, None, 8, None, mixture.kept)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images = pipeline(2, generator=generators, num_inference_steps=8, output_type="np").images
    assert (torch.from_numpy(images).permute(0, 3, 1, 2) * 255 - draw(path)).abs().max() <= 1
    assert asked == [(0, 35.0), (1, 20.0), (0, 10.0), (1, 5.0)]
    assert [line.split(":")[0] for line in list(describe_mixture(path))[1:3]] == ["noisy, 2 steps", "clean, 2 steps"]
    with pytest.raises(ValueError, match="found 50 steps, expected num_inference_steps=8: the schedule has so"):
        pipeline(2)


@pytest.fixture
def zoo(tmp_path: Path, tiny_images: Path) -> Path:
    base, narrow = save(tmp_path / "base", 1), save(tmp_path / "narrow", 2, block_out_channels=(4, 12))
    schedule = {
        "num_slots": 6,
        "num_schedules": 8,
        "metric": "kd_effnetlite0",
        "num_images": 4,
        "num_updates": 2,
        "num_generations": 2,
        "population": 4,
        "num_finalists": 1,
        "num_report_images": 4,
        "baseline_steps": [2],
        "shares": [0.5, 1.0],
    }
    values = {
        "base": str(base),
        "models": {"base": "base", "narrow": str(narrow)},
        "reference": str(tiny_images),
        "sample": {"batch_size": 4},
        "schedule": schedule,
    }
    path = tmp_path / "zoo.yaml"
    path.write_text(dump(values))
    return path


def test_a_search_ends_in_a_schedule_that_is_drawn_with_and_goes_on_where_it_stopped(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Any] = []

    def distance(self: OpenedZoo, slots: tuple[int, ...], seeds: range) -> float:
        scored.append((slots, seeds.start))
        return planted(slots) + 10

    monkeypatch.setattr(OpenedZoo, "measure", lambda self: [2.0, 1.0])
    monkeypatch.setattr(OpenedZoo, "distance", distance)
    monkeypatch.setattr(OpenedZoo, "distance_alone", lambda self, model, num_steps, seeds: 10.0)
    out = tmp_path / "found.yaml"
    lines = list(find_schedule(load_zoo(zoo), 6.0, out))
    result = json.loads((tmp_path / "found/result.json").read_text())
    assert any(
        line.startswith("Kendall's τ between predictions and distances of 2 held-out schedules") for line in lines
    )
    assert "the budget pays for 6 calls of narrow, of 6 steps" in lines
    assert (tmp_path / "found/front.png").stat().st_size > 1000
    found = load_schedule(out)
    assert found is not None
    assert sum({"base": 2, "narrow": 1, 0: 0}[step] for step in found.steps) <= 6
    assert result["schedules"][-1]["steps"] == found.steps
    assert len(scored) == len(set(scored))
    assert draw(out).shape == (2, 1, 8, 8)
    before = len(scored)
    assert list(find_schedule(load_zoo(zoo), 6.0, out)) == lines
    assert len(scored) == before
    other = load_zoo(zoo, ["schedule.num_images=5"])
    with pytest.raises(ValueError, match=r"found was made from another zoo: seeds was .* give another --out"):
        list(find_schedule(other, 6.0, out))


def test_a_budget_below_one_call_of_the_cheapest_model_is_refused(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenedZoo, "measure", lambda self: [2.0, 1.0])
    with pytest.raises(ValueError, match=r"budget is 0.9 s, and one call of the cheapest model, narrow, takes 1 s for"):
        list(find_schedule(load_zoo(zoo), 0.9, tmp_path / "found.yaml"))


def test_a_zoo_measures_and_scores_its_models(zoo: Path) -> None:
    opened = OpenedZoo(load_zoo(zoo))
    assert all(0 < seconds < 60 for seconds in opened.measure())
    one = (1, 1, 1, 1, 1, 1)
    assert opened.distance(one, range(4)) == opened.distance_alone(1, 6, range(4))
    assert opened.distance((2, 0, 1, 0, 0, 0), range(4)) != opened.distance(one, range(4))


@pytest.mark.parametrize(
    ("changes", "budget", "name", "message"),
    [
        ([], float("inf"), "found.yaml", "--budget is inf, expected a number of seconds above 0"),
        ([], 6.0, "found", "found, expected a path that ends in .yaml, by which a schedule is known"),
        ([], 6.0, "narrow.yaml", r"--out is .*narrow, which is an input"),
        ([], 6.0, "mine.yaml", r"--out is .*mine, which holds notes.txt"),
        (["schedule.num_report_images=1"], 6.0, "found.yaml", "schedule.num_report_images is 1, expected at least"),
        (["schedule.baseline_steps=[2, 99]"], 6.0, "found.yaml", "takes no 99 steps|99 steps"),
        (["schedule.num_slots=99"], 6.0, "found.yaml", "99 steps"),
    ],
)
def test_what_a_search_would_stumble_over_at_its_end_is_refused_before_it(
    zoo: Path, tmp_path: Path, changes: list[str], budget: float, name: str, message: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=message):
        list(find_schedule(load_zoo(zoo, changes), budget, tmp_path / name))
    assert not (tmp_path / "found").exists()
    assert [path.name for path in (tmp_path / "narrow").iterdir() if path.name == "search.json"] == []


def test_a_zoo_that_draws_nothing_finite_is_told(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenedZoo, "measure", lambda self: [2.0, 1.0])
    monkeypatch.setattr(OpenedZoo, "distance", lambda self, slots, seeds: float("inf"))
    with pytest.raises(ValueError, match="random schedules drew finite images, expected some: look at what each model"):
        list(find_schedule(load_zoo(zoo), 6.0, tmp_path / "found.yaml"))


def test_a_sampler_that_can_leave_no_step_out_is_refused_before_anything_is_measured(tmp_path: Path, zoo: Path) -> None:
    save(tmp_path / "base", 1, UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    with pytest.raises(ValueError, match=r"UniPCMultistep, which can't leave steps out .* or take a base with one of"):
        OpenedZoo(load_zoo(zoo))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (Schedule, {"steps": ["a", "b"]}, "steps has 'b', expected 0 or one of the models a"),
        (Schedule, {"steps": [0, 0]}, "steps skips every step, expected at least one that runs"),
        (Zoo, {"schedule": {"shares": [0.5]}}, "expected numbers above 0 that rise to 1, the whole budget"),
        (Zoo, {"schedule": {"first_seed": 100}}, "that choose and 0 to 999 that report overlap"),
        (Zoo, {"sample": {"num_steps": 20}}, "a schedule has steps of its own: set schedule.num_slots"),
        (Zoo, {"sample": {"one_resident": True}}, "a zoo's networks are all held in memory: leave it out"),
        (Zoo, {"schedule": {"baselines": ["c"]}}, "schedule.baselines has 'c', expected one of a"),
    ],
)
def test_what_makes_no_sense_is_refused(section: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section.model_validate({"base": "b", "models": {"a": "base"}, **values})
