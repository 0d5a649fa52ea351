"""Stable Diffusion XL as a base: what it is told besides, the stock pipeline's images, the whole job."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import WORDS, make_sdxl_unet, save_sdxl, save_stable_diffusion, stock_images
from decouple_merge.config import Config, Data, Sample, Text, load_config
from decouple_merge.data.captions import load_captions
from decouple_merge.data.latents import Latents
from decouple_merge.data.sources import load_images
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.experiment import finetuning, selection, workflow
from decouple_merge.experiment.dry_run import describe
from decouple_merge.experiment.plan import prepare
from decouple_merge.models.base import load_base
from decouple_merge.models.families.sdxl import StableDiffusionXL
from decouple_merge.models.lora import FILE
from decouple_merge.models.parts import load_text_encoders, load_vae
from decouple_merge.models.projection import attach_projections, folded_state_dict, projection_parameters
from decouple_merge.sampling.sampler import Prompts, denoiser, sample_images
from decouple_merge.searching.learned import DenoisingLoss
from decouple_merge.training import trainer
from decouple_merge.training.gradient import noisy_batch

OWN_CACHE = True
CPU = torch.device("cpu")
PROMPTS = ["red cat", "a green bird", "two dogs"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MakeConfig = Callable[..., Config]


pytestmark = pytest.mark.usefixtures("every_record")


def condition(num: int = 3) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(3)
    return {
        "encoder_hidden_states": torch.randn(num, 12, 40, generator=draws),
        "text_embeds": torch.randn(num, 20, generator=draws),
        "time_ids": torch.tensor([[16.0, 24.0, 0.0, 4.0, 16.0, 16.0]] * num),
    }


def draw(folder: Path, seeds: list[int], sampler: str = "EulerDiscrete", **text: Any) -> Tensor:
    base = load_base(str(folder))
    assert base.encoders is not None
    prompts = Prompts(base.encoders, PROMPTS, Text(**text), CPU, first_seed=seeds[0])
    settings = Sample(sampler=sampler, num_steps=4, batch_size=4)
    return torch.cat(list(sample_images(denoiser(base, base.network), base, seeds, settings, CPU, prompts=prompts)))


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(
    ("sampler", "text"),
    [
        ("EulerDiscrete", {"guidance_scale": 5.0}),
        ("EulerDiscrete", {"guidance_scale": 1.0}),
        ("DDIM", {"guidance_scale": 7.5, "negative_prompt": "sun"}),
    ],
)
def test_images_are_those_of_the_stock_pipeline(
    tmp_path: Path, sampler: str, text: dict[str, Any], zeros: bool
) -> None:
    folder = save_sdxl(tmp_path / "base", zeros=zeros)
    if sampler == "DDIM":
        stock: Any = DiffusionPipeline.from_pretrained(folder)
        stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
        stock.save_pretrained(folder)
    asked = {**text, "negative_prompt": [text["negative_prompt"]] * 3} if "negative_prompt" in text else text
    expected = stock_images(folder, PROMPTS, [5, 6, 7], num_inference_steps=4, **asked)
    theirs = torch.from_numpy((expected * 255).round()).permute(0, 3, 1, 2)
    assert theirs.std() > 20
    assert (theirs - draw(folder, [5, 6, 7], sampler, **text)).abs().max() <= 1


def test_zeros_for_the_empty_prompt_change_the_image(tmp_path: Path) -> None:
    one, other = (draw(save_sdxl(tmp_path / str(zeros), zeros=zeros), [0, 1, 2]) for zeros in (True, False))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("zeros", [True, False])
def test_texts_are_encoded_as_the_stock_pipeline_does(tmp_path: Path, zeros: bool) -> None:
    folder = save_sdxl(tmp_path / "base", zeros=zeros)
    stock: Any = DiffusionPipeline.from_pretrained(folder)
    texts = ["red cat", "a text that is longer than the encoders can read"]
    states, empty, pooled, empty_pooled = stock.encode_prompt(texts)
    base = load_base(str(folder))
    found = base.family.encode_texts(load_text_encoders(base.encoders, CPU), [*texts, ""])
    assert found.keys() == {"encoder_hidden_states", "text_embeds"}
    assert found["text_embeds"].shape == (3, 20)
    torch.testing.assert_close(found["encoder_hidden_states"], torch.cat([states, empty[:1]]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["text_embeds"], torch.cat([pooled, empty_pooled[:1]]), rtol=1e-5, atol=1e-6)
    assert bool((found["text_embeds"][2] == 0).all()) == zeros


def test_latents_with_a_mean_and_deviation_of_their_own_are_the_stock_pipelines(tmp_path: Path) -> None:
    own = {"latents_mean": [1.0, -2.0, 0.5, 3.0], "latents_std": [2.0, 0.5, 1.5, 4.0], "scaling_factor": 0.5}
    folder = save_sdxl(tmp_path / "base", vae=own)
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base = load_base(str(folder))
    loaded = load_vae(base.encoders, CPU)
    with torch.no_grad():
        expected = vae.encode(images).latent_dist
        mean, deviation = (torch.tensor(own[k])[:, None, None] for k in ("latents_mean", "latents_std"))
        encoded = base.family.encode_images(loaded, images)
        torch.testing.assert_close(encoded[:, 0], (expected.mean - mean) / deviation * 0.5)
        torch.testing.assert_close((encoded[:, 1] / 2).exp(), expected.std / deviation * 0.5)
        decoded = vae.decode(expected.mean).sample
    torch.testing.assert_close(base.family.decode_latents(loaded, encoded[:, 0]), decoded, rtol=1e-3, atol=1e-4)
    stock = stock_images(folder, PROMPTS, [5, 6, 7], num_inference_steps=4, guidance_scale=7.5)
    theirs = torch.from_numpy((stock * 255).round()).permute(0, 3, 1, 2)
    assert (theirs - draw(folder, [5, 6, 7])).abs().max() <= 1


# -- sizes


@pytest.fixture
def oblong(tmp_path: Path) -> Path:
    """Four images of different sizes, the second damaged."""
    folder = tmp_path / "oblong"
    folder.mkdir()
    for name, size in (("a", (64, 32)), ("c", (16, 16)), ("d", (48, 64))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"no image")
    lines = [json.dumps({"file_name": f"{name}.png", "text": "red cat"}) for name in "abcd"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def open_latents(base: Path, source: Path, **data: Any) -> Latents:
    encoders = load_base(str(base)).encoders
    assert encoders is not None
    settings = Data(source=str(source), fit="resize", skip_damaged=True, **data)
    images = load_images(settings, 3, 16)
    return Latents(encoders, images, load_captions(images, settings), 16, settings, CPU)


def test_training_tells_of_each_image_how_it_was_cut(tiny_sdxl_base: Path, oblong: Path) -> None:
    # Height and width of the original; top and left, in pixels of the resized image, whose smaller side is 16; 16×16.
    expected = [[32, 64, 0, 8, 16, 16], [16, 16, 0, 0, 16, 16], [64, 48, 3, 0, 16, 16]]
    batch = open_latents(tiny_sdxl_base, oblong).stack([0, 1, 2])
    assert batch.condition["time_ids"].tolist() == expected
    # What is found once is kept, and read again.
    load_images.cache_clear()
    again = open_latents(tiny_sdxl_base, oblong).stack([2, 0]).condition
    assert again["time_ids"].tolist() == [expected[2], expected[0]]
    assert again.keys() == {"encoder_hidden_states", "text_embeds", "time_ids"}


def test_images_cut_in_another_way_are_other_data(tiny_sdxl_base: Path, oblong: Path, tmp_path: Path) -> None:
    one = open_latents(tiny_sdxl_base, oblong)
    for path in oblong.glob("[acd].png"):
        Image.new("RGB", (16, 16), "red").save(path)
    load_images.cache_clear()
    other = open_latents(tiny_sdxl_base, oblong)
    assert (one.latents.identity, one.texts.identity) == (other.latents.identity, other.texts.identity)
    assert one.sha256 != other.sha256


def test_a_base_without_sizes_is_not_told_of_them(tiny_text_base: Path, oblong: Path) -> None:
    assert open_latents(tiny_text_base, oblong).stack([0]).condition.keys() == {"encoder_hidden_states"}


# -- the network


def unet_output(network: nn.Module) -> Tensor:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inputs = condition()
        states = inputs.pop("encoder_hidden_states")
        return network(x, torch.tensor([0, 17, 39]), states, added_cond_kwargs=inputs, return_dict=False)[0]


def test_folding_is_exact_for_its_blocks() -> None:
    stock, network = make_sdxl_unet().eval(), make_sdxl_unet().eval()
    before = unet_output(stock)
    attach_projections(network, StableDiffusionXL(), "folded")
    assert torch.equal(unet_output(network), before)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for matrix in projection_parameters(network):
            matrix += 0.3 * torch.randn(matrix.shape, generator=draws)
    projected = unet_output(network)
    assert not torch.allclose(projected, before, rtol=1e-2)
    folded = folded_state_dict(network, {})
    assert folded.keys() == stock.state_dict().keys()
    stock.load_state_dict(folded)
    assert torch.equal(unet_output(stock), projected)


def test_the_gradient_of_the_merging_weights_is_that_of_its_own_loss(tiny_sdxl_base: Path, oblong: Path) -> None:
    base, draws = load_base(str(tiny_sdxl_base)), torch.Generator().manual_seed(0)
    start = base.network.state_dict()
    expert = {k: v + 0.02 * torch.randn(v.shape, generator=draws) for k, v in start.items()}
    batch = noisy_batch(base, open_latents(tiny_sdxl_base, oblong).stack([0, 1, 2]), TimestepRange(0, 40), draws)
    loss, at, step = DenoisingLoss(base, [expert], CPU), torch.tensor([[0.5]], dtype=torch.float64), 1e-2
    _, gradient = loss(at, batch)
    slope = (loss(at + step, batch)[0] - loss(at - step, batch)[0]) / (2 * step)
    torch.testing.assert_close(gradient.item(), slope, rtol=2e-2, atol=1e-5)


# -- parts that don't fit


def test_a_text_encoder_of_another_pooled_width_is_refused(tmp_path: Path) -> None:
    folder = save_sdxl(tmp_path / "base", pooled_width=12)
    with pytest.raises(
        ValueError, match="text_encoder_2 writes pooled embeddings of width 12, its unet reads 20; give"
    ):
        load_base(str(folder))


def test_text_encoders_of_another_width_are_refused(tmp_path: Path) -> None:
    folder = save_sdxl(tmp_path / "base", unet=make_sdxl_unet(cross_attention_dim=32))
    with pytest.raises(
        ValueError, match=r"text_encoder \+ text_encoder_2 writes embeddings of width 40, its unet reads 32; give parts"
    ):
        load_base(str(folder))


def test_a_network_of_the_other_pipeline_is_refused(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "base", unet=make_sdxl_unet(cross_attention_dim=16))
    with pytest.raises(ValueError, match="unet needs other inputs than StableDiffusionPipeline's: addition_embed_type"):
        load_base(str(folder))


def test_a_second_text_encoder_that_is_missing_is_named(tiny_sdxl_base: Path) -> None:
    (tiny_sdxl_base / "text_encoder_2/config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no .*text_encoder_2/config.json, expected StableDiffusionXLPipe"):
        load_base(str(tiny_sdxl_base))


# -- the whole job


@pytest.fixture
def sdxl_config(text_config: MakeConfig, tiny_sdxl_base: Path) -> MakeConfig:
    def make(**sections: Any) -> Config:
        sections = {"base": str(tiny_sdxl_base), "sample": {"sampler": "EulerDiscrete"}, **sections}
        return text_config(**sections)

    return make


def test_full_finetuning_ends_as_a_pipeline_that_stock_diffusers_draws_with(
    sdxl_config: MakeConfig, tmp_path: Path
) -> None:
    config, folder = sdxl_config(finetune={"baseline": False}), tmp_path / "run"
    events = list(workflow.run(config, folder))
    assert events[:2] == ["texts: 7 of 7 computed", "latents: 24 of 24 computed"]
    plan = prepare(config, folder)
    start, merged = (load_file(f / WEIGHTS) for f in (Path(config.base), folder / "merged"))
    record = json.loads((folder / "merged/merge.json").read_text())
    experts = [load_file(folder / f"experts/{i}/model.safetensors") for i in range(2)]
    for key, value in start.items():
        expected = value + sum(w * (e[key] - value) for w, e in zip(record["weights"], experts, strict=True))
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)
    # Sizes and pooled texts are trained on, too.
    assert not torch.equal(experts[0]["add_embedding.linear_1.weight"], start["add_embedding.linear_1.weight"])
    assert type(StableDiffusionXLPipeline.from_pretrained(folder / "merged")) is StableDiffusionXLPipeline
    asked = {"num_inference_steps": 3, "guidance_scale": 3.0}
    theirs = stock_images(folder / "merged", plan.prompts[:2], [0, 1], **asked)
    for seed in (0, 1):
        ours = np.asarray(Image.open(folder / f"samples/merged/{seed}.png")).astype(int)
        assert abs((theirs[seed] * 255).round() - ours).max() <= 1


def test_adapters_end_as_a_pipeline_and_as_one_lora_of_the_base(
    sdxl_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"lora": {"rank": 3}, "projection": {"placement": "none"}, "baseline": False, "learning_rate": 0.1}
    config = sdxl_config(finetune=settings, search={"num_trials": 3})
    # The last candidate is the sum of all, which isn't the base, whatever is best.
    monkeypatch.setattr(selection, "ranked", lambda found, frozen: found[::-1])
    list(workflow.run(config, tmp_path / "run"))
    asked = {"num_inference_steps": 3, "guidance_scale": 3.0}
    merged = stock_images(tmp_path / "run/merged", ["red cat"], [0], **asked)
    pipeline: Any = DiffusionPipeline.from_pretrained(config.base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "run/merged-lora", weight_name=FILE)
    found = pipeline(["red cat"], generator=[torch.Generator().manual_seed(0)], output_type="np", **asked).images
    assert abs(found - merged).max() < 1e-3
    assert abs(stock_images(Path(config.base), ["red cat"], [0], **asked) - merged).max() > 1e-2


def test_the_shipped_config_plans_and_trains_a_tiny_pipeline(
    tiny_sdxl_base: Path, tiny_captioned: Path, tmp_path: Path
) -> None:
    tiny = {"base": tiny_sdxl_base, "data.source": tiny_captioned, "data.num_held_out": 4, "data.num_workers": 0}
    tiny |= {"finetune.num_updates": 1, "finetune.tracker": "none"}
    overrides = [f"{key}={value}" for key, value in tiny.items()]
    config = load_config(Path(__file__).parents[1] / "configs/sdxl-lora.yaml", overrides)
    lines = list(describe(config, tmp_path / "run"))
    assert "prompts: 24, guidance 5" in lines
    assert any(line.startswith("experts: 4 x 1 updates of 16 images on [0, 10)") for line in lines)
    list(finetuning.finetune_experts(prepare(config, tmp_path / "run"), 3))
    factors = load_file(tmp_path / "run/experts/3/lora" / FILE)
    assert {v.shape[0] for k, v in factors.items() if k.endswith("lora_A.weight")} == {32}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_dropped_caption_is_the_pipelines_empty_prompt_and_keeps_the_sizes(
    sdxl_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    config = sdxl_config(finetune={"baseline": False, "num_updates": 1}, data={"caption_dropout": share})
    plan, seen = prepare(config, tmp_path / "run"), []
    predict = trainer.predict

    def spy(base: Any, network: nn.Module, x: Tensor, t: Any, **inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return predict(base, network, x, t, **inputs)

    monkeypatch.setattr(trainer, "predict", spy)
    list(finetuning.finetune_experts(plan, 0))
    inputs = seen[0]
    known = plan.images.texts.embed(WORDS)  # type: ignore[attr-defined]
    dropped = [
        i for i, row in enumerate(inputs["text_embeds"]) if not any(torch.equal(row, k) for k in known["text_embeds"])
    ]
    assert bool(dropped) == (share > 0)
    assert (inputs["text_embeds"][dropped] == 0).all()
    assert (inputs["encoder_hidden_states"][dropped] == 0).all()
    assert inputs["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 4
