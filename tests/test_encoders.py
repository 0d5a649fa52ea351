"""DINOv2 and CLIP encoders on tiny random models, against transformers' own models and image processing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from decouple_merge.config import Protocol
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.evaluation.extractors import load_extractor
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.results import evaluate_models, wanted_records
from decouple_merge.models.encoders import ENCODERS, load_encoder, resize_pillow, resize_plain

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_model(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    if kind == "clip":
        text = {**SIZES, "vocab_size": 64, "intermediate_size": 16, "bos_token_id": 1, "eos_token_id": 2}
        vision = {**SIZES, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
        model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    elif kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**SIZES, image_size=28, patch_size=14, mlp_ratio=1))
    else:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, image_size=28, patch_size=14, mlp_ratio=1))
    model.eval().save_pretrained(folder)
    return model


def draw_images(side: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, side, side), dtype=np.uint8))


def normalised(images: Tensor, name: str) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (ENCODERS[name].mean, ENCODERS[name].std))
    return (images.float() / 255 - mean) / std


@pytest.mark.parametrize("name", ["dinov2", "registers"])
def test_dinov2_gives_the_class_token_after_the_last_norm(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    images = draw_images(224)
    with torch.no_grad():
        expected = model(normalised(images, "dinov2")).last_hidden_state[:, 0]
    extractor = load_extractor("dinov2", torch.device("cpu"), str(tmp_path))
    found = extractor.extract(images)["features"]
    assert extractor.outputs == {"features": 16}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_clip_gives_the_projected_embedding_at_the_models_own_size(tmp_path: Path) -> None:
    model = save_model("clip", tmp_path)
    images = draw_images(32)
    with torch.no_grad():
        pooled = model.vision_model(normalised(images, "clip")).pooler_output
        expected = model.visual_projection(pooled)
    extractor = load_extractor("clip", torch.device("cpu"), str(tmp_path))
    assert extractor.outputs == {"features": 12}
    torch.testing.assert_close(extractor.extract(images)["features"], expected, rtol=1e-5, atol=1e-5)


def test_a_file_of_the_vision_part_alone_gives_the_same(tmp_path: Path) -> None:
    save_model("clip", tmp_path / "whole")
    whole = load_encoder("clip", str(tmp_path / "whole"))
    whole.network.save_pretrained(tmp_path / "part")
    part = load_encoder("clip", str(tmp_path / "part"))
    assert isinstance(part.network, CLIPVisionModelWithProjection)
    assert part.sha256 == whole.sha256


@pytest.mark.parametrize("side", [100, 224, 500])
def test_dinov2_gets_images_resized_as_pillow_does(side: int, tmp_path: Path) -> None:
    save_model("dinov2", tmp_path)
    encoder, images = load_encoder("dinov2", str(tmp_path)), draw_images(side)
    resized = [Image.fromarray(i.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC) for i in images]
    expected = torch.from_numpy(np.stack([np.asarray(i) for i in resized])).permute(0, 3, 1, 2)
    levels = (resize_pillow(images.float(), 224) - expected).abs()
    assert levels.max() <= 1
    assert (levels > 0).float().mean() < 0.02
    torch.testing.assert_close(encoder(images)["features"], encoder(expected)["features"], rtol=1e-2, atol=1e-2)


def test_clip_gets_images_resized_without_antialiasing() -> None:
    images = draw_images(96).float()
    found = resize_plain(images, 32)
    # Every output pixel lies in the middle of three: a cubic without antialiasing takes that one alone.
    torch.testing.assert_close(found, images[:, :, 1::3, 1::3])
    assert torch.equal(resize_plain(images, 96), images)


def test_grey_is_repeated_and_the_batch_changes_nothing(tmp_path: Path) -> None:
    save_model("clip", tmp_path)
    encoder = load_encoder("clip", str(tmp_path))
    grey = draw_images(20)[:, :1]
    features = encoder(grey)["features"]
    torch.testing.assert_close(encoder(grey.expand(-1, 3, -1, -1))["features"], features)
    torch.testing.assert_close(encoder(grey[1:2])["features"], features[1:2], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="images have 4 channels"):
        encoder(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    save_model("dinov2", tmp_path)
    with pytest.raises(ValueError, match=r"clip .*: can't be loaded \(it is a dinov2\); expected a clip or"):
        load_encoder("clip", str(tmp_path))


def test_missing_weights_are_refused_and_not_drawn_at_random(tmp_path: Path) -> None:
    save_model("dinov2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"its files lack 1 weights, first layernorm.weight"):
        load_encoder("dinov2", str(tmp_path))


@pytest.mark.parametrize("damage", ["absent", "cut", "pickle"])
def test_damaged_files_are_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    save_model("dinov2", tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:500])
    else:
        weights.unlink()
    if damage == "pickle":
        torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"can't be loaded .*; expected a dinov2 or dinov2_with_registers model"
    ) as caught:
        load_encoder("dinov2", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_run_measures_on_the_models_its_config_names_what_the_verb_does(
    tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    metrics, given = ["kd_dinov2", "cmmd"], {n: str(tmp_path / n) for n in ("dinov2", "clip")}
    for name, folder in given.items():
        save_model(name, Path(folder))
    plan = prepare(tiny_config(evaluate={"metrics": metrics, **given}, search={"metric": "cmmd"}), tmp_path / "run")
    config = plan.config
    wanted = [r for r in wanted_records(plan, ["pretrained"]) if r["seeds"][0] == 0]
    found = list(evaluate_models(plan, wanted))
    settings = Protocol(metrics=metrics, num_images=10, sample=config.sample, **given)
    events = evaluate_model(config.base, config.data.source, settings, name="pretrained")
    assert [r | {"time": ""} for r in found] == [r | {"time": ""} for r in events if isinstance(r, dict)]
    assert [r["extractor"].split(":")[0] for r in found] == ["dinov2", "clip"]
