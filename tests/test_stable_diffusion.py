"""Text-to-image bases: what is loaded, encoded and exported is what stock diffusers' StableDiffusionPipeline does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file

from conftest import make_text_unet, save_stable_diffusion, stock_images
from decouple_merge.models.base import load_base
from decouple_merge.models.export import export_pipeline
from decouple_merge.models.network import new_network, predict
from decouple_merge.models.parts import (
    encoder_sha256,
    load_text_encoders,
    load_vae,
)
from decouple_merge.models.schedulers import make_scheduler

CPU = torch.device("cpu")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_only_the_denoiser_and_its_schedule_are_loaded(tiny_text_base: Path) -> None:
    base = load_base(str(tiny_text_base))
    assert base.pipeline.unet is base.network
    assert [base.pipeline.vae, base.pipeline.text_encoder, base.pipeline.tokenizer] == [None] * 3
    assert (base.shape, base.channels, base.image_size) == ((4, 8, 8), 3, 16)
    assert (base.num_train_timesteps, base.process.prediction_type) == (40, "epsilon")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_prediction_type_is_the_schedulers(tmp_path: Path, prediction_type: str) -> None:
    folder = save_stable_diffusion(tmp_path / "base", prediction_type=prediction_type)
    assert load_base(str(folder)).process.prediction_type == prediction_type


def test_texts_are_encoded_as_the_stock_pipeline_does(tiny_text_base: Path) -> None:
    texts = ["red cat", "", "a text that is longer than the encoder can read"]
    expected, _ = DiffusionPipeline.from_pretrained(tiny_text_base).encode_prompt(texts, "cpu", 1, False)
    base = load_base(str(tiny_text_base))
    pipeline = load_text_encoders(base.encoders, CPU)
    found = base.family.encode_texts(pipeline, texts)["encoder_hidden_states"]
    assert found.shape == (3, 12, 16)
    assert torch.equal(found, expected)


def test_latents_are_the_vaes_distribution_in_the_denoisers_scale(tiny_text_base: Path) -> None:
    vae: Any = AutoencoderKL.from_pretrained(tiny_text_base / "vae")
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base = load_base(str(tiny_text_base))
    loaded = load_vae(base.encoders, CPU)
    mean, log_variance = base.family.encode_images(loaded, images).unbind(1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        drawn = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(5)) * vae.config.scaling_factor
        expected = vae.decode(drawn / vae.config.scaling_factor).sample
    latents = mean + (log_variance / 2).exp() * noise
    torch.testing.assert_close(latents, drawn, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(base.family.decode_latents(loaded, drawn), expected, rtol=1e-4, atol=1e-5)


def test_the_text_reaches_the_prediction(tiny_text_base: Path) -> None:
    base = load_base(str(tiny_text_base))
    texts = base.family.encode_texts(load_text_encoders(base.encoders, CPU), ["red", "blue"])
    red, blue = texts["encoder_hidden_states"][:, None]
    x = torch.randn(1, *base.shape)
    expected = base.network(x, 3, encoder_hidden_states=red).sample
    assert torch.equal(predict(base, base.network, x, 3, encoder_hidden_states=red), expected)
    assert not torch.equal(predict(base, base.network, x, 3, encoder_hidden_states=blue), expected)


@pytest.mark.parametrize("placement", ["folded", "trunk"])
def test_a_copy_of_the_network_predicts_the_same(tiny_text_base: Path, placement: str) -> None:
    base = load_base(str(tiny_text_base))
    x, text = torch.randn(2, *base.shape), torch.randn(2, 12, 16)
    found = predict(base, new_network(base, placement).eval(), x, 3, encoder_hidden_states=text)
    assert torch.equal(found, predict(base, base.network, x, 3, encoder_hidden_states=text))


def test_a_sampler_that_clips_does_not_clip_latents(tiny_text_base: Path) -> None:
    base = load_base(str(tiny_text_base))
    scheduler = make_scheduler(base, "DDIM", 4, None)
    far = torch.full((1, 4, 8, 8), 50.0)
    assert scheduler.step(torch.zeros_like(far), scheduler.timesteps[-1], far).pred_original_sample.min() > 40
    assert make_scheduler(base, "PNDM", 4, None).config.skip_prk_steps


def test_export_copies_all_but_the_network_and_stock_diffusers_draws_with_it(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "base", parts_dtype=torch.float16)
    base = load_base(str(folder))
    draws = torch.Generator().manual_seed(0)
    weights = {k: v + 0.05 * torch.randn(v.shape, generator=draws) for k, v in base.network.state_dict().items()}
    export_pipeline(base, weights, tmp_path / "out", "card", {"weights": [1.0]})

    def files(at: Path) -> dict[str, bytes]:
        return {str(p.relative_to(at)): p.read_bytes() for p in at.rglob("*") if p.is_file()}

    before, after = files(folder), files(tmp_path / "out")
    assert after.keys() - before.keys() == {"README.md", "merge.json"}
    assert {name.partition("/")[0] for name in before if before[name] != after[name]} == {"unet"}
    assert all(torch.equal(v, weights[k]) for k, v in load_file(tmp_path / "out" / WEIGHTS).items())
    one, other = (stock_images(f, ["red cat"], [0], num_inference_steps=2) for f in (folder, tmp_path / "out"))
    assert one.shape == (1, 16, 16, 3)
    assert abs(one - other).max() > 1e-3


def test_the_hash_of_encoders_is_of_their_files_alone(tmp_path: Path) -> None:
    one = load_base(str(save_stable_diffusion(tmp_path / "one"))).encoders
    other = load_base(str(save_stable_diffusion(tmp_path / "other", unet=make_text_unet(layers_per_block=2)))).encoders
    assert encoder_sha256(one, "vae") == encoder_sha256(other, "vae") != encoder_sha256(one, "text_encoder")
    edit(tmp_path / "other/vae/config.json", scaling_factor=0.5)
    assert encoder_sha256(one, "vae") != encoder_sha256(other, "vae")


def test_a_text_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "base", width=32)
    with pytest.raises(ValueError, match="text_encoder writes embeddings of width 32, its unet reads 16; give parts"):
        load_base(str(folder))


def test_a_vae_of_other_latents_is_refused(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "base", latent_channels=8)
    with pytest.raises(ValueError, match="vae writes latents of 8 channels, its unet reads 4; give parts"):
        load_base(str(folder))


def test_a_pipeline_that_lacks_a_part_is_refused(tiny_text_base: Path) -> None:
    (tiny_text_base / "text_encoder" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no .*text_encoder/config.json, expected StableDiffusionPipeline"):
        load_base(str(tiny_text_base))


def test_a_tokenizer_of_another_text_encoder_is_refused(tmp_path: Path) -> None:
    base = load_base(str(save_stable_diffusion(tmp_path / "words", vocabulary_size=54)))
    with pytest.raises(ValueError, match="its tokenizer has a vocabulary of 54, its text_encoder reads 40; give parts"):
        load_text_encoders(load_base(str(save_stable_diffusion(tmp_path / "fewer", vocabulary_size=40))).encoders, CPU)
    edit(tmp_path / "words/tokenizer/tokenizer_config.json", model_max_length=77)
    with pytest.raises(ValueError, match="its tokenizer pads to a length of 77, its text_encoder reads 12; give parts"):
        load_text_encoders(base.encoders, CPU)


def test_a_vae_of_another_kind_is_refused(tiny_text_base: Path) -> None:
    edit(tiny_text_base / "vae/config.json", _class_name="VQModel")
    with pytest.raises(ValueError, match="its vae is VQModel, expected AutoencoderKL"):
        load_base(str(tiny_text_base))


def test_a_network_that_needs_more_than_a_text_is_refused(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "base", unet=make_text_unet(time_cond_proj_dim=8))
    with pytest.raises(
        ValueError, match="its unet needs other inputs than StableDiffusionPipeline's: time_cond_proj_dim"
    ):
        load_base(str(folder))
