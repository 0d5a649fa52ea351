"""What an analysis is given of a run, and what its finding is said to depend on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decouple_merge.config import Config, dump_config
from decouple_merge.errors import UserError
from decouple_merge.experiment import subjects
from decouple_merge.experiment.plan import check
from decouple_merge.experiment.planned import Plan
from decouple_merge.experiment.subjects import HELD, Drawing, results_of, subject_of
from decouple_merge.experiment.table_models import denoiser_of
from decouple_merge.sampling.sampler import sample_images
from decouple_merge.storage.files import write_records

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture
def make_plan(tiny_config: MakeConfig, tmp_path: Path) -> Callable[..., Plan]:
    """Make a plan of a run that has no models but its base."""

    def make(**sections: Any) -> Plan:
        values = {"search": {"over": "nothing"}, "finetune": {"baseline": False}, **sections}
        return check(tiny_config(**values), tmp_path / "run")

    return make


def test_analyses_draw_as_the_report_does(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(evaluate={"num_steps": 5})
    found, model = Drawing(plan), denoiser_of(plan, "pretrained", CPU)
    (as_reported,), (as_searched,) = (
        list(sample_images(model, plan.base, [3, 4], settings, CPU))
        for settings in (plan.config.report_sample, plan.config.sample)
    )
    assert torch.equal(found("pretrained", [3, 4]), as_reported)
    assert not torch.equal(as_reported, as_searched)
    assert found.calls_per_image == 5


def test_drawn_images_depend_on_seeds_models_and_how_they_are_drawn(make_plan: Callable[..., Plan]) -> None:
    def of(plan: Plan) -> dict[str, Any]:
        # Of the base alone: what else the analysis needs is hashed for all.
        return subject_of(plan, plan.config.analyze, {"qualitative": ("models",)}).hashes["qualitative"]

    plan = make_plan()
    before = of(plan)
    assert of(plan) == before
    for changes in ({"first_seed": 7}, {"num_steps": 2}, {"sampler": "DDPM"}):
        assert of(make_plan(evaluate=changes)) != before
    assert of(dataclasses.replace(plan, base=dataclasses.replace(plan.base, sha256="other"))) != before


def test_images_of_a_bases_own_denoisers_have_no_pretrained_model_to_compare_with(
    make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    assert HELD["models"](plan, ())
    monkeypatch.setattr(subjects, "is_made", lambda plan, model: True)
    monkeypatch.setattr(subjects, "report_models", lambda plan: ["ensemble", "merged"])
    assert not HELD["models"](plan, ())


def test_the_numbers_of_compared_runs_are_of_the_models_as_they_are_now(
    tmp_path: Path, tiny_config: MakeConfig
) -> None:
    def write(name: str, *records: dict[str, Any]) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(tiny_config()))
        write_records(folder / "metrics.jsonl", records)
        return folder

    def record(value: float, **changes: Any) -> dict[str, Any]:
        own = {"model": "merged", "model_sha256": "b", "metric": "fd_effnetlite0", "value": value, "seeds": [0, 9]}
        return own | {"num_images": 10, "reference": "here:0123456789abcdef:9", "decoding": 2} | changes

    older, other = record(100.0, model_sha256="a"), record(50.0, num_images=20)
    first = write("a/run", older, other, record(10.0))
    second = write("b/run", record(12.0, reference="there:0123456789abcdef:9"))
    found = results_of([first, second], "fd_effnetlite0")
    assert [[r["value"] for r in run.records] for run in found] == [[10.0], [12.0]]
    for changes in ({"num_images": 20}, {"decoding": 1}, {"reference": "here:fedcba9876543210:9"}):
        write("b/run", record(12.0, **changes))
        with pytest.raises(
            UserError, match=f"a/run, .*b/run: records of fd_effnetlite0 differ in {next(iter(changes))}"
        ):
            results_of([first, second], "fd_effnetlite0")
