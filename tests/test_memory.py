"""The memory estimate: what tiny models take indeed, and that it needs no weights."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from conftest import make_text_unet, save_stable_diffusion
from decouple_merge.config import Config, Distance
from decouple_merge.data.batches import training_batches
from decouple_merge.experiment import plan as plan_module
from decouple_merge.experiment import trainings
from decouple_merge.experiment.dry_run import describe
from decouple_merge.experiment.memory import estimate
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.selection import open_merger, open_scorer
from decouple_merge.merging.merger import Merger
from decouple_merge.models.base import load_base
from decouple_merge.models.parts import load_text_encoders, load_vae
from decouple_merge.seeds import generator
from decouple_merge.training.state import optimizer_states
from decouple_merge.training.trainer import Trainer

CPU = torch.device("cpu")
MakeConfig = Callable[..., Config]
LORA = {"lora": {"rank": 3}, "projection": {"placement": "none"}}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes that tensors hold, those of views and of shared memory once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def parts_of(config: Config, name: str) -> dict[str, int]:
    return next(stage.parts for stage in estimate(config) if stage.name == name)


@pytest.mark.parametrize("kind", ["pixels", "text"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"projection": {"placement": "trunk"}},
        {"projection": {"placement": "none"}, "consistency_weight": 0.0},
        LORA,
        {"optimizer": "adamw8bit"},
    ],
    ids=["folded", "trunk", "without teacher", "lora", "8 bits"],
)
def test_a_training_takes_what_is_said(
    tiny_config: MakeConfig, text_config: MakeConfig, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    if "optimizer" in settings:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    config = {"pixels": tiny_config, "text": text_config}[kind](finetune=settings)
    opened = prepare(config, tmp_path / "run")
    trainer = Trainer(opened.base, trainings.expert_task(opened, 0), config.finetune, 0)
    batch = next(training_batches(opened.images, config.data, 4, 0, 0, 1))
    loss = trainer.losses(batch, generator("memory")).total.mean()
    loss.backward()
    gradients = num_bytes(p.grad for p in trainer.parameters if p.grad is not None)
    trainer.optimizer.step()
    moments = optimizer_states(trainer.optimizer)
    found = {
        "network": num_bytes([*trainer.network.parameters(), *trainer.network.buffers()]),
        "teacher": num_bytes(trainer.teacher.parameters()) if isinstance(trainer.teacher, nn.Module) else 0,
        "gradients": gradients,
        "EMA": num_bytes(trainer.ema.values),
        "moments": num_bytes(v for s in moments for v in s.values() if isinstance(v, Tensor)),
    }
    assert parts_of(config, "finetuning an expert") == found
    assert (found["teacher"] == 0) == (settings.get("consistency_weight") == 0 or "lora" in settings)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_encoding_takes_what_is_said_whatever_is_stored(
    text_config: MakeConfig, tmp_path: Path, stored: torch.dtype
) -> None:
    folder = save_stable_diffusion(tmp_path / "base", parts_dtype=stored)
    config, encoders = text_config(base=str(folder)), load_base(str(folder)).encoders
    assert encoders is not None
    texts = num_bytes(load_text_encoders(encoders, CPU).text_encoder.parameters())
    assert parts_of(config, "encoding texts") == {"text_encoder": texts}
    assert parts_of(config, "encoding images") == {"VAE": num_bytes(load_vae(encoders, CPU).parameters())}


def test_both_text_encoders_count(text_config: MakeConfig, tiny_sdxl_base: Path) -> None:
    parts = parts_of(text_config(base=str(tiny_sdxl_base)), "encoding texts")
    assert list(parts) == ["text_encoder", "text_encoder_2"]
    assert 0 < parts["text_encoder"] < parts["text_encoder_2"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_search_holds_one_network_in_the_precision_it_draws_in(
    text_config: MakeConfig, tmp_path: Path, precision: str
) -> None:
    opened = prepare(text_config(sample={"precision": precision}, search={"num_finalists": 0}), tmp_path / "run")
    scorer = open_scorer(opened, open_merger(opened, [opened.base.network.state_dict()] * 2, ["0"] * 2))
    assert scorer.prompts is not None
    found = {f"network in {precision}": num_bytes(scorer.network.parameters())}
    found |= {"VAE": num_bytes(scorer.prompts.vae.parameters())}
    assert parts_of(opened.config, "searching, each worker").items() >= found.items()
    assert parts_of(opened.config, "drawing, one model") == found


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_base_in_half_precision_is_widened_in_memory_and_a_wide_one_is_mapped(
    text_config: MakeConfig, tmp_path: Path, stored: torch.dtype
) -> None:
    folder = save_stable_diffusion(tmp_path / "base", make_text_unet().to(stored))
    config, size = text_config(base=str(folder)), 52_004 * 4
    said = {stage.name: stage.parts for stage in estimate(config)}
    assert said.get("besides on the CPU") == (None if stored == torch.float32 else {"base": size})
    files = {"base": size if stored == torch.float32 else 0, "2 experts": 2 * size}
    assert said["in files that are mapped, as far as memory is left"] == files
    assert said["writing the merged model"]["merge as it is written"] == 52_004 * stored.itemsize


def test_the_network_is_counted_from_its_config_alone(text_config: MakeConfig, tmp_path: Path) -> None:
    unet = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    (tmp_path / "sdxl/unet").mkdir(parents=True)
    (tmp_path / "sdxl/model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (tmp_path / "sdxl/unet/config.json").write_text(json.dumps(unet))
    config = text_config(base=str(tmp_path / "sdxl"), finetune={"num_ranges": 4, "projection": {"placement": "none"}})
    size = 2_567_463_684 * 4
    expected = {"network": size, "teacher": size, "gradients": size, "EMA": size}
    assert parts_of(config, "finetuning an expert").items() >= expected.items()
    stages = {stage.name: stage for stage in estimate(config)}
    # The largest tensor is a convolution: five versions of it, four task vectors, six of the merge.
    merging = 15 * 1280 * 2560 * 9 * 4
    assert stages["searching, each worker"].total == size + merging
    assert stages["writing the merged model"].total == 2 * size + merging
    assert stages["learning a start of the search"].total == 3 * size + merging
    assert str(stages["drawing, the ensemble"]) == "drawing, the ensemble: 4 of 4 networks in fp32 41.1 GB"
    assert "drawing with an expert besides" not in stages
    watched = config.model_copy(update={"finetune": config.finetune.model_copy(update={"distance": Distance()})})
    parts = {"averaged weights": size, "expert and base in fp32": 2 * size, "VAE": 0}
    assert parts_of(watched, "drawing with an expert besides") == parts
    alone = config.model_copy(update={"sample": config.sample.model_copy(update={"one_resident": True})})
    assert parts_of(alone, "drawing, the ensemble") == {"1 of 4 networks in fp32": size, "VAE": 0}


def test_what_a_rule_keeps_of_every_expert_counts(tiny_config: MakeConfig) -> None:
    config = tiny_config(search={"method": "tsv_m", "low": 0.0})
    base, num = load_base(config.base).network.state_dict(), config.num_combined
    experts = [{k: v + torch.randn(v.shape) for k, v in base.items()} for _ in range(num)]
    merger = Merger(base, experts, method="tsv_m", device=CPU)
    merger.merge(merger.zeros)
    kept = [factors for context, _ in merger.known.values() for factors in context.statistics if factors]
    assert (
        num_bytes(t for factors in kept for t in factors)
        == parts_of(config, "searching, each worker")["what tsv_m keeps"]
    )


def test_it_is_said_before_anything_is_loaded(
    text_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", loads)
    monkeypatch.setattr(plan_module, "check", loads)
    lines = describe(text_config(), tmp_path / "run")
    assert next(lines).startswith("memory, without activations, which grow with batch_size")
    assert next(lines).startswith("  encoding texts: text_encoder ")
    with pytest.raises(AssertionError, match="loaded"):
        list(lines)


def test_what_is_wrong_with_a_base_is_the_checks_to_say(
    tiny_config: MakeConfig, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"base .*nowhere' can't be loaded"):
        list(describe(tiny_config(base=str(tmp_path / "nowhere")), tmp_path / "run"))
    weights = tiny_base / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"can't be loaded|its weights file is damaged"):
        list(describe(tiny_config(), tmp_path / "run"))
    (tiny_base / "unet/config.json").write_text('{"_class_name": "Nothing"}')
    with pytest.raises(ValueError, match="can't be loaded"):
        list(describe(tiny_config(), tmp_path / "run"))
