"""Pieces on a Ray cluster of two nodes on this machine: results, errors, and nodes that die."""

import importlib
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decouple_merge.config import Config, Pieces, Ray, Sample
from decouple_merge.errors import UserError
from decouple_merge.executors import run_all
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.selection import search_weights
from decouple_merge.sampling.folder import sample_model
from decouple_merge.searching.trial import Trial
from decouple_merge.storage.files import read_records

ray = pytest.importorskip("ray", reason="Ray isn't installed: pip install 'decouple-merge[ray]'")
executor = importlib.import_module("decouple_merge.executors.ray")
NODE = {"num_cpus": 1, "object_store_memory": 80 * 1024 * 1024, "include_dashboard": False}


class Nodes:
    """Two nodes with a place each; the second may be removed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args=NODE)
        self.second = self.cluster.add_node(**NODE)
        self.options = {"address": self.cluster.address}

    def lose_one(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def add_one(self) -> None:
        self.second = self.cluster.add_node(**NODE)

    def lose_one_when(self, is_time: Callable[[], bool], events: Iterator[Any]) -> None:
        """Lose a node and add another as soon as it is time, which is looked at after every event."""
        waits = True
        for _ in events:
            if waits and is_time():
                waits = False
                self.lose_one()
                self.add_one()
        assert not waits


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        # Workers have to find the functions of this file.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        # What checks shapes while tests run hides from Ray that it is a generator function.
        patch.setattr(executor, "_work", inspect.unwrap(executor._work))
        started = Nodes()
        yield started
        ray.shutdown()
        started.cluster.shutdown()


def squares(first: int, num: int) -> Iterator[tuple[int, torch.Tensor, int]]:
    for i in range(first, first + num):
        yield i, torch.tensor([i, i], dtype=torch.bfloat16) ** 2, os.getpid()


def fail(kind: type[Exception]) -> Iterator[int]:
    yield 1
    raise kind("lower the learning rate")


def test_pieces_yield_in_order_and_each_has_a_process_of_its_own(nodes: Nodes) -> None:
    found = list(run_all(squares, [(0, 3), (10, 2)], 2, "ray", nodes.options))
    assert [i for i, *_ in found if i < 10] == [0, 1, 2]
    assert [i for i, *_ in found if i >= 10] == [10, 11]
    assert all(torch.equal(square, torch.tensor([i, i], dtype=torch.bfloat16) ** 2) for i, square, _ in found)
    assert len({pid for *_, pid in found} - {os.getpid()}) == 2


@pytest.mark.parametrize("kind", [UserError, KeyError])
def test_an_error_keeps_its_class_and_the_traceback_that_it_had_there(nodes: Nodes, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        list(run_all(fail, [(kind,)], 1, "ray", nodes.options))
    assert caught.value.args == ("lower the learning rate",)
    assert "raise kind(" in caught.value.__notes__[0]


def test_what_no_node_has_is_refused(nodes: Nodes) -> None:
    with pytest.raises(UserError, match=r"ray.num_cpus 1 and ray.num_gpus 3, and the nodes .* have 1 CPUs and 0 GPUs"):
        next(run_all(squares, [(0, 1)], 1, "ray", nodes.options | {"num_gpus": 3.0}))


def test_another_ray_may_be_started_beside(nodes: Nodes) -> None:
    code = "from test_ray import run_all, squares; print([i for i, *_ in run_all(squares, [(0, 2)], 1, 'ray')])"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1:] == ["[0, 1]"], done.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    weights = [*folder.glob("experts/*/model.safetensors"), *folder.glob("merged/unet/*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in weights}


def trials_of(folder: Path) -> list[dict[str, Any]]:
    records = read_records(folder / "search" / "trials.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "worker", "started")} for r in records]


def test_a_run_whose_nodes_die_in_every_stage_ends_with_the_bytes_of_a_local_one(
    nodes: Nodes, tiny_config: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Long enough that the other node's training goes on when this process hears of it.
    finetune = {"num_updates": 400, "validate_every": 10, "checkpoint_every": 10, "baseline": False}
    local = tiny_config(finetune=finetune, search={"num_trials": 6, "num_finalists": 0})
    pieces = {"executor": "ray", "num_processes": 2, "ray": Ray(**nodes.options)}
    here, there = prepare(local, tmp_path / "local"), prepare(local.model_copy(update=pieces), tmp_path / "ray")
    list(finetune_experts(here))
    list(search_weights(here))

    def states() -> bool:
        return len(list(there.run.folder.glob("experts/*/state/state.safetensors"))) == 2

    nodes.lose_one_when(states, finetune_experts(there))
    nodes.lose_one_when(lambda: True, (event for event in search_weights(there) if isinstance(event, Trial)))
    assert caplog.text.count("a piece was lost and is done again") >= 2
    assert trials_of(tmp_path / "ray") == trials_of(tmp_path / "local")
    assert len(files_of(tmp_path / "local")) == 3
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    assert [p.name for p in (tmp_path / "ray").iterdir() if p.name.startswith(".")] == []


def test_images_drawn_while_a_node_dies_are_those_of_one_process(
    nodes: Nodes, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Sample(sampler="DDIM", num_steps=40, batch_size=1)
    sample_model(str(tiny_base), tmp_path / "here", 40, settings=settings)

    def lose() -> None:
        while len(list((tmp_path / "there").glob("*.png"))) < 4:
            time.sleep(0.01)
        nodes.lose_one()

    thread = threading.Thread(target=lose)
    thread.start()
    pieces = Pieces(executor="ray", num_processes=2, ray=Ray(**nodes.options))
    sample_model(str(tiny_base), tmp_path / "there", 40, settings=settings, pieces=pieces)
    thread.join()
    nodes.add_one()
    assert "a piece was lost and is done again" in caplog.text
    found = [{p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())} for name in ("here", "there")]
    assert len(found[0]) == 40
    assert found[0] == found[1]
