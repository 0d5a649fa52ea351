"""Two processes on one folder, one cache entry or one search: one works, the other is told or waits."""

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import children
from children import in_processes
from decouple_merge.cli.main import app
from decouple_merge.config import Config, dump_config, load_config
from decouple_merge.data.images import ArrayImages
from decouple_merge.data.latents import CachedRows
from decouple_merge.errors import UserError
from decouple_merge.evaluation.extractors import Extractor
from decouple_merge.evaluation.references import make_reference
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.searching import leader
from decouple_merge.searching.leader import LeaderWatch, leading
from decouple_merge.searching.study import open_storage, open_study
from decouple_merge.searching.worker import work
from decouple_merge.storage.locks import hold, make_once
from decouple_merge.storage.run_folder import Run
from test_evaluate import features_of


@contextlib.contextmanager
def another_process(do: Callable[[], Any], seconds: float = 600.0) -> Iterator[int]:
    """Have a forked process enter a context, stay in it for a while, and end; yields its id when it has entered."""
    read, write = os.pipe()

    def stay() -> None:
        with do():
            os.write(write, b".")
            time.sleep(seconds)

    pid = children.fork(stay)
    os.read(read, 1)
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.fixture
def claimed(tiny_config: Callable[..., Config], tmp_path: Path) -> Path:
    """A run folder that has its config and no more."""
    prepare(tiny_config(finetune={"num_updates": 2, "baseline": False}), tmp_path / "run")
    return tmp_path / "run"


def deme(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_run_is_analysed_by_one_process(claimed: Path) -> None:
    # It needs no more than the base.
    command = ["analyze", claimed, "--only", "gradient-similarity", "--set", "gradient_similarity.num_images=8"]
    with another_process(lambda: hold(Run(claimed).lock("analyze"), "deme analyze")):
        assert f"{claimed}: deme analyze holds it, process" in str(deme(*command).exception)
        assert not (claimed / "analysis").exists()


@pytest.mark.parametrize("verb", ["run", "finetune", "search", "fisher", "gram"])
def test_a_second_process_is_told_who_holds_the_folder(verb: str, claimed: Path) -> None:
    arguments = [claimed / "config.yaml", "--out", claimed] if verb in ("run", "finetune") else [claimed]
    with another_process(lambda: hold(Run(claimed).lock("run"), "deme run")) as pid:
        before = sorted(claimed.rglob("*"))
        found = deme(verb, *arguments)
        assert isinstance(found.exception, UserError)
        assert re.fullmatch(
            rf"{claimed}: deme run holds it, process {pid} on {socket.gethostname()}, since "
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00; let it end, or have this one wait for it with --wait",
            str(found.exception),
        )
        assert sorted(claimed.rglob("*")) == before


def test_ranges_are_finetuned_side_by_side_but_each_by_one_process(claimed: Path) -> None:
    def finetune(*more: Any) -> Any:
        return deme("finetune", claimed / "config.yaml", "--out", claimed, *more)

    with another_process(lambda: hold(Run(claimed).lock("expert-0"), "deme finetune")):
        assert "deme finetune holds it" in str(finetune("--range", 0).exception)
        assert "deme finetune holds it" in str(finetune().exception)
        assert "deme finetune holds it" in str(deme("run", claimed / "config.yaml", "--out", claimed).exception)
        assert finetune("--range", 1).exit_code == 0
    assert (claimed / "experts/1/model.safetensors").exists()
    assert finetune("--range", 0).exit_code == 0


def test_where_asked_a_process_waits_for_the_other(claimed: Path) -> None:
    with another_process(lambda: hold(Run(claimed).lock("expert-0"), "deme finetune"), seconds=3):
        found = deme("finetune", claimed / "config.yaml", "--out", claimed, "--range", 0, "--wait")
    assert found.exit_code == 0, found.exception
    assert "waiting: " in found.output
    assert (claimed / "experts/0/model.safetensors").exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "locks/run.lock"
    with another_process(lambda: hold(path, "deme run")):
        pass
    assert path.with_suffix(".json").exists()
    with hold(path, "deme search"):
        assert "deme search" in path.with_suffix(".json").read_text()


def test_other_ranks_of_a_training_leave_the_lock_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locks/run.lock"
    with another_process(lambda: hold(path, "deme finetune")):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with hold(path, "deme finetune"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError), hold(path, "deme finetune"):
            pass


def test_a_process_may_hold_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "locks/run.lock"
    with hold(path, "deme run"):
        with hold(path, "deme search"):
            pass
        assert "deme run" in path.with_suffix(".json").read_text()


def test_two_first_starts_of_different_configs_do_not_share_a_folder(
    claimed: Path,
) -> None:
    config = load_config(claimed / "config.yaml")
    with another_process(lambda: hold(Run(claimed).lock("run"), "deme run")):
        with pytest.raises(UserError, match="deme run holds it"):
            prepare(config.model_copy(update={"seed": 5}), claimed)
        assert load_config(claimed / "config.yaml") == config
    # The other one is faster: it claims the folder after this one has, and before this one holds it.
    plan = prepare(config, claimed)
    prepare(config.model_copy(update={"seed": 5}), claimed)
    with pytest.raises(UserError, match="another start has changed seed meanwhile; start again"):
        list(finetune_experts(plan))


def test_of_two_deme_runs_one_does_the_work(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config(
        finetune={"baseline": False, "num_updates": 2}, search={"num_trials": 4}, evaluate={"num_seed_sets": 1}
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    errors = [tmp_path / f"errors-{i}" for i in range(2)]
    both = [children.deme("run", "config.yaml", "--out", "run", folder=tmp_path, errors=path) for path in errors]
    statuses = [children.status(pid) for pid in both]
    assert sorted(statuses) == [0, 2], [path.read_text() for path in errors]
    message = errors[statuses.index(2)].read_text()
    assert message.startswith("deme: ")
    assert "holds it, process" in message
    assert message.count("\n") == 1
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 2


# -- the cache
def test_a_file_of_the_cache_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "cache/entry"

    def make() -> None:
        with (tmp_path / "made").open("a") as file:
            file.write("x")
        time.sleep(0.2)
        path.parent.mkdir(exist_ok=True)
        path.write_text("whole")

    def ask(_: int) -> None:
        make_once(path, make)
        assert path.read_text() == "whole"

    in_processes(4, ask)
    assert (tmp_path / "made").read_text() == "x"


def test_a_reference_is_computed_once(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)

    def extract(images: Tensor) -> dict[str, Tensor]:
        with (tmp_path / "extracted").open("a") as file:
            file.write(f"{len(images)} ")
        time.sleep(0.2)
        return {"features": features_of(images)["features"]}

    extractor = Extractor("effnetlite0", "0" * 64, {"features": 5}, extract)
    in_processes(3, lambda _: make_reference("data", ArrayImages(pixels), extractor))
    assert (tmp_path / "extracted").read_text() == "20 "


class Squares(CachedRows):
    """Rows whose encoder notes what it is asked for."""

    def __init__(self, log: Path) -> None:
        super().__init__("squares", "squares", 2000, "fp32")
        self.log = log

    def open_encoder(self) -> Callable[[Sequence[int]], dict[str, Tensor]]:
        def encode(indices: Sequence[int]) -> dict[str, Tensor]:
            with self.log.open("a") as file:
                file.write(f"{indices[0]}\n")
            return {"square": torch.tensor(indices).float() ** 2}

        return encode


def test_latents_are_computed_once(tmp_path: Path) -> None:
    in_processes(2, lambda _: list(Squares(tmp_path / "log").fill()))
    asked = (tmp_path / "log").read_text().splitlines()
    assert sorted(map(int, asked)) == list(range(0, 2000, 16))
    assert Squares(tmp_path / "log").read([1500])["square"].tolist() == [1500.0**2]


# -- workers and their leader
def test_a_worker_without_a_leader_says_so_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(leader, "LEADERLESS_SECONDS", 1.5)
    config = Config.model_validate({"search": {"num_trials": 4, "num_images": 5}})
    storage = open_storage(tmp_path / "study.jsonl")
    events = work(lambda name: open_study(storage, name), config, 2, lambda *_: pytest.fail("nothing waits"))
    assert "this worker ends at 1.5 s" in str(next(events))
    with pytest.raises(UserError, match="had no leader for 2 s; start deme search RUN"):
        next(events)


def test_a_leader_that_lives_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decouple_merge.searching.study.HEARTBEAT_SECONDS", 0.05)
    study = open_study(open_storage(tmp_path / "study.jsonl"), "screen")
    with leading(study):
        watch = LeaderWatch(study)
        for _ in range(20):
            time.sleep(0.1)
            list(watch.look())
            assert time.monotonic() - watch.since < 1.5
    monkeypatch.setattr(leader, "SILENT_SECONDS", 0.1)
    list(watch.look())
    time.sleep(0.3)
    assert len(list(watch.look())) == 1
    assert list(watch.look()) == []
