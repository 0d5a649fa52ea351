"""What runs of a study share is told by all that it is made from; which of their numbers count, and what is counted."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from decouple_merge.config import Config
from decouple_merge.evaluation.records import with_value
from decouple_merge.experiment import sharing, study, study_plan
from decouple_merge.experiment.plan import check, prepare
from decouple_merge.experiment.planned import BASELINE, Plan
from decouple_merge.experiment.results import wanted_records
from decouple_merge.experiment.sharing import drawing_key, training_key
from decouple_merge.experiment.study_results import current_records
from decouple_merge.experiment.trainings import trainings
from decouple_merge.models.families.wan import save_wan
from decouple_merge.storage.files import write_records
from decouple_merge.storage.locks import hold
from decouple_merge.storage.run_folder import Run
from decouple_merge.storage.study_folder import StudyFolder
from decouple_merge.training.made_from import is_finished

MakeConfig = Callable[..., Config]


@pytest.fixture
def given_plan(text_config: MakeConfig, tmp_path: Path) -> Plan:
    """A run whose experts are the base's own denoisers."""
    config = text_config(
        base=str(save_wan(tmp_path / "wan")),
        finetune={"experts": "denoisers"},
        sample={"sampler": "FlowMatchEulerDiscrete", "num_steps": 4},
    )
    return prepare(config, tmp_path / "study" / "arm-0")


def test_a_study_takes_a_bases_own_denoisers_and_trains_nothing(
    given_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trainings(given_plan) == []
    folder = StudyFolder(tmp_path / "study")
    (piece,) = study.pieces({("arm", 0): given_plan}, folder)
    monkeypatch.setattr(study, "search_weights", lambda plan: iter(["searching"]))
    assert "searching" in study._events(piece, given_plan, folder)
    assert [is_finished(given_plan.run.expert(i)) for i in range(2)] == [True, True]


def keys(plan: Plan) -> list[str | None]:
    """The keys of the first expert, the baseline, and what is drawn by base, baseline and ensemble."""
    of = {task.name: training_key(plan, task, settings) for task, settings, _ in trainings(plan)}
    return [of["expert-0"], of[BASELINE], *(drawing_key(plan, m) for m in ("pretrained", BASELINE, "ensemble"))]


def test_what_another_scheduler_trains_and_draws_is_not_shared(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config()
    before = keys(check(config, tmp_path / "run"))
    assert keys(check(config, tmp_path / "run")) == before
    path = Path(config.base) / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    after = keys(check(config, tmp_path / "run"))
    assert [a == b for a, b in zip(before, after, strict=True)] == [False] * 5


WATCHED = {"metric": "kd_effnetlite0", "num_images": 4, "num_steps": 2, "every": 3}


@pytest.mark.parametrize(
    ("section", "changes", "watched", "is_shared"),
    [
        ("finetune", {"tracker": "tensorboard"}, False, True),
        ("finetune", {"global_prob": 0.5}, False, False),
        ("sample", {"num_steps": 2}, False, True),
        ("sample", {"precision": "bf16"}, True, False),
        ("evaluate", {"num_reference_images": 20}, True, False),
    ],
)
def test_a_training_is_shared_unless_its_weights_or_its_log_differ(
    section: str, changes: dict[str, Any], watched: bool, is_shared: bool, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    distance = {"distance": WATCHED} if watched else {}
    found = [
        keys(check(tiny_config(**{"finetune": distance} | more), tmp_path / "run"))[0]
        for more in ({}, {section: (distance if section == "finetune" else {}) | changes})
    ]
    assert (found[0] == found[1]) is is_shared


def test_images_of_the_report_are_counted_with_its_own_steps(tiny_config: MakeConfig, tmp_path: Path) -> None:
    evaluate = {"num_steps": 2, "num_seed_sets": 3}
    config = tiny_config(search={"over": "nothing"}, finetune={"baseline": False}, evaluate=evaluate)
    work, _ = study_plan.count_work({("arm", 0): check(config, tmp_path / "run")}, StudyFolder(tmp_path / "study"))
    assert (work.drawn, work.steps) == (30, 60)


def test_numbers_of_an_older_model_are_not_in_the_tables(tiny_config: MakeConfig, tmp_path: Path) -> None:
    plan = check(tiny_config(), tmp_path / "run")
    now = [with_value(record, 1.0) for record in wanted_records(plan, ["pretrained"])]
    others = [
        {**now[0], "model_sha256": "0" * 64, "value": 9.0},
        {**now[0], "reference": "images.npz:0123456789abcdef:48", "value": 9.0},
        # Of a model that is gone.
        {**now[0], "model": "merged", "value": 9.0},
    ]
    write_records(plan.run.metrics, [*now, *others])
    assert current_records(plan) == now
    assert current_records(dataclasses.replace(plan, run=Run(tmp_path / "empty"))) == []


def test_what_another_run_scores_just_now_is_asked_for_last(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder, scored = check(tiny_config(), tmp_path / "run"), StudyFolder(tmp_path / "study"), list[str]()

    def evaluate(plan: Plan, wanted: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        scored.append(wanted[0]["model"])
        yield from wanted

    monkeypatch.setattr(sharing, "evaluate_models", evaluate)
    monkeypatch.setattr(sharing, "wanted_records", lambda plan, models: [{"model": model} for model in models])
    monkeypatch.setattr(sharing, "drawing_key", lambda plan, model: None if model == "merged" else f"key of {model}")
    list(sharing.evaluate_shared(plan, folder))
    with hold(folder.lock("key of pretrained"), "another"):
        list(sharing.evaluate_shared(plan, folder))
    assert scored == ["pretrained", BASELINE, "ensemble", BASELINE, "ensemble", "pretrained"]
