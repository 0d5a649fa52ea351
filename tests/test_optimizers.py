"""The optimisers: the settings reach them, and training goes on bitwise from what they remember, in 8 bits too."""

import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from decouple_merge.config import Config
from decouple_merge.experiment import finetuning, trainings
from decouple_merge.experiment.plan import check, prepare
from decouple_merge.training import checks
from decouple_merge.training.trainer import Trainer

MakeConfig = Callable[..., Config]


pytestmark = pytest.mark.usefixtures("every_record")


class AdamW8bit(torch.optim.Optimizer):
    """Stands in for bitsandbytes': Adam whose moments are kept in the places and kinds that those are kept in.

    Moments of larger parameters are uint8 with a scale, codebooks are one tensor for all, the count is a number, and
    ``state_dict`` nests the tensors.
    """

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, params: Any, **settings: Any) -> None:
        AdamW8bit.made.append(dict(settings))
        super().__init__(params, settings)
        self.codebook = torch.arange(256.0)

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        state = {
            i: {"step": s["step"], "nested": {k: v for k, v in s.items() if k != "step"}}
            for i, s in found["state"].items()
        }
        return {**found, "state": state}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, self.state[p], group)

    def _step(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        is_small = p.numel() < 100
        if not state:
            moments = {
                f"state{i}": torch.zeros_like(p, dtype=torch.float32 if is_small else torch.uint8) for i in (1, 2)
            }
            state |= {"step": 0, **moments}
            if not is_small:
                state |= {f"absmax{i}": torch.zeros(1) for i in (1, 2)} | {f"qmap{i}": self.codebook for i in (1, 2)}
        state["step"] += 1
        updates = []
        for i, (beta, new) in enumerate(zip(group["betas"], (p.grad, p.grad.square().sqrt()), strict=True), start=1):
            old = state[f"state{i}"]
            if not is_small:
                old = (state[f"qmap{i}"][old.int()] - 128) / 127 * state[f"absmax{i}"]
            moment = beta * old + (1 - beta) * new
            if not is_small:
                state[f"absmax{i}"] = moment.abs().max()[None]
                state[f"state{i}"] = (moment / state[f"absmax{i}"] * 127 + 128).round().to(torch.uint8)
            else:
                state[f"state{i}"] = moment
            updates.append(moment / (1 - beta ** state["step"]))
        p.data.mul_(1 - group["lr"] * group["weight_decay"])
        p.data.sub_(group["lr"] * updates[0] / (updates[1].abs() + 1e-3))


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def eight_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is imported as bitsandbytes; the real one where it is installed, which not every machine's can run."""
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
        return request.param
    library, optimisers = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    optimisers.AdamW8bit = AdamW8bit  # type: ignore[attr-defined]
    library.optim = optimisers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optimisers)
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    monkeypatch.setattr(AdamW8bit, "made", [])
    return request.param


def train(make: MakeConfig, folder: Path, stop: int | None, **settings: Any) -> dict[str, Tensor]:
    opened = prepare(make(finetune={"baseline": False, **settings}), folder)
    if stop is not None:
        events = finetuning.finetune_experts(opened, 0)
        while getattr(next(events), "update", 0) < stop:
            pass
        events.close()
        assert (folder / "experts/0/state/state.safetensors").exists()
    list(finetuning.finetune_experts(opened, 0))
    return load_file(folder / "experts/0/model.safetensors")


def test_training_in_8_bits_goes_on_bitwise_after_an_interruption(
    tiny_config: MakeConfig, tmp_path: Path, eight_bits: str
) -> None:
    settings = {"optimizer": "adamw8bit", "learning_rate": 1e-2}
    whole = train(tiny_config, tmp_path / "whole", None, **settings)
    again = train(tiny_config, tmp_path / "again", 5, **settings)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    other = train(tiny_config, tmp_path / "other", None, learning_rate=1e-2)
    assert any(not torch.equal(value, other[key]) for key, value in whole.items())


def test_what_an_8_bit_optimiser_remembers_is_stored_as_it_is(
    tiny_config: MakeConfig, tmp_path: Path, eight_bits: str
) -> None:
    opened = prepare(tiny_config(finetune={"baseline": False, "optimizer": "adamw8bit"}), tmp_path / "run")
    events = finetuning.finetune_experts(opened, 0)
    while getattr(next(events), "update", 0) < 5:
        pass
    events.close()
    stored = load_file(tmp_path / "run/experts/0/state/state.safetensors")
    dtypes = {stored[key].dtype for key in stored if key.endswith((".state1", ".state2"))}
    assert torch.uint8 in dtypes
    assert {int(stored[key]) for key in stored if key.endswith(".step")} == {4}


def test_the_settings_reach_the_8_bit_optimiser(tiny_config: MakeConfig, tmp_path: Path, eight_bits: str) -> None:
    if eight_bits != "stand-in":
        pytest.skip("only the stand-in says what it was given")
    given = {"learning_rate": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-5}
    train(tiny_config, tmp_path / "run", None, optimizer="adamw8bit", num_updates=1, **given)
    assert AdamW8bit.made == [{"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-5}]


def test_the_default_is_torchs_fused_adamw(tiny_config: MakeConfig, tmp_path: Path) -> None:
    opened = prepare(tiny_config(), tmp_path / "run")
    task = trainings.expert_task(opened, 0)
    trainer = Trainer(opened.base, task, opened.config.finetune, 0)
    inner = trainer.optimizer
    assert type(inner) is torch.optim.AdamW
    assert inner.defaults["fused"]
    held = chain.from_iterable(group["params"] for group in inner.param_groups)
    assert {id(p) for p in held} == {id(p) for p in trainer.parameters}


def test_an_8_bit_optimiser_that_is_not_installed_is_refused(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adamw8bit needs bitsandbytes, .* pip install 'decouple-merge\[8bit\]'"):
        check(tiny_config(finetune={"optimizer": "adamw8bit"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
