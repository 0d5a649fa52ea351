"""Work in one process or several: results, errors, and no process left behind."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from decouple_merge import executors
from decouple_merge.errors import UserError
from decouple_merge.executors import local
from decouple_merge.executors.local import in_order, run_all, shares


def count_up(first: int, num: int) -> Iterator[tuple[int, int]]:
    for i in range(num):
        yield first + i, os.getpid()


def fail(message: str) -> Iterator[int]:
    yield 1
    raise ValueError(message)


def die() -> Iterator[int]:
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


class UnpicklableError(Exception):
    """Can be pickled, but not read again: it wants two arguments, and keeps one."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_unpicklably() -> Iterator[int]:
    yield 1
    raise UnpicklableError(1, 2)


def fail_as_the_user(message: str) -> Iterator[int]:
    yield 1
    raise UserError(message)


def leave(status: int) -> Iterator[int]:
    yield 1
    os._exit(status)


def die_with_a_child_that_stays(folder: Path) -> Iterator[int]:
    """Die while a process of one's own, as a data loader's, holds the pipe open."""
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    (folder / str(child.pid)).touch()
    yield 1
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)


def say_all_and_hang() -> Iterator[int]:
    """Leave a thread that keeps the process from ending."""
    threading.Thread(target=time.sleep, args=(600,)).start()
    yield 1


def fail_or_wait(folder: Path, waits: bool) -> Iterator[int]:
    """Wait for ever, having said so in a file, or fail as soon as the other waits."""
    if waits:
        (folder / "waiting").write_text(str(os.getpid()))
        time.sleep(600)
    while not ((folder / "waiting").exists() and (folder / "waiting").read_text()):
        time.sleep(0.01)
    yield 1
    raise ValueError("this one failed")


def start_loader(path: str) -> Iterator[int]:
    """Start a process of its own, as a data loader's workers are."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=Path(path).touch, daemon=True)
    process.start()
    process.join()
    yield 1


def test_one_process_runs_the_calls_here_and_in_order() -> None:
    assert list(run_all(count_up, [(0, 3), (10, 2)], 1)) == [(i, os.getpid()) for i in (0, 1, 2, 10, 11)]


def test_one_process_is_lazy() -> None:
    events = run_all(fail, [("first",), ("second",)], 1)
    assert next(events) == 1
    with pytest.raises(ValueError, match="first"):
        next(events)


def test_a_single_call_needs_no_second_process() -> None:
    assert {pid for _, pid in run_all(count_up, [(0, 3)], 8)} == {os.getpid()}


def test_no_calls_yield_nothing() -> None:
    assert list(run_all(count_up, [], 2)) == []


def test_several_processes_yield_all_of_every_call_each_in_order() -> None:
    found = list(run_all(count_up, [(0, 3), (10, 2)], 2))
    assert [i for i, _ in found if i < 10] == [0, 1, 2]
    assert [i for i, _ in found if i >= 10] == [10, 11]
    pids = {pid for _, pid in found}
    assert len(pids) == 2
    assert os.getpid() not in pids


def say_who_ends_it() -> Iterator[bool]:
    yield signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_an_interrupt_from_the_keyboard_is_the_parents_to_tell() -> None:
    assert list(run_all(say_who_ends_it, [(), ()], 2)) == [True, True]


def test_an_error_in_a_worker_is_raised_here_and_stops_the_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this one failed"):
        list(run_all(fail_or_wait, [(tmp_path, True), (tmp_path, False)], 2))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "waiting").read_text()), 0)


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="worker process died; run the same command again"):
        list(run_all(die, [(), ()], 2))


def test_a_fault_in_a_worker_keeps_the_traceback_that_it_had_there() -> None:
    with pytest.raises(ValueError, match="mine") as caught:
        list(run_all(fail, [("mine",), ("mine",)], 2))
    (note,) = caught.value.__notes__
    assert note.startswith("In a worker process:\nTraceback")
    assert "raise ValueError(message)" in note


def test_a_users_mistake_in_a_worker_stays_one_line() -> None:
    with pytest.raises(UserError) as caught:
        list(run_all(fail_as_the_user, [("lower the learning rate",), ("lower the learning rate",)], 2))
    assert str(caught.value) == "lower the learning rate"


def test_an_error_that_does_not_survive_pickling_is_told_by_its_text() -> None:
    with pytest.raises(RuntimeError, match="UnpicklableError: 1 and 2") as caught:
        list(run_all(fail_unpicklably, [(), ()], 2))
    assert "raise UnpicklableError(1, 2)" in caught.value.__notes__[0]


def test_a_dead_worker_says_what_ended_it() -> None:
    with pytest.raises(RuntimeError, match=r"go on \(it was ended by SIGKILL, as where memory runs out\)"):
        list(run_all(die, [(), ()], 2))
    with pytest.raises(RuntimeError, match=r"go on \(its exit status is 7\)"):
        list(run_all(leave, [(7,), (7,)], 2))


def test_a_dead_worker_is_noticed_though_its_children_live(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended by SIGTERM"):
        list(run_all(die_with_a_child_that_stays, [(tmp_path,), (tmp_path,)], 2))
    for child in tmp_path.iterdir():
        os.kill(int(child.name), signal.SIGKILL)


def test_a_worker_that_has_said_all_and_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "SECONDS_TO_END", 0.2)
    assert list(run_all(say_all_and_hang, [(), ()], 2)) == [1, 1]


def test_a_worker_may_start_processes_of_its_own(tmp_path: Path) -> None:
    """Data loader workers (data.num_workers) are children of the process that trains."""
    assert list(run_all(start_loader, [(str(tmp_path / "a"),), (str(tmp_path / "b"),)], 2)) == [1, 1]


@pytest.mark.parametrize(("num_batches", "num_processes", "expected"), [(7, 3, 3), (2, 5, 2), (1, 2, 1)])
def test_shares_hold_every_batch_once_and_none_is_empty(num_batches: int, num_processes: int, expected: int) -> None:
    found = [range(num_batches)[share] for share in shares(num_batches, num_processes)]
    assert len(found) == expected
    assert min(map(len, found)) >= 1
    assert sorted(number for share in found for number in share) == list(range(num_batches))


def test_numbered_items_are_put_in_order_as_soon_as_they_can() -> None:
    taken: list[int] = []

    def numbered() -> Iterator[tuple[int, str]]:
        for number in (1, 0, 3, 2, 4):
            taken.append(number)
            yield number, "abcde"[number]

    assert [(item, len(taken)) for item in in_order(numbered())] == [("a", 2), ("b", 2), ("c", 4), ("d", 4), ("e", 5)]


def test_an_executor_is_found_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "backwards.py").write_text(
        "def run_all(function, calls, num_processes):\n"
        "    for call in reversed(calls):\n"
        "        yield from function(*call)\n"
    )
    monkeypatch.setattr(executors, "__path__", [*executors.__path__, str(tmp_path)])
    calls = [(0, 1), (10, 1)]
    assert [i for i, _ in executors.run_all(count_up, calls, 1, "backwards")] == [10, 0]
    assert [i for i, _ in executors.run_all(count_up, calls, 1)] == [0, 10]


def test_an_unknown_executor_is_refused() -> None:
    with pytest.raises(ValueError, match="executor is 'slurm', expected one of local"):
        next(executors.run_all(count_up, [(0, 1)], 1, "slurm"))


def test_an_executor_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "decouple_merge.executors.ray", raising=False)
    with pytest.raises(UserError, match=r"needs the package ray; pip install 'decouple-merge\[ray\]'"):
        executors.check_executor("ray")


def test_a_folder_that_a_piece_does_not_reach_is_refused_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.py").write_text(
        "def run_all(function, calls, num_processes, prefix=''):\n"
        "    for place, *call in calls:\n"
        "        yield from function(place.parent / (prefix + place.name), *call)\n"
    )
    monkeypatch.setattr(executors, "__path__", [*executors.__path__, str(tmp_path)])
    run = tmp_path / "run"
    run.mkdir()
    assert [i for i, _ in executors.run_all(count_up, [(0, 2)], 1, "there", {}, run)] == [0, 1]
    with pytest.raises(UserError, match=r"run is not the same folder on the machine .*; give an --out"):
        next(executors.run_all(count_up, [(0, 2)], 1, "there", {"prefix": "not-"}, run))
    assert list(run.iterdir()) == []
