"""Several processes on one study: they lose nothing, repeat nothing, and find what one process finds."""

import multiprocessing
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from decouple_merge.config import Config
from decouple_merge.searching import study as study_module
from decouple_merge.searching.levels import levels, search, work
from decouple_merge.searching.strategies import Weights
from decouple_merge.searching.study import Study, open_storage, open_study, trials
from decouple_merge.searching.trial import Level, Score, Trial

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


def open_levels(url: str) -> Any:
    storage = open_storage(url)
    return lambda name: open_study(storage, name)


def work_in_a_process(url: str, objective: Slow, grace_seconds: float) -> None:
    study_module.HEARTBEAT_SECONDS, study_module.GRACE_SECONDS = grace_seconds / 5, grace_seconds
    (objective.folder / f"{os.getpid()}.ready").touch()
    for _ in work(open_levels(url), CONFIG, 2, objective):
        pass


@pytest.fixture
def start_workers() -> Iterator[Any]:
    running = []

    def start(num: int, url: str, objective: Slow, grace_seconds: float = 30.0) -> list[Any]:
        open_levels(url)("screen")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["decouple_merge.searching.levels"])
        for _ in range(num):
            process = context.Process(target=work_in_a_process, args=(url, objective, grace_seconds))
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


def check_four_workers(url: str, folder: Path, alone: list[Trial], start_workers: Any) -> None:
    objective = Slow(folder)
    workers = start_workers(3, url, objective)
    found = list(search(open_levels(url), CONFIG, 2, objective))
    assert plain(found) == plain(alone)
    assert len(objective.asked()) == len(set(objective.asked())) == len(alone)
    assert len({t.worker for t in found}) > 1
    assert {t.worker for t in found} >= {"main"}
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0


def test_four_processes_on_one_file_find_what_one_finds(tmp_path: Path, alone: list[Trial], start_workers: Any) -> None:
    check_four_workers(f"sqlite:///{tmp_path / 'study.db'}", tmp_path, alone, start_workers)


def search_in_a_process(url: str, objective: Slow) -> None:
    for _ in search(open_levels(url), CONFIG, 2, objective):
        pass


def test_a_search_killed_at_ten_random_moments_ends_with_the_same_trials(tmp_path: Path, alone: list[Trial]) -> None:
    url, moments = f"sqlite:///{tmp_path / 'study.db'}", random.Random(2)
    open_levels(url)("screen")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["decouple_merge.searching.levels"])
    for kill in range(10):
        process = context.Process(target=search_in_a_process, args=(url, Slow(tmp_path)))
        process.start()
        # Not before it evaluates: starting takes as long as the machine is busy.
        while not (tmp_path / f"{process.pid}.txt").exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))
        assert process.is_alive(), f"finished before kill {kill}"
        process.kill()
        process.join()
    list(search(open_levels(url), CONFIG, 2, Slow(tmp_path)))
    found = [t for level in levels(CONFIG, 2) for t in trials(open_levels(url)(level.name))]
    assert plain(found) == plain(alone)


def test_a_killed_workers_candidate_is_taken_over(
    tmp_path: Path, alone: list[Trial], start_workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(study_module, "GRACE_SECONDS", 1.0)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    (worker,) = start_workers(1, url, Slow(tmp_path, first_seconds=60.0), 1.0)

    def kill_when_it_has_a_candidate() -> None:
        while not (tmp_path / f"{worker.pid}.txt").exists():
            time.sleep(0.01)
        os.kill(worker.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_it_has_a_candidate)
    killer.start()
    found = list(search(open_levels(url), CONFIG, 2, Slow(tmp_path)))
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
    url = f"sqlite:///{tmp_path / 'study.db'}"
    start_workers(1, url, Slow(tmp_path, first_seconds=5.0), 2.0)
    found = list(search(open_levels(url), CONFIG, 2, Slow(tmp_path)))
    assert plain(found) == plain(alone)
    assert len(Slow(tmp_path).asked()) == len(alone)
    assert len({t.worker for t in found}) == 2


# -- a real PostgreSQL server, where its programs are installed
def postgres_programs() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "pg_ctl").exists()), None)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    # The server refuses to run as root.
    owner = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    if owner not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip("running as root, and there is no user postgres to run the server")
    folder = Path(tempfile.gettempdir()) / f"deme-postgres-{os.getpid()}"
    folder.mkdir(mode=0o700)
    shutil.chown(folder, owner)

    def command(program: str, *arguments: str) -> None:
        line = [str(programs / program), *arguments]
        subprocess.run(line, check=True, capture_output=True, user=owner, cwd=folder)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        command("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "deme", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        command("pg_ctl", "-D", str(folder / "data"), "-w", "-l", str(folder / "log"), "-o", options, "start")
        yield f"postgresql+psycopg2://deme@127.0.0.1:{port}/postgres"
        command("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_four_processes_on_a_postgresql_server_find_what_one_finds(
    postgres: str, tmp_path: Path, alone: list[Trial], start_workers: Any
) -> None:
    check_four_workers(postgres, tmp_path, alone, start_workers)
    assert plain(trials(open_levels(postgres)("screen"))) == plain([t for t in alone if t.level == "screen"])


def test_a_storage_that_does_not_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"search.storage is 'postgresql\+psycopg2://deme@127.0.0.1:1/x', which"):
        open_storage("postgresql+psycopg2://deme@127.0.0.1:1/x")
