"""How far a run is, as a terminal, a pipe and ``deme status`` say it."""

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from decouple_merge.cli import console as cli_console
from decouple_merge.cli import live
from decouple_merge.cli.main import app
from decouple_merge.cli.progress import show, training_line
from decouple_merge.config import Config
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.results import Row
from decouple_merge.reporting.job import Job
from decouple_merge.searching.trial import Trial
from decouple_merge.storage.files import write_json, write_records
from decouple_merge.storage.locks import hold
from decouple_merge.storage.run_folder import Run
from decouple_merge.training.records import StepRecord

# Two experts of 100 updates, a baseline of 200, two processes; 8 images an update.
WORK: dict[str, Any] = {
    "num_at_once": 2,
    "passes_per_step": 1,
    "ranges": [[0, 20], [20, 40]],
    "trainings": [
        {"name": n, "folder": f"at/{n}", "own": own, "num_updates": u, "num_images": 8, "num_passes": p}
        for n, own, u, p in (
            ("baseline-finetuned", [0, 40], 200, 3),
            ("expert-0", [0, 20], 100, 4),
            ("expert-1", [20, 40], 100, 4),
        )
    ],
    "levels": [
        {"name": "screen", "num_candidates": 10, "num_images": 6, "num_steps": 5},
        {"name": "final", "num_candidates": 2, "num_images": 30, "num_steps": 5},
    ],
    "search_metric": "fd",
    "models": ["pretrained", "merged"],
    "metrics": ["fd", "kd"],
    "compared": {metric: {"num_steps": 5, "reference": "0123:48"} for metric in ("fd", "kd")},
    "sets": [[0, 29], [30, 59]],
    "num_steps": 5,
}


def step(name: str, update: int, num_updates: int, speed: float, **more: Any) -> dict[str, Any]:
    record = StepRecord(name, update, num_updates, 0.1, 0.0, 1e-4, speed, 1.0, device="cpu", memory_bytes=2 * 10**9)
    return asdict(record) | more


def trial(number: int, value: float, level: str = "screen", **more: Any) -> dict[str, Any]:
    found = Trial(level, number, (0.5, 0.5), value, "", 3.0, "main", f"2026-01-01T00:00:{3 * number:02}")
    return asdict(found) | more


def number(model: str, metric: str, first: int, value: float, sha256: str = "a", **more: Any) -> dict[str, Any]:
    found = {"model": model, "metric": metric, "seeds": [first, first + 29], "value": value, "model_sha256": sha256}
    return found | {"num_steps": 5, "reference": "images:0123:48"} | more


def test_of_a_job_that_nothing_is_measured_of_no_time_is_known() -> None:
    job = Job(WORK)
    assert [s.seconds_left for s in job.stages()] == [None, None, None]
    assert job.seconds_left() is None


def test_the_time_left_is_that_of_the_trainings_on_their_processes_and_of_what_comes_after_them() -> None:
    job = Job(WORK)
    # 240 passes a second: 80 images of the baseline, 60 of an expert, whose teacher looks at them too.
    job.add_step(step("baseline-finetuned", 50, 200, 80.0))
    job.add_step(step("expert-0", 50, 100, 60.0))
    finetune, search, evaluate = job.stages()
    # The baseline takes 150 * 8 / 80 = 15 s; expert 0, 50 * 8 / 60 = 6.7 s, and expert 1 after it 13.3 s: 20 s.
    assert finetune.seconds_left == pytest.approx(20)
    # 10 * 6 * 5 + 2 * 30 * 5 passes in two processes, then 4 sets of 30 * 5.
    assert search.seconds_left == pytest.approx(600 / 240 / 2)
    assert evaluate.seconds_left == pytest.approx(600 / 240 / 2)
    assert job.seconds_left() == pytest.approx(22.5)


def test_candidates_are_measured_by_candidates_once_there_are_some() -> None:
    job = Job(WORK | {"trainings": []})
    for index in range(4):
        job.add_trial(trial(index, 10.0 - index))
    # 30 passes in 3 s: of the screen 6 candidates of 3 s are left, of the finalists 2 of 15 s, in two processes.
    assert [s.seconds_left for s in job.stages()] == pytest.approx([24, 30])
    # A third worker finished one meanwhile; another has been silent for long.
    job.add_trial(trial(4, 9.0, worker="host-7"))
    job.add_trial(trial(5, 9.0, worker="host-8"))
    job.add_trial(trial(0, 10.0, worker="host-9"))
    assert job.stages()[0].seconds_left == pytest.approx((4 * 3 + 30) / 3)


def test_a_level_that_ended_early_waits_for_no_more() -> None:
    job = Job(WORK | {"trainings": []})
    for index in range(4):
        job.add_trial(trial(index, 10.0))
    job.add_trial(trial(0, 9.0, "final", seconds=15.0))
    search = job.stages()[0]
    assert (search.num_done, search.num_total, search.seconds_left) == (5, 6, pytest.approx(15 / 2))


def test_numbers_of_a_model_that_is_no_more_do_not_count() -> None:
    job = Job(WORK)
    for first in (0, 30):
        job.add_number(number("pretrained", "fd", first, 8.0 + first))
        job.add_number(number("merged", "fd", first, 9.0))
    job.add_number(number("merged", "fd", 0, 4.0, "b"))
    job.add_number(number("merged", "fd", 700, 1.0, "b"))
    # Drawn with other steps, or compared with other images.
    job.add_number(number("pretrained", "fd", 0, 1.0, num_steps=20))
    job.add_number(number("pretrained", "fd", 0, 1.0, reference="images:4567:48"))
    assert job.means() == {"pretrained": {"fd": 23.0}, "merged": {"fd": 4.0}}
    # One of two metrics is no set yet.
    assert job.stages()[2].num_done == 0


@pytest.fixture
def halfway(tiny_config: Callable[..., Config], tmp_path: Path) -> Run:
    """A run folder as another process leaves it in the middle of its trainings, one of which is done."""
    run = prepare(tiny_config(), tmp_path / "run").run
    write_records(
        run.expert(0) / "log.jsonl",
        [
            {"update": 3, "loss": 0.5, "consistency_loss": 0.0, "validation": [0.25, 0.375], "distance": 7.0},
            {"update": 6, "loss": 0.5, "consistency_loss": 0.0, "validation": [0.125, 0.5], "distance": 8.0},
        ],
    )
    (run.expert(0) / "model.safetensors").touch()
    write_json(run.progress("expert-0"), step("expert-0", 6, 6, 80.0))
    write_json(run.progress("expert-1"), step("expert-1", 4, 6, 40.0))
    return run


def told(folder: Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["status", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_a_run_of_others_is_told_from_its_folder(halfway: Run) -> None:
    with hold(halfway.lock("expert-1"), "deme finetune"):
        found = told(halfway.folder)
        text = CliRunner().invoke(app, ["status", str(halfway.folder)]).output
    assert (found["state"], list(found["holders"])) == ("running", ["expert-1"])
    baseline, first, second = found["trainings"]
    assert (first["is_finished"], first["validation"], first["distances"]) == (True, [0.125, 0.5], {"3": 7.0, "6": 8.0})
    assert (second["is_finished"], second["update"], second["last"]["device"]) == (False, 4, "cpu")
    assert (baseline["update"], baseline["num_updates"]) == (0, 12)
    assert found["stages"][0]["num_done"] == 10
    # 2 updates of 4 images at 40 a second, and the baseline's 12, which have no teacher, by the speed of both experts.
    mean = (1 / (80 * 4) + 1 / (40 * 4)) / 2
    assert found["stages"][0]["seconds_left"] == pytest.approx(12 * 4 * 3 * mean + 8 / 40)
    assert re.search(r"^  deme finetune, process \d+ on .*, expert-1$", text, re.MULTILINE)
    assert {"4/6", "2.00", "0.1250", "8"} <= set(text.split())
    assert told(halfway.folder)["state"] == "stopped"


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    job = Job(WORK)
    for name, update in (("baseline-finetuned", 1), ("expert-0", 2), ("expert-1", 3)):
        job.add_step(step(name, update, 100_000, 80.0, validation=[0.1, 0.2], distance=1234.5678))
    job.add_trial(trial(0, 0.123456789))
    job.add_number(number("merged", "fd", 0, 834.04))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(live.tables(job, console))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


def test_a_pipe_has_lines_with_the_time_left_of_the_whole_job(halfway: Run, capsys: pytest.CaptureFixture[str]) -> None:
    event = StepRecord("expert-1", 5, 6, 0.1, 0.0, 1e-4, 40.0, 61.0, own_range=1, validation=[0.25, 0.5])
    show([event, "a line"], Console(file=sys.stdout, width=200), halfway.folder)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("expert-1 5/6: loss 0.1000  40 images/s  1:01 left  whole job about ")
    assert first.endswith("validation own 0.50000 others 0.25000")
    assert second == "a line"


def test_a_terminal_has_one_live_table(halfway: Run) -> None:
    event = StepRecord("expert-1", 5, 6, 0.1, 0.0, 1e-4, 40.0, 61.0, own_range=1, validation=[0.25, 0.5])
    console = Console(file=io.StringIO(), width=120, force_terminal=True, record=True)
    show([event], console, halfway.folder)
    text = console.export_text()
    assert text.count("training ") == 1
    assert "5/6" in text
    assert "expert-1 5/6: loss" not in text


def test_trainings_alone_are_no_whole_job() -> None:
    job, console = Job({}), Console(width=100, record=True, file=io.StringIO())
    job.add_step(step("a-4/expert-0", 100, 100, 80.0))
    console.print(live.tables(job, console))
    text = console.export_text()
    assert "a-4/expert-0" in text
    assert "whole job" not in text
    assert job.seconds_left() == 0
    assert Job({}).seconds_left() is None


def test_a_pretraining_that_has_not_counted_its_work_is_told_of(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.config.touch()
    with hold(run.lock("run"), "deme pretrain"):
        found = told(run.folder)
    assert (found["state"], found["stages"], found["seconds_left"]) == ("running", [], None)


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert str(result.exception) == (
        f"{tmp_path} has no config.yaml, expected a run folder: give the folder that deme run wrote"
    )


def test_a_look_imports_nothing_heavy() -> None:
    """It answers at once, beside a run that has the machine to itself."""
    import subprocess

    code = "import sys; import decouple_merge.reporting.status, decouple_merge.cli.live; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "optuna", "diffusers", "pydantic"} & set(modules)


def test_brackets_are_printed_as_they_are() -> None:
    """Paths and patterns have them."""
    for text in ("runs/fashion[seed=1]/merged", "down_blocks.[/a]", ":warning:"):
        with cli_console.console.capture() as printed:
            cli_console.console.print(text)
        assert printed.get() == f"{text}\n"


def test_the_time_left_has_sixty_seconds_a_minute() -> None:
    record = StepRecord("expert-1", 5, 6, 0.1, 0.0, 1e-4, 40.0, 119.7)
    assert training_line(record).endswith("2:00 left")


def test_numbers_below_0_have_no_ratio() -> None:
    job, console = Job(WORK), Console(width=120, record=True, file=io.StringIO())
    for model, value in (("pretrained", -0.001), ("merged", 0.002)):
        job.add_number(number(model, "kd", 0, value))
    console.print(live.tables(job, console))
    assert "-2.000" not in console.export_text()
    rows = [Row("pretrained", 1, "kd_effnetlite0", [-0.001]), Row("merged", 1, "kd_effnetlite0", [0.002])]
    console.print(cli_console.result_table(rows))
    text = console.export_text()
    assert "0.002" in text
    assert "-2.000" not in text
