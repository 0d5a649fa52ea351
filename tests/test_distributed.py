"""Several processes are one training: the numbers of one process with their batch, by gloo on the CPU."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from children import in_processes
from decouple_merge.cli import main
from decouple_merge.config import Config, dump_config
from decouple_merge.errors import UserError
from decouple_merge.executors import distributed
from decouple_merge.experiment import finetuning, workflow
from decouple_merge.experiment.plan import prepare
from decouple_merge.storage.files import read_records, read_tensors
from decouple_merge.training import checks
from decouple_merge.training.trainer import Trainer

MakeConfig = Callable[..., Config]
THREE = {"num_clusters": 3}
ONE_EXPERT = {"num_ranges": 1, "baseline": False}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def as_rank(rank: int, world: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank)}
    torch.set_num_threads(1)
    distributed.join()
    function(*arguments)
    distributed.leave()


def together(function: Callable[..., None], *arguments: Any, num: int = 2) -> list[int | None]:
    """Run a function in several processes, as torchrun does; returns their exit statuses."""
    # Forked, since importing everything takes longer than a training.
    context, port = multiprocessing.get_context("fork"), free_port()
    running = [context.Process(target=as_rank, args=(r, num, port, function, arguments)) for r in range(num)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in running]


def finetune(config: Config, folder: Path) -> None:
    events = list(finetuning.finetune_experts(prepare(config, folder)))
    (folder / f"events-{distributed.rank()}.txt").write_text("\n".join(map(str, events)))


def finetune_until_death(config: Config, folder: Path, update: int) -> None:
    """Train until a process that is not the first is killed in an update."""
    whole, is_victim = Trainer.update, distributed.rank() == 1

    def dying(self: Trainer, batches: Any) -> None:
        if is_victim and self.num_done == update:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, batches)

    Trainer.update = dying  # type: ignore[method-assign]
    finetune(config, folder)


def result(folder: Path, expert: str = "experts/0") -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    return read_tensors(folder / expert / "model.safetensors")[0], read_records(folder / expert / "log.jsonl")


def assert_close(one: Path, two: Path, expert: str = "experts/0") -> None:
    """Require equal weights and losses, up to the rounding of sums in another order."""
    (weights, log), (others, other_log) = result(one, expert), result(two, expert)
    assert all(torch.allclose(value, others[key], rtol=1e-5, atol=2e-6) for key, value in weights.items())
    assert [r["update"] for r in log] == [r["update"] for r in other_log]
    for a, b in zip(log, other_log, strict=True):
        assert [a["loss"], a["consistency_loss"], *a["validation"]] == pytest.approx(
            [b["loss"], b["consistency_loss"], *b["validation"]], rel=1e-5, abs=1e-9
        )


VARIANTS: dict[str, dict[str, Any]] = {
    "accumulation and flips": {"data": {"flip": True}, "finetune": {"accumulation": 3, "num_updates": 3}},
    # Antithetic pairs of 6 lie across the border between two slices of 3.
    "odd slices": {"finetune": {"batch_size": 6}},
    "adapters": {"finetune": {"projection": {"placement": "none"}, "lora": {"rank": 2}}},
    "uncertainty": {"finetune": {"balancing": "uncertainty"}},
    # Clusters of 3, 3 and 2 samples, some of whose are in either process.
    "clusters": {"finetune": {"batch_size": 8, "global_prob": 1.0, "balancing": {"method": "ant_uw", **THREE}}},
    "bargain": {
        "finetune": {
            "batch_size": 8,
            "global_prob": 0.0,
            "accumulation": 2,
            "gradient_checkpointing": True,
            "balancing": {"method": "ant_nash", "solve_every": 2, **THREE},
        }
    },
    "without conflicts": {
        "finetune": {"batch_size": 6, "global_prob": 0.0, "balancing": {"method": "pcgrad", **THREE}}
    },
    "checkpointing": {"finetune": {"gradient_checkpointing": True, "global_prob": 1.0, "antithetic": False}},
}


def halved(make: MakeConfig, changes: dict[str, Any]) -> tuple[Config, Config]:
    """Make a config for one process, and one for two with the same batch together."""
    # Adam makes a whole step of a gradient that is nothing but rounding, unless it is told what is small.
    settings = {"batch_size": 4, "eps": 1e-3, **ONE_EXPERT, **changes.get("finetune", {})}
    return tuple(  # type: ignore[return-value]
        make(**{**changes, "finetune": {**settings, "batch_size": settings["batch_size"] // num}}) for num in (1, 2)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_what_one_trains_with_their_batch(
    name: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    one, two = halved(tiny_config, VARIANTS[name])
    finetune(one, tmp_path / "one")
    assert together(finetune, two, tmp_path / "two") == [0, 0]
    assert_close(tmp_path / "one", tmp_path / "two")


def test_latents_and_dropped_captions_are_those_of_one_process(text_config: MakeConfig, tmp_path: Path) -> None:
    one, two = halved(text_config, {"data": {"caption_dropout": 0.5}})
    finetune(one, tmp_path / "one")
    assert together(finetune, two, tmp_path / "two") == [0, 0]
    assert_close(tmp_path / "one", tmp_path / "two")


def test_ranks_that_nobody_started_train_what_one_process_trains(tiny_config: MakeConfig, tmp_path: Path) -> None:
    one, two = halved(tiny_config, {})
    two = two.model_copy(update={"finetune": two.finetune.model_copy(update={"num_ranks": 2})})
    finetune(one, tmp_path / "one")
    events = list(finetuning.finetune_experts(prepare(two, tmp_path / "two")))
    assert events[0] == "an update sees 2 processes × batch_size 2 × accumulation 1 = 4 images"
    assert [event.update for event in events if not isinstance(event, str)] == [3, 6]
    assert_close(tmp_path / "one", tmp_path / "two")
    assert json.loads((tmp_path / "two/experts/0/expert.json").read_text())["num_processes"] == 2


def test_only_the_first_process_tells_and_writes(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(finetune={**ONE_EXPERT, "distance": {"every": 3, "num_images": 4, "num_steps": 2}})
    assert together(finetune, config, tmp_path / "run") == [0, 0]
    first, second = ((tmp_path / f"run/events-{rank}.txt").read_text().split("\n") for rank in (0, 1))
    assert first[0] == "an update sees 2 processes × batch_size 4 × accumulation 1 = 8 images"
    assert second[1:] == []
    _, log = result(tmp_path / "run")
    assert [r["update"] for r in log] == [3, 6]
    assert all(isinstance(r["distance"], float) for r in log)
    assert sorted(p.name for p in (tmp_path / "run/experts/0").iterdir()) == [
        "expert.json",
        "log.jsonl",
        "model.safetensors",
    ]


def test_a_training_whose_process_was_killed_goes_on_bitwise(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(finetune=ONE_EXPERT)
    assert together(finetune, config, tmp_path / "whole") == [0, 0]
    # The first notices, since it waits for gradients that don't come: it ends, with an error, and not never.
    statuses = together(finetune_until_death, config, tmp_path / "cut", 5)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, -signal.SIGKILL)
    assert (tmp_path / "cut/experts/0/state/state.safetensors").exists()
    assert together(finetune, config, tmp_path / "cut") == [0, 0]
    for name in ("model.safetensors", "log.jsonl", "expert.json"):
        assert (tmp_path / "cut/experts/0" / name).read_bytes() == (tmp_path / "whole/experts/0" / name).read_bytes()

    # Another number of processes would see another number of images: it is no way to go on.
    together(finetune_until_death, config, tmp_path / "other", 5)
    with pytest.raises(
        UserError,
        match=r"experts/0 .* num_processes was 2 and is 1; put that back, or remove experts/0 ",
    ):
        finetune(config, tmp_path / "other")


def run_all_of_it(config: Config, folder: Path) -> None:
    for _ in workflow.run(config, folder):
        pass
    (folder / f"left-{os.environ['RANK']}").write_text(str(distributed.world_size()))


def test_after_the_trainings_the_first_goes_on_alone(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any) -> list[str]:
        (tmp_path / f"alone-{os.environ['RANK']}").touch()
        return []

    for name in ("search_weights", "evaluate_run"):
        monkeypatch.setattr(workflow, name, nothing)
    # num_processes is for what follows the trainings.
    config = tiny_config(finetune={"num_ranges": 2, "num_updates": 1}, num_processes=2)
    assert together(run_all_of_it, config, tmp_path / "run") == [0, 0]
    assert sorted(p.name for p in tmp_path.glob("alone-*")) == ["alone-0"]
    assert {(tmp_path / f"run/left-{rank}").read_text() for rank in (0, 1)} == {"1"}
    assert sorted((tmp_path / "run").rglob("model.safetensors")) == [
        tmp_path / "run" / name / "model.safetensors"
        for name in ("baselines/baseline-finetuned", "experts/0", "experts/1")
    ]


def find_different_things(folder: Path) -> None:
    with pytest.raises(UserError, match=r"found different things there, state 0; state 1; put it on a disk"):
        distributed.check_shared(folder, f"state {distributed.rank()}")


def test_processes_that_do_not_share_the_folder_are_told(tmp_path: Path) -> None:
    assert together(find_different_things, tmp_path) == [0, 0]


def own_mean(start: float) -> float:
    """Take the mean over the processes of a launch."""
    distributed.join()
    return float(distributed.mean(torch.tensor(start + distributed.rank())))


def test_two_launches_at_once_do_not_meet(tmp_path: Path) -> None:
    def launch(number: int) -> None:
        # As ``torchrun --standalone --nproc_per_node 2`` does.
        rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(number)}
        settings = LaunchConfig(1, 1, 2, start_method="fork", **rendezvous)
        means = elastic_launch(settings, own_mean)(10.0 * number)
        (tmp_path / str(number)).write_text(repr(sorted(means.items())))

    in_processes(2, launch)
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == ["[(0, 0.5), (1, 0.5)]", "[(0, 10.5), (1, 10.5)]"]


def test_the_command_under_torchrun_prints_once(tiny_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny_config(finetune={**ONE_EXPERT, "num_updates": 2})))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    deme = ["-m", "decouple_merge.cli", "finetune", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *deme], capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert out.count("an update sees 2 processes × batch_size 4 × accumulation 1 = 8 images") == 1
    assert out.count("expert-0 2/2") == 1


@pytest.mark.parametrize(("rank", "start", "waits"), [(0, "deme: ", []), (1, "deme: process 1: ", [5])])
def test_other_verbs_refuse_to_be_started_by_torchrun_and_the_first_process_says_so_first(
    rank: int,
    start: str,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    waited: list[float] = []
    for name, value in {"NUM_PROCESSES": 2, "RANK": rank}.items():
        monkeypatch.setattr(main, name, value)
    monkeypatch.setattr(main.time, "sleep", waited.append)
    monkeypatch.setattr(sys, "argv", ["deme", "search", "run"])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert capsys.readouterr().err == (
        f"{start}deme search was started 2 times, expected once: only trainings (run, finetune, pretrain) are shared "
        "by torchrun's processes; start it without torchrun\n"
    )
    assert waited == waits


class Overflowing(torch.amp.GradScaler):
    """An fp16 scale on the CPU whose gradients overflow at some attempts, counted from 0."""

    attempts: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=2.0**10)
        self.num_attempts = 0

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        if self.num_attempts in self.attempts:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = torch.inf
        self.num_attempts += 1
        super().unscale_(optimizer)


def train_scaled(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, attempts: tuple[int, ...]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    from decouple_merge.training import trainer

    monkeypatch.setattr(trainer, "grad_scaler", lambda *_: Overflowing())
    monkeypatch.setattr(Overflowing, "attempts", attempts)
    finetune(config, folder)
    return result(folder)


def test_an_overflow_of_fp16_gradients_advances_nothing(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates, schedule, EMA, losses and batches are those of a training in which nothing overflowed.

    The network computes in float32 here, where a scale, a power of two, changes no bit.
    """
    config = tiny_config(finetune={**ONE_EXPERT, "schedule": "cosine", "num_warmup_updates": 2, "accumulation": 2})
    weights, log = train_scaled(config, tmp_path / "smooth", monkeypatch, ())
    # Two at the first update, before the optimiser has any state, and one later.
    others, other_log = train_scaled(config, tmp_path / "rough", monkeypatch, (0, 1, 5))
    assert other_log == log
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


def test_gradients_that_overflow_at_any_scale_end_the_training(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="expert-0: fp16 gradients overflow at update 1; set mixed_precision to bf16"):
        train_scaled(tiny_config(finetune=ONE_EXPERT), tmp_path / "run", monkeypatch, tuple(range(20)))


def test_a_tracker_that_is_not_installed_is_refused(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="tracker is wandb, which isn't installed: pip install wandb, or set it to none"
    ):
        prepare(tiny_config(finetune={"tracker": "wandb"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_service_gets_the_numbers_of_each_validation(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text(
        "import json, pathlib\n"
        "told = []\n"
        "def init(**settings): told.append(settings)\n"
        "def log(values, step): told.append([step, sorted(values)])\n"
        f"def finish(): pathlib.Path({str(tmp_path / 'told.json')!r}).write_text(json.dumps(told))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    finetune(tiny_config(finetune={**ONE_EXPERT, "tracker": "wandb"}), tmp_path / "run")
    names = ["consistency_loss", "loss", "validation_loss/0-40"]
    assert json.loads((tmp_path / "told.json").read_text()) == [
        {"project": "decouple-merge", "name": "expert-0"},
        [3, names],
        [6, names],
    ]
