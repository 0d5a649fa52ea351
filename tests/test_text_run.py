"""The whole job on a tiny Stable Diffusion pipeline: finetune, search, merge, evaluate, load in stock diffusers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import WORDS, save_clip, stock_images
from decouple_merge.config import Config, Protocol, Sample, Text, dump_config
from decouple_merge.data import latents
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.experiment import finetuning, workflow
from decouple_merge.experiment.dry_run import describe
from decouple_merge.experiment.plan import check, prepare
from decouple_merge.experiment.planned import Plan
from decouple_merge.experiment.results import Row
from decouple_merge.experiment.table_models import denoiser_of
from decouple_merge.models.base import load_base
from decouple_merge.models.network import new_network
from decouple_merge.sampling.folder import sample_model
from decouple_merge.sampling.sampler import sample_images
from decouple_merge.searching.learned import DenoisingLoss
from decouple_merge.seeds import generator
from decouple_merge.storage.files import read_records
from decouple_merge.training import trainer
from decouple_merge.training.fisher import fisher_information
from decouple_merge.training.gradient import noisy_batch
from decouple_merge.training.records import StepRecord

OWN_CACHE = True
CPU = torch.device("cpu")
MODELS = ["pretrained", "baseline-finetuned", "ensemble", "merged"]
MakeConfig = Callable[..., Config]


pytestmark = pytest.mark.usefixtures("every_record")


def test_the_whole_job(text_config: MakeConfig, tmp_path: Path) -> None:
    clip = str(save_clip(tmp_path / "clip"))
    metrics = ["clip_score", "fd_effnetlite0", "kd_effnetlite0"]
    config, folder = text_config(evaluate={"clip": clip, "metrics": metrics}), tmp_path / "run"
    events = list(workflow.run(config, folder))
    assert events[:2] == ["texts: 7 of 7 computed", "latents: 24 of 24 computed"]
    assert {e.name for e in events if isinstance(e, StepRecord)} == {"expert-0", "expert-1", "baseline-finetuned"}
    assert {e.model: e.metric for e in events if isinstance(e, Row)} == dict.fromkeys(MODELS, "kd_effnetlite0")
    records = read_records(folder / "metrics.jsonl")
    assert {(r["model"], r["metric"]) for r in records} == {(m, n) for m in MODELS for n in config.evaluate.metrics}
    assert len({r["prompts"] for r in records}) == 1
    assert records[0]["prompts"].endswith("guidance 3")
    # Six images of the prompts that six seeds have, in a run as by itself.
    (tmp_path / "prompts.json").write_text(json.dumps(check(config, folder).prompts))
    text = Text(prompts=tmp_path / "prompts.json", guidance_scale=3.0)
    settings = Protocol(metrics=["clip_score"], num_images=6, clip=clip, sample=config.sample, text=text)
    alone = evaluate_model(str(folder / "merged"), None, settings)
    (value,) = (r["value"] for r in records if (r["model"], r["metric"]) == ("merged", "clip_score"))
    assert [r["value"] for r in alone if isinstance(r, dict)] == [pytest.approx(value, rel=1e-5)]
    # A start at the sum and at the base is among the candidates, so the best is no worse than the base.
    values = {tuple(r["weights"]): r["value"] for r in read_records(folder / "search/trials.jsonl")}
    record = json.loads((folder / "merged/merge.json").read_text())
    assert values[tuple(record["weights"])] == min(values.values()) <= values[(0.0, 0.0)]
    # The merged network is base + Σ w_i (expert_i - base).
    start, merged = (
        load_file(f / "unet/diffusion_pytorch_model.safetensors") for f in (Path(config.base), folder / "merged")
    )
    experts = [load_file(folder / f"experts/{i}/model.safetensors") for i in range(2)]
    for key, value in start.items():
        expected = value + sum(w * (e[key] - value) for w, e in zip(record["weights"], experts, strict=True))
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)
    # Stock diffusers draws the images of the run's own sampler.
    plan = check(config, folder)
    assert type(StableDiffusionPipeline.from_pretrained(folder / "merged")) is StableDiffusionPipeline
    assert 'pipeline("a prompt"' in (folder / "merged/README.md").read_text()
    theirs = stock_images(
        folder / "merged", [plan.prompts[0], plan.prompts[1]], [0, 1], num_inference_steps=3, guidance_scale=3.0
    )
    for seed in (0, 1):
        ours = np.asarray(Image.open(folder / f"samples/merged/{seed}.png")).astype(int)
        assert abs((theirs[seed] * 255).round() - ours).max() <= 1
    assert not any(isinstance(e, StepRecord) for e in workflow.run(config, folder))


def opened(config: Config, folder: Path) -> Plan:
    plan = prepare(config, folder)
    list(plan.images.fill())  # type: ignore[attr-defined]
    return plan


def test_training_goes_on_bitwise_after_an_interruption(text_config: MakeConfig, tmp_path: Path) -> None:
    config = text_config(finetune={"baseline": False})
    weights = []
    for name, stop in (("whole", False), ("interrupted", True)):
        plan = opened(config, tmp_path / name)
        events = finetuning.finetune_experts(plan, 1)
        while stop and getattr(next(events), "update", 0) < 3:
            pass
        events.close()
        list(finetuning.finetune_experts(plan, 1))
        weights.append(load_file(tmp_path / name / "experts/1/model.safetensors"))
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_the_experts_need_the_encoders_only_once(
    text_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = opened(text_config(finetune={"baseline": False}), tmp_path / "run")
    monkeypatch.setattr(latents, "load_vae", None)
    monkeypatch.setattr(latents, "load_text_encoders", None)
    list(finetuning.finetune_experts(plan))
    assert (tmp_path / "run/experts/1/model.safetensors").exists()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_gives_each_image_its_caption_and_the_teacher_too(
    text_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    config = text_config(
        finetune={"baseline": False, "num_updates": 1, "global_prob": 0.0}, data={"caption_dropout": dropout}
    )
    plan, seen = opened(config, tmp_path / "run"), []
    predict = trainer.predict

    def spy(base: Any, network: nn.Module, x: Tensor, t: Any, **condition: Tensor) -> Tensor:
        seen.append((x, condition["encoder_hidden_states"]))
        return predict(base, network, x, t, **condition)

    monkeypatch.setattr(trainer, "predict", spy)
    list(finetuning.finetune_experts(plan, 0))
    (x, text), (same_x, same_text) = seen[:2]
    assert torch.equal(x, same_x)
    assert torch.equal(text, same_text)
    known = plan.images.texts.embed(["", *WORDS])["encoder_hidden_states"]  # type: ignore[attr-defined]
    found = [next(i for i, row in enumerate(known) if torch.equal(row, t)) for t in text]
    assert (0 in found) == (dropout > 0)


def test_the_gradient_of_the_merging_weights_is_that_of_the_captioned_loss(
    text_config: MakeConfig, tmp_path: Path
) -> None:
    base = load_base(text_config().base)
    draws = torch.Generator().manual_seed(0)
    start = base.network.state_dict()
    expert = {k: v + 0.02 * torch.randn(v.shape, generator=draws) for k, v in start.items()}
    plan = opened(text_config(), tmp_path / "run")
    batch = noisy_batch(base, plan.images.stack(range(6)), TimestepRange(0, 40), draws)
    loss = DenoisingLoss(base, [expert], CPU)
    at = torch.tensor([[0.5]], dtype=torch.float64)
    _, gradient = loss(at, batch)
    step = 1e-2
    slope = (loss(at + step, batch)[0] - loss(at - step, batch)[0]) / (2 * step)
    torch.testing.assert_close(gradient.item(), slope, rtol=2e-2, atol=1e-5)


def test_fisher_information_is_of_the_captioned_loss(text_config: MakeConfig, tmp_path: Path) -> None:
    base = load_base(text_config().base)
    batch = opened(text_config(), tmp_path / "run").images.stack(range(3))
    own = TimestepRange(0, 20)
    found = fisher_information(base, base.network.state_dict(), own, [batch], 7, CPU)
    noisy = noisy_batch(base, batch, own, generator(7, "fisher", 0))
    network = new_network(base).eval()
    sums = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for i in range(3):
        text = noisy.condition["encoder_hidden_states"][i : i + 1]
        output = network(noisy.x_t[i : i + 1], noisy.t[i : i + 1], encoder_hidden_states=text).sample
        network.zero_grad()
        (output - noisy.target[i : i + 1]).square().mean().backward()
        for name, p in network.named_parameters():
            sums[name] += 0 if p.grad is None else p.grad.square() / 3
    for name, expected in sums.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-9)
    assert found["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].max() > 0


def test_gradient_checkpointing_changes_no_bit(
    text_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    weights, num_calls = [], []
    for value in (False, True):
        config = text_config(finetune={"baseline": False, "num_updates": 2, "gradient_checkpointing": value})
        list(finetuning.finetune_experts(prepare(config, tmp_path / str(value)), 0))
        weights.append(load_file(tmp_path / str(value) / "experts/0/model.safetensors"))
        num_calls.append(len(calls))
    assert num_calls[0] == 0 < num_calls[1]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_prompts_are_the_captions_in_an_order_of_their_own(text_config: MakeConfig, tmp_path: Path) -> None:
    plan = check(text_config(), tmp_path / "run")
    captions = [WORDS[i % len(WORDS)] for i in range(24)]
    assert plan.prompts != captions
    assert sorted(plan.prompts) == sorted(captions)
    assert check(text_config(seed=5), tmp_path / "other").prompts == plan.prompts


def test_a_prompt_file_takes_the_captions_place(text_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("moon\nsea\n")
    plan = check(text_config(text={"prompts": str(tmp_path / "prompts.txt")}), tmp_path / "run")
    assert plan.prompts == ["moon", "sea"]


def test_a_dry_run_says_what_is_asked_for(text_config: MakeConfig, tmp_path: Path) -> None:
    lines = list(describe(text_config(), tmp_path / "run"))
    assert any(line.endswith("52,004 parameters, 16 x 16") for line in lines)
    assert "prompts: 24, guidance 3" in lines


def test_checking_computes_nothing(text_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "load_vae", None)
    monkeypatch.setattr(latents, "load_text_encoders", None)
    check(text_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_captions_are_checked_before_any_compute(text_config: MakeConfig, tiny_captioned: Path, tmp_path: Path) -> None:
    (tiny_captioned / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"captioned has no metadata.jsonl, which holds the captions"):
        check(text_config(), tmp_path / "run")


def test_the_command_draws_from_a_runs_ensemble_with_its_prompts_or_others(
    text_config: MakeConfig, tmp_path: Path
) -> None:
    config, folder = text_config(finetune={"baseline": False}), tmp_path / "run"
    plan = prepare(config, folder)
    list(finetuning.finetune_experts(plan))
    assert (folder / "config.yaml").read_text() == dump_config(config)
    sample_model(str(folder), tmp_path / "out", 3, 5, Sample(sampler="PNDM", num_steps=3))
    prompts = plan.open_prompts(CPU)
    (expected,) = sample_images(
        denoiser_of(plan, "ensemble", CPU), plan.base, [5, 6, 7], config.sample, CPU, prompts=prompts
    )
    for seed, image in zip((5, 6, 7), expected, strict=True):
        found = np.asarray(Image.open(tmp_path / f"out/{seed}.png")).astype(int)
        assert abs(found - image.permute(1, 2, 0).numpy().astype(int)).max() <= 1
