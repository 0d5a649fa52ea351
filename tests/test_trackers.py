"""Curves of a training where each tracker shows them."""

import json
from pathlib import Path

import pytest

from decouple_merge.config import Training
from decouple_merge.training.trackers import TRACKERS, open_tracker

LOGGED = [(250, {"loss": 0.5, "validation_loss/0-250": 0.25}), (500, {"loss": 0.25, "validation_loss/0-250": 0.125})]


def track(name: str, folder: Path) -> None:
    tracker = open_tracker(Training(tracker=name), "expert-0", folder)
    for update, values in LOGGED:
        tracker.log(values, update)
    tracker.close()


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track("tensorboard", tmp_path)
    shown = accumulators.EventAccumulator(str(tmp_path))
    shown.Reload()
    found = {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]}
    assert found == {name: [(update, values[name]) for update, values in LOGGED] for name in LOGGED[0][1]}


def test_mlflow_gets_a_run_for_each_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.py").write_text(
        "import json, pathlib\n"
        "told = []\n"
        "def set_experiment(name): told.append(name)\n"
        "def start_run(run_name): told.append(run_name)\n"
        "def log_metrics(metrics, step): told.append([step, metrics])\n"
        f"def end_run(): pathlib.Path({str(tmp_path / 'told.json')!r}).write_text(json.dumps(told))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    track("mlflow", tmp_path)
    logged = [[update, values] for update, values in LOGGED]
    assert json.loads((tmp_path / "told.json").read_text()) == ["decouple-merge", "expert-0", *logged]


def test_every_tracker_of_the_config_is_there() -> None:
    for name in TRACKERS:
        assert Training(tracker=name).tracker == name
