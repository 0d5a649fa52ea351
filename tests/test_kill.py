"""kill −9 at a random moment, then the same command again: the same bytes as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler

import children
from conftest import make_unet
from decouple_merge.config import Config, dump_config
from decouple_merge.experiment import selection, workflow
from decouple_merge.experiment.plan import prepare
from decouple_merge.storage.files import read_records

# The moments of the kills; another seed must do as well.
MOMENTS = random.Random(0)
KILLED = 9


@dataclass
class Unkilled:
    """A run that nothing disturbed, and what its command needs."""

    config: Config
    folder: Path
    place: Path


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Unkilled:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("kill")
    DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=40)).save_pretrained(place / "base")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 8, 8), dtype=np.uint8)
    np.savez(place / "images.npz", images=pixels)
    config = Config.model_validate(
        {
            "base": str(place / "base"),
            "data": {"source": str(place / "images.npz"), "num_held_out": 8, "flip": True},
            "finetune": {
                "num_ranges": 2,
                "num_updates": 60,
                "batch_size": 4,
                "validate_every": 10,
                "checkpoint_every": 4,
                "tracker": "none",
                "baseline": False,
            },
            "sample": {"num_steps": 4, "batch_size": 16},
            "search": {"num_trials": 9, "num_images": 32, "gradient_batches": 3},
            "evaluate": {
                "num_images": 4,
                "num_seed_sets": 1,
                "num_sample_images": 1,
                "metrics": ["fd_effnetlite0"],
            },
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEME_CACHE", str(place / "cache"))
        list(workflow.run(config, place / "unkilled"))
    return Unkilled(config, place / "unkilled", place)


@pytest.fixture(autouse=True)
def _shared_cache(_isolated: None, unkilled: Unkilled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_CACHE", str(unkilled.place / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def deme_run(config: Config, folder: Path) -> subprocess.Popen[str]:
    path = folder.with_suffix(".yaml")
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "decouple_merge.cli.main", "run", str(path), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder.parent
    )


def kill_when(process: subprocess.Popen[str], reached: Callable[[], bool], at_most_seconds: float) -> None:
    """Wait until a phase is reached and a random moment longer, then kill −9."""
    limit = time.monotonic() + 400
    while not reached():
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            raise AssertionError(f"the phase was never seen: {process.communicate()[1]}")
        time.sleep(0.002)
    time.sleep(MOMENTS.uniform(0, at_most_seconds))
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_equal_runs(folder: Path, unkilled: Unkilled) -> None:
    def trials(run: Path) -> list[Any]:
        found = read_records(run / "search/trials.jsonl")
        return [(t["level"], t["number"], t["weights"], t["value"], t["merged_sha256"]) for t in found]

    assert trials(folder) == trials(unkilled.folder)
    assert len(trials(folder)) == 9 + 3
    for index in range(2):
        for name in ("model.safetensors", "expert.json", "log.jsonl"):
            path = f"experts/{index}/{name}"
            assert (folder / path).read_bytes() == (unkilled.folder / path).read_bytes(), path
    assert contents(folder / "merged") == contents(unkilled.folder / "merged")
    left_over = [str(p.relative_to(folder)) for p in folder.rglob(".*")]
    assert left_over == []


def num_trials(folder: Path) -> int:
    path = folder / "search/trials.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def descendants(pid: int) -> set[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = set(), [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found.update(children)
        waiting.extend(children)
    return found


def is_running(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_killed_in_finetuning_then_in_the_search_write_the_bytes_of_one_undisturbed(
    unkilled: Unkilled, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = unkilled.config.model_copy(update={"num_processes": 2})
    process = deme_run(config, folder)
    workers: set[int] = set()

    def both_train() -> bool:
        if not all((folder / f"experts/{i}/state/state.safetensors").exists() for i in range(2)):
            return False
        workers.update(descendants(process.pid))
        return True

    kill_when(process, both_train, 0.1)
    assert not all((folder / f"experts/{i}/model.safetensors").exists() for i in range(2))
    # A worker that outlived its parent would write into the folder while the next run does.
    assert len(workers) >= 2
    limit = time.monotonic() + 10
    while any(is_running(w) for w in workers) and time.monotonic() < limit:
        time.sleep(0.02)
    assert [w for w in workers if is_running(w)] == []

    num = MOMENTS.randrange(1, 7)
    kill_when(deme_run(config, folder), lambda: num_trials(folder) >= num, 0.2)
    # The best so far is always there, and whole.
    assert (folder / "merged/merge.json").exists()
    list(selection.search_weights(prepare(config, folder)))
    assert_equal_runs(folder, unkilled)


def die_half_way(path: Any) -> None:
    Path(path).write_bytes(b"half of it")
    os._exit(KILLED)


def dies_in_the_weights() -> None:
    safetensors.torch.save_file = lambda tensors, filename, *a, **k: die_half_way(filename)


def dies_in_the_record() -> None:
    write_text = Path.write_text

    def patched(self: Path, *arguments: Any, **options: Any) -> int:
        return die_half_way(self) or 0 if self.name == "merge.json" else write_text(self, *arguments, **options)

    Path.write_text = patched  # type: ignore[method-assign]


def dies_before_the_rename() -> None:
    replace = os.replace
    os.replace = lambda a, b: os._exit(KILLED) if Path(b).name == "merged" else replace(a, b)


def dies_after_the_rename() -> None:
    replace = os.replace

    def patched(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == "merged":
            os._exit(KILLED)

    os.replace = patched


def search_in_a_child(config: Config, folder: Path, prepare_death: Callable[[], None]) -> None:
    """Run the end of the job in a forked process, which dies where it is told to."""

    def search() -> None:
        plan = prepare(config, folder)
        prepare_death()
        list(selection.search_weights(plan))

    assert children.status(children.fork(search)) == KILLED


@pytest.fixture
def searched(unkilled: Unkilled, tmp_path: Path) -> Path:
    """A run that has everything but its merged model and the numbers after it."""
    folder = tmp_path / "run"
    shutil.copytree(unkilled.folder, folder)
    for later in ("merged", "samples", "figures"):
        shutil.rmtree(folder / later, ignore_errors=True)
    for later in ("search/candidates.json", "metrics.jsonl"):
        (folder / later).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(
    ("death", "is_exported"),
    [
        (dies_in_the_weights, False),
        (dies_in_the_record, False),
        (dies_before_the_rename, False),
        (dies_after_the_rename, True),
    ],
)
def test_killed_while_exporting_ends_in_the_same_bytes(
    death: Callable[[], None], is_exported: bool, unkilled: Unkilled, searched: Path
) -> None:
    search_in_a_child(unkilled.config, searched, death)
    # A half-written model never has the name of a whole one.
    assert (searched / "merged").exists() == is_exported
    list(selection.search_weights(prepare(unkilled.config, searched)))
    assert_equal_runs(searched, unkilled)
    assert (searched / "search/candidates.json").read_bytes() == (
        unkilled.folder / "search/candidates.json"
    ).read_bytes()


@pytest.mark.parametrize("death", [dies_in_the_weights, dies_before_the_rename, dies_after_the_rename])
def test_killed_while_replacing_a_merged_model_ends_in_the_same_bytes(
    death: Callable[[], None], unkilled: Unkilled, searched: Path
) -> None:
    shutil.copytree(unkilled.folder / "merged", searched / "merged")
    record = searched / "merged/merge.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "weights": [0.0, 0.0]}))
    search_in_a_child(unkilled.config, searched, death)
    list(selection.search_weights(prepare(unkilled.config, searched)))
    assert_equal_runs(searched, unkilled)
