"""A merged model pulled towards its experts: their outputs are the targets, and what it ends as is a stock pipeline."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from decouple_merge.cli import main as cli
from decouple_merge.config import Config, Data, Distil
from decouple_merge.data.batches import training_batches
from decouple_merge.data.sources import load_images
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.errors import UserError
from decouple_merge.experiment.distilling import distil
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.workflow import run
from decouple_merge.merging.arithmetic import Tensors, merge
from decouple_merge.models.base import Base, load_base
from decouple_merge.models.network import build_network, predict
from decouple_merge.training.distillation import Distillation
from decouple_merge.training.records import StepRecord
from decouple_merge.training.trainer import Task, Trainer

CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base))


def moved(base: Base, seed: int) -> Tensors:
    draws = torch.Generator().manual_seed(seed)
    return {k: v + 0.05 * torch.randn(v.shape, generator=draws) for k, v in base.network.state_dict().items()}


def distillation_to(base: Base, experts: list[Tensors], start: Tensors) -> Distillation:
    half = base.num_train_timesteps // 2
    ranges = [TimestepRange(0, half), TimestepRange(half, base.num_train_timesteps)]
    return Distillation(start, [build_network(base, e) for e in experts], ranges, {})


def training(base: Base, images_of: Path, distillation: Distillation, **changes: Any) -> tuple[Trainer, Iterator[Any]]:
    settings = Distil.model_validate({"batch_size": 8, "learning_rate": 1e-3, "num_updates": 1000} | changes)
    task = Task("distilled", TimestepRange(0, base.num_train_timesteps), tuple(distillation.ranges))
    images = load_images(Data(source=str(images_of)), 1, 8)
    batches = training_batches(images, Data(num_held_out=8), settings.batch_size, 0, 0, settings.num_updates)
    return Trainer(base, task, settings, 0, distillation), batches


def test_the_target_of_each_image_is_the_output_of_the_expert_of_its_timestep(base: Base) -> None:
    experts = [moved(base, 1), moved(base, 2)]
    x = torch.randn(5, *base.shape, generator=torch.Generator().manual_seed(0))
    last = base.num_train_timesteps - 1
    t = torch.tensor([last, 0, last // 2, last // 2 + 1, 3])
    found = distillation_to(base, experts, {}).target(base, x, t, {})
    for place, expert in enumerate([1, 0, 0, 1, 0]):
        with torch.no_grad():
            own = predict(base, build_network(base, experts[expert]), x[place : place + 1], t[place : place + 1])
        torch.testing.assert_close(found[place : place + 1], own, rtol=1e-4, atol=1e-5)


def test_a_model_that_says_what_its_teachers_say_stays_as_it_is(base: Base, tiny_images: Path) -> None:
    start = moved(base, 1)
    # Of what rounding leaves, AdamW would make steps of full length.
    kept = {"weight_decay": 0.0, "eps": 1e-3}
    trainer, batches = training(base, tiny_images, distillation_to(base, [start, start], start), **kept)
    for _ in range(3):
        trainer.update(batches)
    assert trainer.mean_losses() == (pytest.approx(0, abs=1e-10), 0.0)
    torch.testing.assert_close(trainer.weights(), start, rtol=0, atol=5e-4)


def test_a_merge_comes_nearer_to_its_experts(base: Base, tiny_images: Path) -> None:
    experts = [moved(base, 1), moved(base, 2)]
    start = merge(base.network.state_dict(), experts, [0.5, 0.5])
    trainer, batches = training(base, tiny_images, distillation_to(base, experts, start), learning_rate=4e-3)
    found = []
    for _ in range(3):
        for _ in range(20):
            trainer.update(batches)
        found.append(trainer.mean_losses()[0])
        trainer.forget_losses()
    assert found[2] < 0.9 * found[0]


def config_of(tiny_config: Callable[..., Config], **search: Any) -> Config:
    section = {"num_updates": 4, "batch_size": 4, "validate_every": 2, "checkpoint_every": 2}
    return tiny_config(
        search={"num_finalists": 0} | search, finetune={"baseline": False}, distil=section, evaluate={"num_images": 6}
    )


def test_a_run_ends_with_a_stock_pipeline_and_its_numbers(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config, folder = config_of(tiny_config), tmp_path / "run"
    list(run(config, folder))
    weights = load_file(folder / "distilling/model.safetensors")
    stock = DDPMPipeline.from_pretrained(folder / "distilled").unet.state_dict()
    assert all(torch.equal(stock[key], weights[key]) for key in stock)
    merged = load_file(folder / "merged/unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(stock[key], merged[key]) for key in stock)
    models = [json.loads(line)["model"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert set(models) == {"pretrained", "ensemble", "merged", "distilled"}
    assert "4 updates towards the outputs of its experts" in (folder / "distilled/README.md").read_text()
    assert (folder / "samples/distilled/0.png").exists()
    record = json.loads((folder / "merged/merge.json").read_text())
    made = json.loads((folder / "distilling/expert.json").read_text())
    assert (made["merged_sha256"], made["experts_sha256"]) == (record["merged_sha256"], record["experts_sha256"])

    assert config.distil is not None
    longer = config.distil.model_copy(update={"num_updates": 5})
    with pytest.raises(UserError, match=r"distilling was made from something else: training.num_updates was 4"):
        prepare(config.model_copy(update={"distil": longer}), folder)
    again = prepare(config, folder)
    assert not [event for event in distil(again) if isinstance(event, StepRecord)]
    (folder / "distilling/model.safetensors").unlink()
    changed = {**made, "merged_sha256": "0" * 64}
    (folder / "distilling/expert.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="distilling was made from something else: merged_sha256 was 0000"):
        list(distil(again))


def test_a_killed_distillation_goes_on_to_the_same_bytes(base: Base, tiny_images: Path, tmp_path: Path) -> None:
    experts = [moved(base, 1), moved(base, 2)]
    found = []
    for stops in (6, 3):
        trainer, batches = training(base, tiny_images, distillation_to(base, experts, experts[0]))
        for _ in range(stops):
            trainer.update(batches)
        if stops < 6:
            trainer.save(tmp_path / "state.safetensors")
            trainer, batches = training(base, tiny_images, distillation_to(base, experts, experts[0]))
            trainer.load(tmp_path / "state.safetensors")
            for _ in islice(batches, 3):
                pass
            while trainer.num_done < 6:
                trainer.update(batches)
        found.append(trainer.weights())
    assert all(np.array_equal(found[0][key].numpy(), found[1][key].numpy()) for key in found[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"over": "baseline"}}, "distil pulls a merge towards its experts"),
        ({"finetune": {"projection": {"placement": "trunk"}}}, "placement is trunk"),
        ({"distil": {"num_updates": 0}}, "greater than 0"),
        ({"distil": {"density": "uniform"}}, "distil.density is set, and timesteps are drawn as the experts': set fin"),
    ],
)
def test_what_cannot_be_distilled_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"distil": {}} | changes)


def test_a_run_without_a_merge_says_so(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="merged is missing: distil begins with the merged model"):
        list(distil(prepare(config_of(tiny_config), tmp_path / "run")))


def test_the_verb_leaves_a_run_that_it_cannot_distil_as_it_is(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_config(search={"over": "baseline"}, finetune={"baseline": True})
    run_folder = tmp_path / "run"
    prepare(config, run_folder)
    before = (run_folder / "config.yaml").read_bytes()
    result = CliRunner().invoke(cli.app, ["distil", str(run_folder), "--set", "num_updates=3"])
    assert "distil pulls a merge towards its experts" in str(result.exception)
    assert (run_folder / "config.yaml").read_bytes() == before
