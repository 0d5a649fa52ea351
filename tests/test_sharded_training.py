"""A network that is shared out among processes (FSDP2, gloo on the CPU): the numbers of one that each holds whole."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from decouple_merge.config import Config
from decouple_merge.errors import UserError
from decouple_merge.executors import distributed, sharding
from decouple_merge.models.base import load_base
from decouple_merge.models.families import dit
from decouple_merge.storage.files import read_records
from decouple_merge.training.checks import check_finetune
from decouple_merge.training.state import saved_state, state_path
from decouple_merge.training.trainer import Trainer
from test_distributed import ONE_EXPERT, assert_close, finetune, result, together

SETTINGS = {
    **ONE_EXPERT,
    "num_updates": 3,
    "checkpoint_every": 1,
    "batch_size": 2,
    "eps": 1e-3,
    "accumulation": 2,
    "sharding": "full",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "folded projections": {"gradient_checkpointing": True},
    "trunk projections": {"projection": {"placement": "trunk"}},
    "adapters": {"projection": {"placement": "none"}, "lora": {"rank": 2}},
    "uncertainty": {"projection": {"placement": "none"}, "balancing": "uncertainty"},
}


def finetune_and_look(configs: dict[Path, Config]) -> None:
    """Train, and note which share of the elements of parameters, averages and moments this process holds."""
    held, whole = list[float](), Trainer.save

    def looking(self: Trainer, path: Path) -> None:
        moments = [self.optimizer.state[p]["exp_avg"] for p in self.parameters]
        for tensors in (self.parameters, self.ema.values, moments):
            assert all(isinstance(t, DTensor) for t in tensors)
            held.append(sum(sharding.own_part(t).numel() for t in tensors) / sum(t.numel() for t in tensors))
        whole(self, path)

    Trainer.save = looking  # type: ignore[method-assign]
    for folder, config in configs.items():
        held.clear()
        finetune(config, folder)
        (folder / f"held-{distributed.rank()}.txt").write_text(" ".join(map(str, held)))


def test_networks_that_are_shared_out_are_trained_as_whole_ones(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    configs = {}
    for name, changes in VARIANTS.items():
        settings = {**SETTINGS, **changes}
        finetune(tiny_config(finetune={**settings, "sharding": "none", "batch_size": 4}), tmp_path / name / "one")
        configs[tmp_path / name / "two"] = tiny_config(finetune=settings)
    # All in the same processes: each new one finds out again how every operation is shared out, which takes seconds.
    assert together(finetune_and_look, configs) == [0, 0]
    for two in configs:
        one = two.with_name("one")
        assert_close(one, two)
        weights, _ = result(two)
        others = load_file(one / "experts/0/model.safetensors")
        assert {k: (v.shape, v.dtype) for k, v in weights.items()} == {k: (v.shape, v.dtype) for k, v in others.items()}
        for rank in range(2):
            shares = [float(share) for share in (two / f"held-{rank}.txt").read_text().split()]
            assert len(shares) == 6, two
            assert all(0.4 < share < 0.6 for share in shares), two
        assert not (two / "experts/0/state").exists()


def finetune_until_death(config: Config, folder: Path, update: int) -> None:
    """Train until the second process is killed before it writes its part of a state."""
    whole, is_victim = Trainer.save, distributed.rank() == 1

    def dying(self: Trainer, path: Path) -> None:
        if is_victim and self.num_done == update:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, path)

    Trainer.save = dying  # type: ignore[method-assign]
    finetune(config, folder)


def test_a_killed_training_goes_on_from_the_newest_state_that_is_whole_and_ends_in_the_same_bits(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_config(finetune={**SETTINGS, "keep_every": 1})
    assert together(finetune, config, tmp_path / "whole") == [0, 0]
    assert -signal.SIGKILL in together(finetune_until_death, config, tmp_path / "cut", 2)
    state = tmp_path / "cut/experts/0/state"
    assert saved_state(state, (0, 2)) == state / "1/0.safetensors"
    assert together(finetune, config, tmp_path / "cut") == [0, 0]
    for name in ("model.safetensors", "checkpoints/2.safetensors"):
        expected = load_file(tmp_path / "whole/experts/0" / name)
        assert all(torch.equal(v, expected[k]) for k, v in load_file(tmp_path / "cut/experts/0" / name).items())
    assert read_records(tmp_path / "cut/experts/0/log.jsonl") == read_records(tmp_path / "whole/experts/0/log.jsonl")


def test_a_state_of_another_sharding_is_not_passed_over(tmp_path: Path) -> None:
    for part, other, was in ((None, (0, 2), "none"), ((0, 2), None, "full")):
        folder = tmp_path / was
        state_path(folder, 3, part).parent.mkdir(parents=True)
        state_path(folder, 3, part).touch()
        with pytest.raises(UserError, match=f"is of a training whose sharding was {was}: put that back, or remove"):
            saved_state(folder, other)


def test_blocks_are_those_that_diffusers_names_or_the_members_of_lists() -> None:
    transformer = dit.tiny_dit()
    assert sharding._blocks(transformer)[::-1] == list(transformer.transformer_blocks)
    named = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    named._no_split_modules = ["Linear"]
    assert sharding._blocks(named) == [named[1][0], named[0]]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"compile": True}, "compile is true"),
        ({"optimizer": "adamw8bit"}, "optimizer is adamw8bit"),
        ({"global_prob": 0.0, "balancing": {"method": "pcgrad", "num_clusters": 3}}, "balancing is pcgrad"),
    ],
)
def test_what_needs_whole_tensors_is_refused_before_any_compute(
    changes: dict[str, Any], what: str, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decouple_merge.training.checks.find_spec", lambda name: True)
    config = tiny_config(finetune={"sharding": "full", **changes})
    with pytest.raises(UserError, match=f"sharding is full and {what}, which don't go together"):
        check_finetune(config.finetune, load_base(config.base), torch.device("cpu"))
