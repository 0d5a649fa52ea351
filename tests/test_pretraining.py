"""Text-to-image bases from nothing: VAE, text encoder, denoiser; and image–text models, which train text encoders."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from conftest import WORDS, stock_images
from decouple_merge.config import Config, Evaluate, PartTraining, Protocol, Text
from decouple_merge.data.latents import Latents
from decouple_merge.data.sources import load_images
from decouple_merge.data.split import Split, split
from decouple_merge.errors import UserError
from decouple_merge.evaluation.alignment import NUM_FEATURES, describe
from decouple_merge.evaluation.checks import check_extractors
from decouple_merge.evaluation.distances import clip_score, r_precision
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.evaluation.extractors import load_extractor
from decouple_merge.experiment import pretraining
from decouple_merge.models.base import load_base
from decouple_merge.models.image_text import ImageTextModel, load_image_text, save_image_text
from decouple_merge.models.text_encoders import create_text_encoder, create_tokenizer, learn_byte_pairs
from decouple_merge.storage.files import read_records
from decouple_merge.training import parts
from decouple_merge.training.records import StepRecord

MakeConfig = Callable[..., Config]
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}


@pytest.fixture
def pretrain_config(tiny_captioned: Path) -> MakeConfig:
    """Make a config that trains a tiny base on 20 captioned images; sections of pretrain are updated by keyword."""

    def make(**sections: Any) -> Config:
        training = {"num_updates": 4, "batch_size": 4, "checkpoint_every": 2}
        values: dict[str, Any] = {
            "vae": {
                **training,
                "model": {
                    "sample_size": 16,
                    "down_block_types": ["DownEncoderBlock2D"] * 2,
                    "up_block_types": ["UpDecoderBlock2D"] * 2,
                    "block_out_channels": [8, 8],
                    "latent_channels": 3,
                    "norm_num_groups": 4,
                },
            },
            "text_encoder": {**training, "model": TEXT, "vocab_size": 520},
            "model": {
                "sample_size": 8,
                "block_out_channels": [8, 16],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                "layers_per_block": 1,
                "attention_head_dim": 2,
                "norm_num_groups": 4,
            },
            "scheduler": {"num_train_timesteps": 40, "skip_prk_steps": True, "steps_offset": 1},
            **training,
            "validate_every": 2,
            "tracker": "none",
        }
        for section, changes in sections.items():
            values[section] = {**values[section], **changes} if isinstance(changes, dict) else changes
        return Config.model_validate({"data": {"source": str(tiny_captioned), "num_held_out": 4}, "pretrain": values})

    return make


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")
    }


def test_a_base_from_nothing_loads_and_draws_in_stock_diffusers(pretrain_config: MakeConfig, tmp_path: Path) -> None:
    events = list(pretraining.pretrain(pretrain_config(), tmp_path / "out"))
    lines = [e.split(":")[0] for e in events if isinstance(e, str)]
    assert lines[:4] == ["vae 2/4", "vae 4/4", "text_encoder 2/4", "text_encoder 4/4"]
    folder = tmp_path / "out/pipeline"
    assert type(StableDiffusionPipeline.from_pretrained(folder)) is StableDiffusionPipeline
    base = load_base(str(folder))
    assert (base.shape, base.channels, base.image_size) == ((3, 8, 8), 3, 16)
    images = stock_images(folder, ["red cat"], [0], num_inference_steps=2)
    assert images.shape == (1, 16, 16, 3)
    assert [r["update"] for r in read_records(folder / "training-curve.jsonl")] == [2, 4]
    # All three parts are the trained ones, and the pipeline's encoders are those that the denoiser was trained with.
    trained, untrained = (files_of(f) for f in (folder, tmp_path / "out/parts/pipeline"))
    same = {name for name in trained if trained[name] == untrained[name]}
    assert "unet/diffusion_pytorch_model.safetensors" not in same
    assert {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"} <= same


@pytest.mark.parametrize("stop", ["vae 2/4", "text_encoder 2/4", "pretrain"])
def test_pretraining_goes_on_bitwise_after_an_interruption(
    pretrain_config: MakeConfig, tmp_path: Path, stop: str
) -> None:
    config = pretrain_config()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    list(pretraining.pretrain(config, whole))
    for event in (events := pretraining.pretrain(config, cut)):
        if (event.name if isinstance(event, StepRecord) else str(event)).startswith(stop):
            break
    events.close()
    again = [str(e) for e in pretraining.pretrain(config, cut)]
    assert not any(e.startswith("vae 2/4") for e in again)
    assert files_of(cut / "pipeline") == files_of(whole / "pipeline")


def test_latents_of_a_trained_vae_have_unit_scale(
    pretrain_config: MakeConfig, tiny_captioned: Path, tmp_path: Path
) -> None:
    for i, path in enumerate(sorted(tiny_captioned.glob("*.png"))):
        Image.new("RGB", (16, 16), (10 * i, 255 - 10 * i, 40 * (i % 6))).save(path)
    config = pretrain_config(vae={"num_updates": 40, "checkpoint_every": 10, "learning_rate": 2e-3})
    events = pretraining.pretrain(config, tmp_path / "out")
    errors = [float(e.split("validation ")[1]) for e in events if isinstance(e, str) and e.startswith("vae")]
    assert errors[-1] < 0.97 * errors[0]
    vae = json.loads((tmp_path / "out/pipeline/vae/config.json").read_text())
    base = load_base(str(tmp_path / "out/pipeline"))
    assert base.encoders is not None
    latents = Latents(
        base.encoders,
        images := load_images(config.data, 3, 16),
        ["a"] * len(images),
        16,
        config.data,
        torch.device("cpu"),
    )
    means = latents.stack(split(images, config.data).trained).moments[:, 0, 0]
    assert means.std().item() == pytest.approx(1, rel=1e-4)
    assert vae["scaling_factor"] != 0.18215


def new_image_text() -> ImageTextModel:
    tokenizer = create_tokenizer(WORDS, 520)
    torch.manual_seed(0)
    return ImageTextModel(tokenizer, create_text_encoder(tokenizer, TEXT, 0), NUM_FEATURES, 8)


def test_byte_pairs_are_the_most_frequent_neighbours() -> None:
    # Sennrich et al. 2016 have these words in their figure; the ends of words are symbols of their own here.
    words = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    assert learn_byte_pairs(words, 4) == [("e", "s"), ("es", "t</w>"), ("l", "o"), ("e", "w")]
    assert {"".join(pair) for pair in learn_byte_pairs(words, 1000)} >= {w + "</w>" for w in words}
    assert learn_byte_pairs(Counter({"aaa": 1}), 9) == [("a", "a"), ("aa", "a</w>")]


def test_a_learned_tokenizer_knows_its_words_and_every_byte() -> None:
    tokenizer = create_tokenizer(["Red cat", "red  cats", "a red cat"], 1000)
    assert tokenizer.tokenize("RED cat cats") == ["red</w>", "cat</w>", "cats</w>"]
    tokens = tokenizer("Zürich 🦁").input_ids
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.index(tokenizer.eos_token_id) == len(tokens) - 1
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "zürich 🦁"


def test_a_text_encoder_learns_which_image_is_which(tmp_path: Path) -> None:
    model = new_image_text()
    described = torch.randn(2, 6, NUM_FEATURES)
    settings = PartTraining(num_updates=60, batch_size=5, learning_rate=5e-3, checkpoint_every=60)
    before = model.eval().embed_images(described[0, :5]) @ model.embed_texts(WORDS[:5]).T
    pairs = Split(range(5), range(5, len(WORDS)))
    list(parts.train_image_text(model, described, WORDS, pairs, settings, 0, tmp_path))
    model.eval()
    after = model.embed_images(described[1, :5]) @ model.embed_texts(WORDS[:5]).T
    assert (before.argmax(1) == torch.arange(5)).sum() < 5
    assert (after.argmax(1) == torch.arange(5)).all()
    save_image_text(model, tmp_path / "model")
    again = load_image_text(tmp_path / "model")
    assert torch.equal(again.embed_texts(WORDS), model.embed_texts(WORDS))
    assert torch.equal(again.embed_images(described[0]), model.embed_images(described[0]))


def test_an_image_text_model_is_a_clip_for_the_scores(tmp_path: Path) -> None:
    save_image_text(new_image_text(), tmp_path / "judge")
    judge = load_image_text(tmp_path / "judge")
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS))
    images = torch.randint(256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    metrics = ["clip_score", "r_precision"]
    settings = Protocol(metrics=metrics, clip=str(tmp_path / "judge"), text=Text(prompts=tmp_path / "prompts.txt"))
    records = [e for e in evaluate_model([images], None, settings) if isinstance(e, dict)]
    effnet = load_extractor("effnetlite0", torch.device("cpu"))
    pairs = judge.embed_images(describe(images, effnet.extract)), judge.embed_texts(WORDS)
    assert [r["metric"] for r in records] == metrics
    assert [r["value"] for r in records] == pytest.approx([clip_score(*pairs), r_precision(*pairs)])
    check_extractors(metrics, Evaluate(clip=str(tmp_path / "judge")))
    (tmp_path / "judge/image_text.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"image_text.safetensors: no whole safetensors file"):
        check_extractors(metrics, Evaluate(clip=str(tmp_path / "judge")))


def test_padding_has_no_say_in_a_text(tmp_path: Path) -> None:
    model = new_image_text().eval()
    with torch.no_grad():
        expected = model.embed_texts(["red cat"])
        model.tokenizer.model_max_length = 5
        torch.testing.assert_close(model.embed_texts(["red cat"]), expected)


def test_a_folder_that_is_no_image_text_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no image_text.safetensors; expected an image–text model"):
        load_image_text(tmp_path)
    save_image_text(new_image_text(), tmp_path / "model")
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(ValueError, match=r"model: not a whole image–text model \(.*; fetch or make it again"):
        load_image_text(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": {"model": {"latent_channel": 3}}}, r"pretrain.vae.model: .*latent_channel"),
        ({"text_encoder": {"model": TEXT | {"hidden_size": 15}}}, r"pretrain.text_encoder.model: "),
        ({"model": {"in_channels": 4}}, r"pretrain.model or pretrain.scheduler: .*in_channels"),
        (
            {"model": {"sample_size": [8, 8]}},
            r"pretrain.model.sample_size is \[8, 8\], expected the side of the latents",
        ),
        ({"model": {"sample_size": 4}}, r"found 16×16 .*, expected 8×8"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_trained(
    pretrain_config: MakeConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(pretraining.pretrain(pretrain_config(**changes), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_text_to_image_base_has_both_parts(pretrain_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="has vae and text_encoder, text_encoder is missing: give both, or none"):
        pretrain_config(text_encoder=None)


def test_a_loss_that_is_not_finite_ends_the_training(pretrain_config: MakeConfig, tmp_path: Path) -> None:
    config = pretrain_config(vae={"learning_rate": 1e30})
    with pytest.raises(ValueError, match=r"vae: the loss is .* at update .*; lower pretrain.vae.learning_rate"):
        list(pretraining.pretrain(config, tmp_path / "out"))


def pixel_config(model: dict[str, Any], tmp_path: Path, **changes: Any) -> Config:
    """Make a config that trains a pixel base in two updates."""
    source = tmp_path / "images"
    if not source.exists():
        source.mkdir()
        for i in range(8):
            Image.fromarray(np.full((8, 8), 30 * i, np.uint8)).save(source / f"{i}.png")
    values = {"num_updates": 2, "batch_size": 2, "validate_every": 2, "num_ranges": 2, "tracker": "none"} | changes
    return Config.model_validate(
        {"data": {"source": str(source), "num_held_out": 2}, "pretrain": values | model, "base": str(tmp_path)}
    )


UNTRAINED = {
    "model": {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 2,
        "block_out_channels": [4], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
        "add_attention": False,
    },
    "scheduler": {"num_train_timesteps": 40, "beta_schedule": "squaredcos_cap_v2"},
}  # fmt: skip


def test_a_training_goes_on_from_the_weights_of_a_base(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    list(pretraining.pretrain(pixel_config(UNTRAINED, tmp_path, learning_rate=1e-2), first))
    start = {"start": str(first / "pipeline")}
    # At a rate that changes nothing, what comes out is what went in.
    list(pretraining.pretrain(pixel_config(start, tmp_path, learning_rate=1e-30, weight_decay=0.0), second))
    before, after = (load_base(str(folder / "pipeline")) for folder in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(before.network.parameters(), after.network.parameters(), strict=True))
    assert files_of(second / "pipeline/scheduler") == files_of(first / "pipeline/scheduler")
    moved = tmp_path / "moved"
    list(pretraining.pretrain(pixel_config(start, tmp_path, learning_rate=1e-2), moved))
    assert load_base(str(moved / "pipeline")).sha256 != before.sha256


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, tiny_text_base: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrain\.start brings its own model: leave out pretrain\.model, or start"):
        pixel_config(UNTRAINED | {"start": "models/x"}, tmp_path)
    with pytest.raises(UserError, match=r"a StableDiffusionPipeline; expected one that draws pixels"):
        list(pretraining.pretrain(pixel_config({"start": str(tiny_text_base)}, tmp_path), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
