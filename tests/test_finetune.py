"""Training of an expert: bitwise resume, schedules, accumulation, a teacher that stays what it was."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor, nn

from conftest import make_unet
from decouple_merge.config import Config, Training
from decouple_merge.config.training import Density
from decouple_merge.data.batches import held_out_images
from decouple_merge.data.sources import load_images
from decouple_merge.diffusion.timesteps import split_timesteps
from decouple_merge.models.base import load_base, tensors_sha256
from decouple_merge.models.projection import folded_state_dict
from decouple_merge.seeds import generator
from decouple_merge.storage.files import read_records, read_tensors
from decouple_merge.training import ema, loop, parametrisation, trainer, validation
from decouple_merge.training.compilation import differing_gradients
from decouple_merge.training.ema import ema_decay
from decouple_merge.training.loop import train
from decouple_merge.training.records import StepRecord
from decouple_merge.training.schedule import learning_rate_at
from decouple_merge.training.trainer import Task
from decouple_merge.training.validation import validation_losses


@dataclass
class Ends:
    """Raw and averaged parameters at the end of each training, which the run folder doesn't keep."""

    raw: list[dict[str, Tensor]] = field(default_factory=list)
    ema: list[dict[str, Tensor]] = field(default_factory=list)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    found = Ends()

    def capture(network: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        found.raw.append({k: v.detach().clone() for k, v in network.named_parameters()})
        found.ema.append({k: v.clone() for k, v in parameters.items()})
        return folded_state_dict(network, parameters)

    monkeypatch.setattr(parametrisation, "folded_state_dict", capture)
    return found


pytestmark = pytest.mark.usefixtures("every_record")


def start(config: Config, folder: Path, **changes: Any) -> Iterator[StepRecord]:
    base = load_base(config.base)
    settings = config.finetune
    ranges = tuple(split_timesteps(base.num_train_timesteps, settings.num_ranges))
    task = Task("expert-0", ranges[0], ranges)
    images = load_images(config.data, base.channels, base.image_size)
    return train(base, images, config.data, replace(task, **changes), settings, config.seed, folder)


def finish(config: Config, folder: Path, **changes: Any) -> list[StepRecord]:
    return list(start(config, folder, **changes))


def stop_after(config: Config, folder: Path, num_records: int) -> None:
    """Train until so many records came, then drop the training where it stands."""
    records = start(config, folder)
    assert len(list(itertools.islice(records, num_records))) == num_records
    records.close()
    assert not (folder / "model.safetensors").exists()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def dropout_base(folder: Path) -> str:
    DDPMPipeline(make_unet(dropout=0.2), DDPMScheduler(num_train_timesteps=40)).save_pretrained(folder)
    return str(folder)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"finetune": {"projection": {"placement": "none"}}},
    "folded projections": {},
    "trunk projections": {"finetune": {"projection": {"placement": "trunk"}}},
    "accumulation": {"finetune": {"accumulation": 2}},
    "flips and workers": {"data": {"flip": True, "num_workers": 2}},
    "dropout": {"base": "dropout"},
    "decay": {"finetune": {"schedule": "cosine", "num_warmup_updates": 2}},
}


def variant(name: str, tiny_config: Callable[..., Config], tmp_path: Path) -> Config:
    changes = dict(VARIANTS[name])
    if changes.get("base"):
        changes["base"] = dropout_base(tmp_path / "dropout")
    return tiny_config(**changes)


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_training_ends_in_the_same_bits(
    name: str, tmp_path: Path, tiny_config: Callable[..., Config], ends: Ends
) -> None:
    config = variant(name, tiny_config, tmp_path)
    finish(config, tmp_path / "whole")
    # Checkpoints are at 2 and 4: this one is killed between them, the second time before it got any further.
    stop_after(config, tmp_path / "cut", 3)
    stop_after(config, tmp_path / "cut", 1)
    records = finish(config, tmp_path / "cut")
    assert [r.update for r in records] == [3, 4, 5, 6]
    assert equal(ends.raw[0], ends.raw[1])
    assert equal(ends.ema[0], ends.ema[1])
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert (tmp_path / "cut/expert.json").read_bytes() == (tmp_path / "whole/expert.json").read_bytes()


def test_dropout_draws_matter_and_projections_train(
    tmp_path: Path, tiny_config: Callable[..., Config], ends: Ends
) -> None:
    """Guard of the test above: its variants really differ from the plain training."""
    for name in ("plain", "dropout", "accumulation", "flips and workers", "folded projections"):
        finish(variant(name, tiny_config, tmp_path), tmp_path / name)
    hashes = {
        tensors_sha256(read_tensors(tmp_path / name / "model.safetensors")[0])
        for name in VARIANTS
        if (tmp_path / name / "model.safetensors").exists()
    }
    assert len(hashes) == 5


@pytest.mark.parametrize("stops", [[2], [3], [5], [3, 2]])
def test_resumed_training_writes_the_same_log(
    stops: list[int], tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    config = tiny_config()
    finish(config, tmp_path / "whole")
    for num_records in stops:
        stop_after(config, tmp_path / "cut", num_records)
    finish(config, tmp_path / "cut")
    whole = read_records(tmp_path / "whole/log.jsonl")
    assert [r["update"] for r in whole] == [3, 6]
    assert read_records(tmp_path / "cut/log.jsonl") == whole


def test_training_that_dies_in_its_consumer_resumes_bitwise(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    finish(config, tmp_path / "whole")

    def consume() -> None:
        for record in start(config, tmp_path / "cut"):
            if record.update == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    finish(config, tmp_path / "cut")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_state_holds_the_optimisers_step_count(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    stop_after(tiny_config(finetune={"accumulation": 3}), tmp_path / "cut", 5)
    tensors, metadata = read_tensors(tmp_path / "cut/state/state.safetensors")
    assert json.loads(metadata["training"])["num_done"] == 4
    steps = {float(v) for k, v in tensors.items() if k.startswith("optimizer.") and k.endswith(".step")}
    assert steps == {4.0}


def test_state_of_another_network_is_refused(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    stop_after(tiny_config(), tmp_path / "cut", 3)
    with pytest.raises(ValueError, match=r'projection\.placement was "folded" and is "none"'):
        finish(tiny_config(finetune={"projection": {"placement": "none"}}), tmp_path / "cut")


def test_damaged_state_is_refused(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    stop_after(tiny_config(), tmp_path / "cut", 3)
    state = tmp_path / "cut/state/state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        finish(tiny_config(), tmp_path / "cut")


def test_accumulation_counts_optimiser_updates(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    decays: list[tuple[int, float]] = []
    passes: list[int] = []

    def spy_decay(update: int, max_decay: float, power: float) -> float:
        decays.append((update, ema_decay(update, max_decay, power)))
        return decays[-1][1]

    predict = trainer.predict

    def spy_predict(base: Any, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        if network.training:
            passes.append(len(x))
        return predict(base, network, x, t)

    monkeypatch.setattr(ema, "ema_decay", spy_decay)
    monkeypatch.setattr(trainer, "predict", spy_predict)
    records = finish(tiny_config(finetune={"num_updates": 3, "accumulation": 4}), tmp_path / "out")
    assert [r.update for r in records] == [1, 2, 3]
    assert {r.num_updates for r in records} == {3}
    assert passes == [4] * 12
    assert decays == [(s, 1 - (1 + s) ** -0.75) for s in range(3)]


def test_equal_micro_batches_accumulate_to_the_gradient_of_one(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(loop, "training_batches", lambda *_: itertools.repeat(batch))
    monkeypatch.setattr(trainer, "generator", lambda *_: generator("same"))
    for accumulation in (1, 2, 4):
        finish(tiny_config(finetune={"accumulation": accumulation}), tmp_path / str(accumulation))
    weights = [(tmp_path / a / "model.safetensors").read_bytes() for a in "124"]
    assert weights[0] == weights[1] == weights[2]


def test_each_update_sees_new_images_and_new_noise(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    predict = trainer.predict

    def spy(base: Any, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        if network.training:
            seen.append(x.clone())
        return predict(base, network, x, t)

    monkeypatch.setattr(trainer, "predict", spy)
    finish(tiny_config(finetune={"accumulation": 2}), tmp_path / "a")
    finish(tiny_config(finetune={"accumulation": 2}), tmp_path / "b", name="expert-1")
    assert len({tuple(x.flatten().tolist()) for x in seen}) == len(seen) == 24


def test_training_draws_from_its_own_range_only_without_global_prob(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    predict = trainer.predict

    def spy(base: Any, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        if network.training:
            seen.extend(t.tolist())
        return predict(base, network, x, t)

    monkeypatch.setattr(trainer, "predict", spy)
    ranges = tuple(split_timesteps(40, 4))
    finish(tiny_config(finetune={"global_prob": 0.0}), tmp_path / "a", own=ranges[2], ranges=ranges)
    assert set(seen) <= set(range(20, 30))
    assert len(set(seen)) > 3


@pytest.mark.parametrize("placement", ["folded", "trunk"])
def test_teacher_and_student_start_from_the_same_function(
    placement: str, tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    config = tiny_config(finetune={"projection": {"placement": placement}, "num_updates": 2})
    records = finish(config, tmp_path / "out")
    # The first update's consistency loss is measured before the student has moved.
    assert records[0].consistency_loss == pytest.approx(0, abs=1e-10)
    assert records[1].consistency_loss > 1e-9


def test_base_is_unchanged_by_training(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(finetune={"learning_rate": 0.01})
    base = load_base(config.base)
    before = tensors_sha256(base.network.state_dict())
    images = load_images(config.data, base.channels, base.image_size)
    ranges = tuple(split_timesteps(40, 2))
    task = Task("expert-0", ranges[0], ranges)
    list(train(base, images, config.data, task, config.finetune, 0, tmp_path / "out"))
    trained, _ = read_tensors(tmp_path / "out/model.safetensors")
    assert tensors_sha256(base.network.state_dict()) == before == base.sha256 != tensors_sha256(trained)
    assert trained.keys() == base.network.state_dict().keys()


def test_teacher_is_the_original_at_every_update(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(finetune={"learning_rate": 0.01})
    original = load_base(config.base)
    hashes: list[str] = []
    predict = trainer.predict
    inside = [False]

    def spy(base: Any, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        if not network.training and not inside[0]:
            hashes.append(tensors_sha256(network.state_dict()))
        return predict(base, network, x, t)

    def validation(*arguments: Any) -> list[float]:
        inside[0] = True
        losses = VALIDATION(*arguments)
        inside[0] = False
        return losses

    monkeypatch.setattr(trainer, "predict", spy)
    monkeypatch.setattr(trainer, "validation_losses", validation)
    finish(config, tmp_path / "out")
    assert hashes == [original.sha256] * 6


VALIDATION = validation_losses


def test_validation_touches_no_weights(tmp_path: Path, tiny_config: Callable[..., Config], ends: Ends) -> None:
    config = tiny_config(base=dropout_base(tmp_path / "dropout"))
    for every in (1, 2, 100):
        changed = config.finetune.model_copy(update={"validate_every": every})
        finish(config.model_copy(update={"finetune": changed}), tmp_path / str(every))
    assert equal(ends.raw[0], ends.raw[1])
    assert equal(ends.raw[0], ends.raw[2])
    assert equal(ends.ema[0], ends.ema[1])
    assert equal(ends.ema[0], ends.ema[2])


def test_validation_covers_every_range_and_uses_the_averaged_weights(
    tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    config = tiny_config(finetune={"num_ranges": 4})
    records = finish(config, tmp_path / "out")
    base = load_base(config.base)
    images = load_images(config.data, base.channels, base.image_size)
    base.network.load_state_dict(read_tensors(tmp_path / "out/model.safetensors")[0])
    ranges = tuple(split_timesteps(40, 4))
    held_out = held_out_images(images, config.data)
    again = VALIDATION(base.network, held_out, base, ranges, torch.device("cpu"), 128)
    assert records[-1].validation == pytest.approx(again, rel=1e-5)
    assert len(again) == 4


def test_validation_takes_no_more_images_at_once_than_training(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def predict(base: Any, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return torch.zeros_like(x)

    monkeypatch.setattr(validation, "predict", predict)
    finish(tiny_config(finetune={"batch_size": 3}), tmp_path / "out")
    assert max(sizes) == 3


def test_a_uniform_density_has_no_mean_and_no_deviation() -> None:
    assert Training(density="uniform").density == Density(name="uniform")
    with pytest.raises(ValueError, match=r"density is uniform, and has mean 1.0 and std 1.0: leave both out"):
        Training(density={"name": "uniform", "mean": 1.0})


def test_learning_rate_is_constant_after_warm_up() -> None:
    settings = Training(learning_rate=0.5, num_updates=10, num_warmup_updates=4)
    assert [learning_rate_at(s, settings) for s in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("setting", [{"floor": 0.01}, {"decay_fraction": 0.5}])
def test_a_constant_rate_takes_no_fall(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"and the rate is constant: set schedule to cosine or linear, or leave both"):
        Training(**setting)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup", "fraction", "floor"), [(0, 1.0, 0.0), (10, 1.0, 0.1), (10, 0.8, 0.01)])
def test_learning_rate_falls_in_closed_form(schedule: str, warmup: int, fraction: float, floor: float) -> None:
    settings = Training(
        learning_rate=2.0,
        num_updates=100,
        schedule=schedule,
        num_warmup_updates=warmup,
        decay_fraction=fraction,
        floor=floor,
    )
    end = round(100 * fraction)
    middle = (warmup + end) // 2
    assert learning_rate_at(warmup, settings) == pytest.approx(2.0)
    assert learning_rate_at(middle, settings) == pytest.approx(2 * (floor + (1 - floor) / 2))
    quarter = warmup + (end - warmup) / 4
    fall = 0.75 if schedule == "linear" else (1 + math.sqrt(0.5)) / 2
    if quarter == int(quarter):
        assert learning_rate_at(int(quarter), settings) == pytest.approx(2 * (floor + (1 - floor) * fall))
    assert learning_rate_at(end, settings) == pytest.approx(2 * floor, abs=1e-12)
    assert learning_rate_at(99, settings) >= 2 * floor
    if fraction < 1:
        assert {learning_rate_at(s, settings) for s in range(end, 100)} == {learning_rate_at(end, settings)}
    rates = [learning_rate_at(s, settings) for s in range(warmup, 100)]
    assert rates == sorted(rates, reverse=True)


def test_records_carry_the_rate_that_was_used(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(finetune={"schedule": "linear", "num_warmup_updates": 2})
    records = finish(config, tmp_path / "out")
    assert [r.learning_rate for r in records] == [learning_rate_at(s, config.finetune) for s in range(6)]


def test_ema_decay_is_the_closed_form() -> None:
    assert ema_decay(0, 0.9999, 0.75) == 0
    assert ema_decay(15, 0.9999, 0.75) == pytest.approx(1 - 1 / 8)
    assert ema_decay(10**9, 0.9999, 0.75) == 0.9999
    assert ema_decay(3, 0.5, 1.0) == 0.5


def test_ema_is_the_recursion_over_the_raw_weights(
    tmp_path: Path, tiny_config: Callable[..., Config], ends: Ends
) -> None:
    """Runs of 1 to 4 updates share their prefix, so their ends are the raw weights after each update."""
    for num_updates in range(1, 5):
        finish(tiny_config(finetune={"num_updates": num_updates}), tmp_path / str(num_updates))
    average = ends.raw[0]
    for s in range(1, 4):
        decay = 1 - (1 + s) ** -0.75
        average = {k: decay * average[k] + (1 - decay) * v for k, v in ends.raw[s].items()}
    for name, value in ends.ema[3].items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)


def test_consistency_weight_zero_builds_no_teacher(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    new_network = parametrisation.new_network
    monkeypatch.setattr(parametrisation, "new_network", lambda *a: built.append(a) or new_network(*a))
    records = finish(tiny_config(finetune={"consistency_weight": 0}), tmp_path / "out")
    assert len(built) == 1
    assert {r.consistency_loss for r in records} == {0.0}


def test_consistency_weight_changes_the_training(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    for weight in (0, 1, 5):
        finish(tiny_config(finetune={"consistency_weight": weight}), tmp_path / str(weight))
    assert len({(tmp_path / w / "model.safetensors").read_bytes() for w in "015"}) == 3


def test_loss_decreases_on_tiny_data(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    images = np.tile(np.linspace(0, 255, 8).astype(np.uint8), (48, 8, 1))
    np.savez(tmp_path / "ramps.npz", images=images)
    config = tiny_config(
        data={"source": str(tmp_path / "ramps.npz")},
        finetune={
            "num_updates": 60,
            "batch_size": 16,
            "learning_rate": 0.005,
            "validate_every": 5,
            "consistency_weight": 0,
            "global_prob": 1,
        },
    )
    log = [r.validation for r in finish(config, tmp_path / "out") if r.validation is not None]
    assert sum(log[-1]) < 0.7 * sum(log[0])


def test_expert_record_holds_the_bases_hash_and_the_task(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    finish(config, tmp_path / "out")
    record = json.loads((tmp_path / "out/expert.json").read_text())
    assert record["base_sha256"] == load_base(config.base).sha256
    assert record["own"] == {"low": 0, "high": 20}
    assert record["training"]["consistency_weight"] == 1.0
    assert record["training"]["num_updates"] == 6
    assert record["step_shares"] == [0.5, 0.5]
    assert record["seed"] == config.seed
    assert len(record["data"]["sha256"]) == 64


def test_finished_training_has_no_state_and_is_not_done_again(
    tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    folder = tmp_path / "out"
    finish(tiny_config(), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["expert.json", "log.jsonl", "model.safetensors"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert finish(tiny_config(), folder) == []
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_loss_that_is_not_finite_ends_the_training(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at update .*lower the learning rate"):
        finish(tiny_config(finetune={"learning_rate": 1e30, "num_updates": 20}), tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").exists()


def test_bf16_trains_in_a_process_that_trained_in_float32(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    finish(tiny_config(), tmp_path / "float32")
    finish(tiny_config(finetune={"mixed_precision": "bf16"}), tmp_path / "bf16")
    weights = [read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("float32", "bf16")]
    assert {v.dtype for v in weights[1].values()} == {torch.float32}
    assert not equal(*weights)
    start = load_base(tiny_config().base).network.state_dict()
    moves = [torch.cat([(found[key] - start[key]).flatten() for key in start]) for found in weights]
    assert torch.cosine_similarity(*moves, dim=0) > 0.9


def test_bf16_resumes_bitwise(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(finetune={"mixed_precision": "bf16"})
    finish(config, tmp_path / "whole")
    stop_after(config, tmp_path / "cut", 3)
    finish(config, tmp_path / "cut")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_tensorboard_tracks_into_the_experts_folder(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    finish(tiny_config(finetune={"tracker": "tensorboard"}), tmp_path / "out")
    assert list((tmp_path / "out/tracker").rglob("events.out.tfevents*"))


def test_a_compiled_layer_without_its_gradient_is_named_and_rounding_is_not() -> None:
    """Inductor once gave deep layers a gradient of zero, while the loss and the other layers were right."""
    gradient = torch.linspace(-1, 1, 9)
    expected = {"kept": gradient, "zeroed": gradient, "missing": gradient}
    found = {"kept": gradient * 1.05, "zeroed": torch.zeros(9)}
    assert differing_gradients(found, expected) == ["zeroed", "missing"]


def test_a_compiled_training_whose_gradients_are_wrong_is_refused(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(finetune={"compile": True})
    base = load_base(config.base)
    images = load_images(config.data, base.channels, base.image_size)
    ranges = tuple(split_timesteps(base.num_train_timesteps, 2))
    # Compiling takes minutes; a network that is left eager passes the check, and one with a layer cut off must not.
    monkeypatch.setattr(nn.Module, "compile", lambda self, options: None)
    list(train(base, images, config.data, Task("fine", ranges[0], ranges), config.finetune, 0, tmp_path / "fine"))
    stances = []
    set_stance = torch.compiler.set_stance

    def remember(stance: str) -> Any:
        stances.append(stance)
        return set_stance(stance)

    monkeypatch.setattr(torch.compiler, "set_stance", remember)

    def cut(gradient: Tensor) -> Tensor:
        return gradient * 0 if stances[-1] == "default" else gradient

    attach = parametrisation.new_network

    def with_a_cut(*args: Any) -> nn.Module:
        network = attach(*args)
        network.get_submodule("down_blocks.0.resnets.0.conv1").weight.register_hook(cut)
        return network

    monkeypatch.setattr(parametrisation, "new_network", with_a_cut)
    with pytest.raises(
        ValueError, match=r"torch.compile changes the gradients of 1 parameters, down_blocks.0.resnets.0"
    ):
        list(train(base, images, config.data, Task("cut", ranges[0], ranges), config.finetune, 0, tmp_path / "cut"))
