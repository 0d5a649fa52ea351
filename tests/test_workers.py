"""Several processes on one study: they lose nothing, repeat nothing, and find what one process finds."""

import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from decouple_merge.config import Config
from decouple_merge.searching import study as study_module
from decouple_merge.searching.levels import levels, search
from decouple_merge.searching.strategies import Weights
from decouple_merge.searching.study import Study, beating, open_storage, open_study, trials
from decouple_merge.searching.trial import Level, Score, Trial
from decouple_merge.searching.worker import work

SETTINGS = {
    "strategy": "evolution",
    "num_trials": 25,
    "num_images": 5,
    "num_finalists": 2,
    "num_final_images": 20,
}
CONFIG = Config.model_validate({"seed": 1, "search": SETTINGS})


class Slow:
    """An objective that takes a moment, the first time longer, and notes in a folder what it was asked."""

    def __init__(self, folder: Path, seconds: float = 0.05, first_seconds: float = 0.05) -> None:
        self.folder, self.seconds, self.first_seconds = folder, seconds, first_seconds

    def __call__(self, weights: Weights, level: Level) -> Score:
        with (self.folder / f"{os.getpid()}.txt").open("a") as file:
            file.write(f"{level.name} {weights}\n")
        time.sleep(self.first_seconds)
        self.first_seconds = self.seconds
        return Score(sum((w - 0.8) ** 2 for w in weights) + len(level.seeds) / 1000, "")

    def asked(self) -> list[str]:
        return [line for file in self.folder.glob("*.txt") for line in file.read_text().splitlines()]


def open_levels(path: Path) -> Any:
    storage = open_storage(path)
    return lambda name: open_study(storage, name)


def work_in_a_process(path: Path, objective: Slow, grace_seconds: float) -> None:
    study_module.HEARTBEAT_SECONDS, study_module.GRACE_SECONDS = grace_seconds / 5, grace_seconds
    (objective.folder / f"{os.getpid()}.ready").touch()
    for _ in work(open_levels(path), CONFIG, 2, objective):
        pass


@pytest.fixture
def start_workers() -> Iterator[Any]:
    running = []

    def start(num: int, path: Path, objective: Slow, grace_seconds: float = 30.0) -> list[Any]:
        open_levels(path)("screen")
        context = multiprocessing.get_context("fork")
        for _ in range(num):
            process = context.Process(target=work_in_a_process, args=(path, objective, grace_seconds))
            process.start()
            running.append(process)
        while len(list(objective.folder.glob("*.ready"))) < num:
            time.sleep(0.05)
        return running

    yield start
    for process in running:
        process.kill()
        process.join()


def plain(found: list[Trial]) -> list[tuple[str, int, Weights, float]]:
    return sorted((t.level, t.number, t.weights, t.value) for t in found)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    studies: dict[str, Study] = {}
    objective = Slow(tmp_path_factory.mktemp("alone"), seconds=0.0)
    return list(search(lambda name: studies.setdefault(name, open_study(None, name)), CONFIG, 2, objective))


def check_four_workers(path: Path, folder: Path, alone: list[Trial], start_workers: Any) -> None:
    objective = Slow(folder)
    workers = start_workers(3, path, objective)
    found = list(search(open_levels(path), CONFIG, 2, objective))
    assert plain(found) == plain(alone)
    assert len(objective.asked()) == len(set(objective.asked())) == len(alone)
    assert len({t.worker for t in found}) > 1
    assert {t.worker for t in found} >= {"main"}
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0


def test_four_processes_on_one_file_find_what_one_finds(tmp_path: Path, alone: list[Trial], start_workers: Any) -> None:
    check_four_workers(tmp_path / "study.jsonl", tmp_path, alone, start_workers)


def search_in_a_process(path: Path, objective: Slow) -> None:
    for _ in search(open_levels(path), CONFIG, 2, objective):
        pass


def test_a_search_killed_at_ten_random_moments_ends_with_the_same_trials(tmp_path: Path, alone: list[Trial]) -> None:
    path, moments = tmp_path / "study.jsonl", random.Random(2)
    open_levels(path)("screen")
    context = multiprocessing.get_context("fork")
    for kill in range(10):
        process = context.Process(target=search_in_a_process, args=(path, Slow(tmp_path)))
        process.start()
        # Not before it evaluates: starting takes as long as the machine is busy.
        while not (tmp_path / f"{process.pid}.txt").exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))
        assert process.is_alive(), f"finished before kill {kill}"
        process.kill()
        process.join()
    list(search(open_levels(path), CONFIG, 2, Slow(tmp_path)))
    found = [t for level in levels(CONFIG, 2) for t in trials(open_levels(path)(level.name))]
    assert plain(found) == plain(alone)


def test_a_killed_workers_candidate_is_taken_over(
    tmp_path: Path, alone: list[Trial], start_workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(study_module, "GRACE_SECONDS", 1.0)
    path = tmp_path / "study.jsonl"
    (worker,) = start_workers(1, path, Slow(tmp_path, first_seconds=60.0), 1.0)

    def kill_when_it_has_a_candidate() -> None:
        while not (tmp_path / f"{worker.pid}.txt").exists():
            time.sleep(0.01)
        os.kill(worker.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_it_has_a_candidate)
    killer.start()
    found = list(search(open_levels(path), CONFIG, 2, Slow(tmp_path)))
    killer.join()
    stolen = (tmp_path / f"{worker.pid}.txt").read_text().splitlines()
    assert len(stolen) == 1
    assert plain(found) == plain(alone)
    assert Slow(tmp_path).asked().count(stolen[0]) == 2
    assert {t.worker for t in found} == {"main"}


def test_a_slow_worker_that_is_alive_keeps_its_candidate(
    tmp_path: Path, alone: list[Trial], start_workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "GRACE_SECONDS", 2.0)
    path = tmp_path / "study.jsonl"
    start_workers(1, path, Slow(tmp_path, first_seconds=5.0), 2.0)
    found = list(search(open_levels(path), CONFIG, 2, Slow(tmp_path)))
    assert plain(found) == plain(alone)
    assert len(Slow(tmp_path).asked()) == len(alone)
    assert len({t.worker for t in found}) == 2


def test_a_sign_of_life_that_could_not_be_written_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "HEARTBEAT_SECONDS", 0.01)
    counts, again = list[int](), threading.Event()

    def beat(count: int) -> None:
        counts.append(count)
        if count == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        again.set()

    with beating(beat):
        assert again.wait(20)
    assert counts[:2] == [1, 2]
