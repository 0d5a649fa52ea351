"""Landscapes of a model whose loss is a parabola, and of a run that was killed."""

import json
import math
import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor

from decouple_merge.analysis import landscape_ranges, landscape_task_vectors
from decouple_merge.analysis.fixed import FixedImages, fixed_images
from decouple_merge.analysis.landscape_ranges import filter_normalised
from decouple_merge.analysis.landscape_task_vectors import orthonormal
from decouple_merge.analysis.plane import Plane
from decouple_merge.analysis.subject import Finding, Progress
from decouple_merge.config import Analyze, Config
from decouple_merge.diffusion.process import VP, Flow, Process
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.experiment.analyses import analyze
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.planned import Plan
from decouple_merge.experiment.provenance import made_from
from decouple_merge.experiment.subjects import subject_of as held
from decouple_merge.merging.arithmetic import merge
from decouple_merge.models.export import export_pipeline
from decouple_merge.storage.files import write_json, write_records, write_tensors
from test_gradient_similarity import VELOCITY, subject_of

START = torch.tensor([0.1, -0.2, 0.3, 0.0])


def parabola(bias: Tensor, images: FixedImages, t: Tensor, process: Process) -> float:
    """The loss of a model that says ``bias`` of every image."""
    target = process.target(images.x0, images.noise, t).flatten(1).double()
    return float((target - bias.double()).square().mean())


@pytest.mark.parametrize("process", [VELOCITY, Flow()], ids=["v", "flow"])
def test_a_plane_is_the_parabola_that_it_is_of_a_constant(process: Process) -> None:
    subject = subject_of(process)
    images, first, second = fixed_images(subject, 6), torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0.5, 0.5, 0])
    plane = Plane(subject, {"bias": START}, [{"bias": first}, {"bias": second}], images)
    for a, b in ((0.0, 0.0), (0.3, -0.7), (-1.0, 2.0)):
        bias = START + a * first + b * second
        expected = [parabola(bias, images, process.spread(own, 6), process) for own in subject.ranges]
        assert plane.losses(a, b).tolist() == pytest.approx(expected, rel=1e-5)


def test_places_on_a_plane_keep_lengths_and_angles() -> None:
    vectors = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-0.2, 1.2]], dtype=torch.float64)
    places = torch.as_tensor(orthonormal(weights.numpy(), vectors @ vectors.T))
    torch.testing.assert_close(torch.cdist(places, places), torch.cdist(weights @ vectors, weights @ vectors))
    assert places[1, 1] == 0


def test_the_smallest_loss_is_found_where_the_parabola_has_it() -> None:
    """Experts that are the optimum in one coordinate each: the minimum of their plane is at (1, 1)."""
    subject = subject_of(VP(VELOCITY.alphas_cumprod, "epsilon"))
    optimum = fixed_images(subject, 6).noise.flatten(1).mean(0)
    experts = [{"bias": torch.where(torch.arange(4) == k, optimum, START)} for k in (0, 1)]
    merged = {"bias": START + 0.5 * (experts[0]["bias"] - START) + 0.25 * (experts[1]["bias"] - START)}
    own = {"num_images": 6, "num_points": 8}
    settings = Analyze.model_validate({"landscape_task_vectors": own})
    finding = _result(
        landscape_task_vectors.compute(replace(subject, experts=experts, merged=merged, settings=settings))
    )
    (plane,) = finding.summary["planes"]
    assert plane["minimum"] == pytest.approx([1, 1])
    assert plane["merge"] == pytest.approx([0.5, 0.25])
    assert plane["merge_share"] == pytest.approx(1)
    assert len(finding.rows) == 64
    assert "On 1 of 1 planes" in finding.sentence


def _result(events: Generator[Any, None, Finding]) -> Finding:
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


@pytest.fixture
def moved_plan(tiny_config: Callable[..., Config], tmp_path: Path) -> Plan:
    """Make a run whose experts were never trained, but moved, and whose merge is their mean."""
    plan = prepare(tiny_config(), tmp_path / "run")
    state, experts = plan.base.network.state_dict(), []
    for index in range(len(plan.ranges)):
        draws, folder = torch.Generator().manual_seed(index), plan.run.expert(index)
        experts.append({k: v + 0.02 * torch.randn(v.shape, generator=draws) for k, v in state.items()})
        write_tensors(folder / "model.safetensors", experts[-1])
        write_json(folder / "expert.json", made_from(f"experts/{index}", plan))
    export_pipeline(plan.base, merge(state, experts, [0.5, 0.5]), plan.run.merged, None, None)
    trial: dict[str, Any] = {"level": "screen", "metric": "fd", "value": 3.0, "weights": [0.5, 0.5]}
    lost = trial | {"value": None, "weights": [1.0, 1.0]}
    write_records(plan.run.trials, [trial, trial | {"weights": [0.0, 1.0], "value": 4.0}, lost])
    return plan


def test_two_processes_share_the_analyses_and_write_the_bytes_of_one(moved_plan: Plan) -> None:
    names = ["loss-weights", "task-vectors"]
    files = [moved_plan.run.analysis(f"{name}.{kind}") for name in names for kind in ("csv", "json")]
    list(analyze(moved_plan, names))
    whole = [file.read_bytes() for file in files]
    shutil.rmtree(files[0].parent)
    two = replace(moved_plan, config=moved_plan.config.model_copy(update={"num_processes": 2}))
    list(analyze(two, names))
    assert [file.read_bytes() for file in files] == whole


def test_a_killed_landscape_goes_on_to_the_same_bytes(moved_plan: Plan) -> None:
    own = {"num_images": 8, "num_points": 3}
    settings = Analyze.model_validate({"batch_size": 8, "landscape_task_vectors": own})
    name, run = "landscape-task-vectors", moved_plan.run
    list(analyze(moved_plan, [name], settings))
    record = json.loads(run.analysis(f"{name}.json").read_text())
    assert [figure["file"] for figure in record["figures"]] == [
        f"{name}.png",
        f"{name}-ranges.png",
        f"{name}-distance.png",
    ]
    assert record["summary"]["trials"] == [[[0.5, 0.5], 3.0], [[0.0, 1.0], 4.0]]
    (plane,) = record["summary"]["planes"]
    assert plane["merge"] == pytest.approx([0.5, 0.5], abs=1e-4)
    files = [run.analysis(f"{name}.csv"), run.analysis(f"{name}.json"), *sorted((run.folder / "figures").iterdir())]
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    events = analyze(moved_plan, [name], settings)
    for event in events:
        if isinstance(event, Progress) and event.num_done == 6:
            break
    events.close()
    assert len(list(run.analysis(f"{name}.parts").rglob("*.safetensors"))) == 2
    list(analyze(moved_plan, [name], settings))
    assert [file.read_bytes() for file in files] == whole


def test_a_run_that_is_not_finished_is_told_what_lacks(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    plan = prepare(tiny_config(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"landscape-task-vectors needs experts and merged, which .* hold; finish"):
        next(analyze(plan, ["landscape-task-vectors"]))
    with pytest.raises(ValueError, match=r"sensitivity needs several runs, which .* hold; give the folders of other"):
        next(analyze(plan, ["sensitivity"]))


def test_an_analysis_of_the_base_alone_depends_on_the_images_that_it_draws(moved_plan: Plan) -> None:
    own = {"num_images": 4, "num_gradient_images": 4, "num_points": 3}
    settings = Analyze.model_validate({"batch_size": 4, "landscape_ranges": own})
    list(analyze(moved_plan, ["landscape-ranges"], settings))
    assert next(analyze(moved_plan, ["landscape-ranges"], settings, dry_run=True)).startswith("landscape-ranges: done")
    data = moved_plan.config.data
    other = data.model_copy(update={"flip": not data.flip})
    flipped = replace(moved_plan, config=moved_plan.config.model_copy(update={"data": other}))
    assert not any("done" in line for line in analyze(flipped, ["landscape-ranges"], settings, dry_run=True))


@pytest.mark.parametrize("far", [math.nan, math.inf])
def test_losses_that_overflow_far_away_leave_a_figure(
    far: float, moved_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Plane.losses

    def losses(self: Plane, a: float, b: float) -> Tensor:
        found = whole(self, a, b)
        return torch.full_like(found, far) if a > 0 and b > 0 else found

    monkeypatch.setattr(Plane, "losses", losses)
    own = {"num_images": 8, "num_points": 3}
    settings = Analyze.model_validate(
        {"batch_size": 8, "landscape_task_vectors": own, "landscape_ranges": own | {"num_gradient_images": 8}}
    )
    names = {"landscape-task-vectors": landscape_task_vectors.NEEDS, "landscape-ranges": landscape_ranges.NEEDS}
    subject = held(moved_plan, settings, names)
    for module in (landscape_task_vectors, landscape_ranges):
        finding = _result(module.compute(subject))
        for figure in module.draw(finding).values():
            plt.close(figure)


def test_a_pair_that_is_none_is_refused(moved_plan: Plan) -> None:
    settings = Analyze.model_validate({"landscape_task_vectors": {"num_images": 8, "pairs": [[0, 2]]}})
    with pytest.raises(ValueError, match=r"pairs has \[0, 2\], expected two of experts 0 to 1"):
        next(analyze(moved_plan, ["landscape-task-vectors"], settings, dry_run=True))


def test_numbers_of_a_grid_are_those_of_the_axis(moved_plan: Plan) -> None:
    own = {"num_images": 8, "num_points": 3, "low": 0.0, "high": 1.0}
    settings = Analyze.model_validate({"batch_size": 8, "landscape_task_vectors": own})
    needs = {"landscape-task-vectors": landscape_task_vectors.NEEDS}
    finding = _result(landscape_task_vectors.compute(held(moved_plan, settings, needs)))
    assert [(row["w_first"], row["w_second"]) for row in finding.rows] == [
        (a / 2, b / 2) for a in range(3) for b in range(3)
    ]
    for row in finding.rows:
        assert row["loss"] == pytest.approx((row["loss_0"] + row["loss_1"]) / 2)
    (plane,) = finding.summary["planes"]
    assert plane["base_losses"]["loss"] == pytest.approx(finding.rows[0]["loss"])


def test_a_direction_is_as_long_as_the_weights_in_every_filter() -> None:
    draws = torch.Generator().manual_seed(0)
    weights = {
        "conv.weight": torch.randn(3, 2, 3, 3, generator=draws),
        "conv.bias": torch.ones(3),
        "n": torch.tensor(1),
    }
    weights["conv.weight"][1] = 0
    first, second = (filter_normalised(weights, 0, name) for name in ("first", "second"))
    assert first.keys() == {"conv.weight"}
    for direction in (first, second):
        lengths = direction["conv.weight"].flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, weights["conv.weight"].flatten(1).norm(dim=1))
    assert not torch.equal(first["conv.weight"], second["conv.weight"])


def test_gradients_on_ranges_add_up_to_that_over_all_timesteps() -> None:
    """Of a constant the gradient is the error of its mean: over all timesteps the mean of those on the ranges."""
    subject = subject_of(VELOCITY)
    own = {"num_images": 6, "num_gradient_images": 6, "num_points": 3}
    finding = _result(
        landscape_ranges.compute(replace(subject, settings=Analyze.model_validate({"landscape_ranges": own})))
    )
    images = fixed_images(subject, 6)

    def gradient(own: TimestepRange, part: slice) -> Tensor:
        x0, noise = images.x0[part].double(), images.noise[part].double()
        t = subject.base.process.spread(own, 3)
        return (START.double() - subject.base.process.target(x0, noise, t).flatten(1).mean(0)) / 2

    parts = slice(0, 3), slice(3, 6)
    a, b = (torch.stack([gradient(own, part) for own in subject.ranges]) for part in parts)
    found = finding.summary["gradients"]
    for name, (first, second) in {"0": (a[0], b[0]), "1": (a[1], b[1]), "all": (a.mean(0), b.mean(0))}.items():
        assert found[name]["norm"] == pytest.approx(float(((first + second) / 2).norm()), rel=1e-4)
        assert found[name]["norm_without_noise"] == pytest.approx(max(float(first @ second), 0) ** 0.5, rel=1e-4)
    ends = {row["a"] for row in finding.rows}
    assert ends == {-0.1, 0.0, 0.1}
    middle = next(row for row in finding.rows if row["a"] == row["b"] == 0)
    assert middle["loss"] == pytest.approx(finding.summary["centre"]["loss"])
