"""Wan: one transformer or two on latents of videos, against the stock pipeline, and the whole job on it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from decouple_merge.config import Config, Merge, Sample, Text
from decouple_merge.experiment import workflow
from decouple_merge.experiment.dry_run import describe
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.merging.recipes import merge_models, repeat_merge
from decouple_merge.models.base import load_base
from decouple_merge.models.families.wan import TwoTransformers, save_wan, tiny_wan
from decouple_merge.models.mixture import load_ensemble
from decouple_merge.models.network import predict
from decouple_merge.models.parts import load_vae
from decouple_merge.sampling.folder import drawn_from
from decouple_merge.sampling.sampler import Prompts, denoiser, sample_images
from decouple_merge.storage.files import read_tensors, write_tensors

CPU = torch.device("cpu")
WORDS = ["red cat", "blue dog"]


def unipc(shift: float = 5.0) -> UniPCMultistepScheduler:
    """Make a scheduler with the settings of the released pipelines."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


KINDS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "2.2": ("FlowMatchEulerDiscrete", save_wan),
    "2.2 with UniPC": ("UniPCMultistep", lambda folder: save_wan(folder, scheduler=unipc())),
    "2.1": ("FlowMatchEulerDiscrete", lambda folder: save_wan(folder, None)),
}


def stock(folder: Path) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_frames(pipeline: Any, seeds: list[int], **arguments: Any) -> Tensor:
    """Draw images of one frame: float [n, c, h, w] in [0, 1]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {"height": 16, "width": 16, "num_frames": 1}
    return pipeline(WORDS, generator=generators, output_type="pt", **size, **arguments).frames[:, 0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_pipeline_draws_the_same_images(kind: str, guidance: float, tmp_path: Path) -> None:
    sampler, save = KINDS[kind]
    folder = save(tmp_path / "base")
    expected = stock_frames(stock(folder), [3, 4], num_inference_steps=6, guidance_scale=guidance)
    assert float(expected.std()) > 0.01
    base = load_base(str(folder))
    assert base.encoders is not None
    prompts = Prompts(base.encoders, WORDS, Text(guidance_scale=guidance), CPU, first_seed=3)
    settings = Sample(sampler=sampler, num_steps=6)
    found = next(sample_images(denoiser(base, base.network), base, [3, 4], settings, CPU, prompts=prompts))
    assert float((found.float() - 255 * expected).abs().max()) <= 0.6


def test_each_image_meets_the_transformer_of_its_timestep(tmp_path: Path) -> None:
    base = load_base(str(save_wan(tmp_path / "base")))
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4, *base.shape, generator=draws)
    states = torch.randn(4, 512, 16, generator=draws)
    t = torch.tensor([874.9, 875.0, 10.0, 1000.0])
    found = predict(base, base.network, x, t, encoder_hidden_states=states)
    for index, network in enumerate(base.network.get_submodule(n) for n in ["transformer_2", "transformer"] * 2):
        alone = predict(base, network, x[[index]], t[[index]], encoder_hidden_states=states[[index]])
        torch.testing.assert_close(found[[index]], alone, rtol=1e-4, atol=1e-5)
        other = predict(base, base.network, x[[index]], 875 - t[[index]] / 2, encoder_hidden_states=states[[index]])
        assert not torch.allclose(found[[index]], other, atol=1e-3)


def test_latents_are_in_the_scale_of_the_stock_pipeline_and_come_back_as_images(tmp_path: Path) -> None:
    base = load_base(str(save_wan(tmp_path / "base")))
    assert base.encoders is not None
    vae = load_vae(base.encoders, CPU)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    found = base.family.encode_images(vae, images)
    assert found.shape == (2, 2, *base.shape)
    posterior = vae.encode(images[:, :, None]).latent_dist
    mean, deviation = (torch.tensor(vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(found[:, 0], (posterior.mean[:, :, 0] - mean) / deviation)
    torch.testing.assert_close((found[:, 1] / 2).exp(), posterior.std[:, :, 0] / deviation, rtol=1e-4, atol=1e-6)
    decoded = base.family.decode_latents(vae, found[:, 0])
    torch.testing.assert_close(decoded, vae.decode(posterior.mean).sample[:, :, 0], rtol=1e-4, atol=1e-5)


def changed(folder: Path, **index: Any) -> str:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    return str(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"expand_timesteps": True}, "has expand_timesteps, a timestep for each token, as Wan 2.2's 5B model"),
        ({"boundary_ratio": None}, "boundary_ratio None .* and a transformer_2 that is never used; expected both"),
        ({"transformer_2": [None, None]}, "boundary_ratio 0.875 .* and no transformer_2; expected both"),
        ({"boundary_ratio": 875}, "boundary_ratio is 875, expected a number between 0 and 1"),
    ],
)
def test_what_two_transformers_need_is_asked_of_the_pipeline(
    index: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_base(changed(save_wan(tmp_path / "base"), **index))


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
def test_a_missing_transformer_is_named(part: str, tmp_path: Path) -> None:
    folder = save_wan(tmp_path / "base")
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=f"there is no {folder / part}, which model_index.json lists"):
        load_base(str(folder))


def test_two_transformers_of_other_shapes_are_refused(tmp_path: Path) -> None:
    folder = save_wan(tmp_path / "base", transformer_2=tiny_wan(1, num_layers=1))
    with pytest.raises(ValueError, match="num_layers of its transformer is 2, of its transformer_2 1; expected two"):
        load_base(str(folder))


def whole_config(base: Path, text_config: Callable[..., Config], **finetune: Any) -> Config:
    return text_config(
        base=str(base),
        finetune={"num_updates": 2, "validate_every": 1, **finetune},
        sample={"sampler": "FlowMatchEulerDiscrete", "num_steps": 4},
        text={"guidance_scale": 2.0},
        search={"num_trials": 2, "num_images": 4, "gradient_batches": 1, "num_finalists": 0},
        evaluate={"num_images": 4, "num_seed_sets": 1, "num_sample_images": 1},
    )


@pytest.mark.parametrize(
    ("ratio", "is_lora"), [(0.875, False), (0.875, True), (None, False)], ids=["2.2", "2.2 by LoRA", "2.1"]
)
def test_a_whole_run_ends_in_a_stock_pipeline(
    ratio: float | None, is_lora: bool, text_config: Callable[..., Config], tmp_path: Path
) -> None:
    folder = save_wan(tmp_path / "base", ratio)
    changes: dict[str, Any] = {"lora": {"rank": 2}, "projection": {"placement": "none"}} if is_lora else {}
    if is_lora:
        pytest.importorskip("peft", reason="peft isn't installed")
    config = whole_config(folder, text_config, **changes)
    list(workflow.run(config, tmp_path / "run"))
    before, after = stock(folder), stock(tmp_path / "run/merged")
    assert dict(before.config) == {**after.config, "_name_or_path": before.config["_name_or_path"]}
    for name in ("transformer", "transformer_2"):
        networks = [getattr(pipeline, name) for pipeline in (before, after)]
        if ratio is None and name == "transformer_2":
            assert networks == [None, None]
            continue
        shapes = [{key: (v.shape, v.dtype) for key, v in each.state_dict().items()} for each in networks]
        assert shapes[0] == shapes[1]
    expert, _ = read_tensors(tmp_path / "run/experts/0/model.safetensors")
    base = load_base(str(folder))
    moved = {key for key, value in base.network.state_dict().items() if not torch.equal(value, expert[key])}
    assert moved
    assert stock_frames(after, [1, 2], num_inference_steps=2).shape == (2, 3, 16, 16)
    if is_lora:
        adapter = tmp_path / "run/experts/0/lora"
        after.load_lora_weights(adapter)
        if ratio is not None:
            after.transformer_2.load_lora_adapter(
                str(adapter), prefix="transformer_2", weight_name="pytorch_lora_weights.safetensors"
            )
    else:
        after.transformer = load_ensemble(tmp_path / "run")
        if ratio is not None:
            after.transformer_2 = after.transformer
        shown = tmp_path / "run/samples/ensemble/0.png"
        size = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 4, "guidance_scale": 2.0}
        seed, prompts = [torch.Generator().manual_seed(0)], [(drawn_from(shown) or {})["prompt"]]
        found = after(prompts, generator=seed, output_type="np", **size).frames[0, 0]
        assert abs(255 * found - np.asarray(Image.open(shown))).max() <= 1


def test_an_expert_of_a_range_on_one_side_leaves_the_other_transformer_alone(
    text_config: Callable[..., Config], tmp_path: Path
) -> None:
    folder = save_wan(tmp_path / "base")
    ranges = {"unit": "boundary", "edges": [0.875]}
    config = whole_config(folder, text_config, ranges=ranges, global_prob=0.0, baseline=False)
    list(finetune_experts(prepare(config, tmp_path / "run")))
    start = load_base(str(folder)).network.state_dict()
    for index, own in enumerate(["transformer_2", "transformer"]):
        expert, _ = read_tensors(tmp_path / f"run/experts/{index}/model.safetensors")
        moved = {key.split(".")[0] for key, value in expert.items() if not torch.equal(value, start[key])}
        assert moved == {own}


def test_two_transformers_is_what_a_wan_2_2_base_has(tmp_path: Path) -> None:
    network = load_base(str(save_wan(tmp_path / "base"))).network
    assert isinstance(network, TwoTransformers)
    assert {key.split(".")[0] for key in network.state_dict()} == {"transformer", "transformer_2"}
    assert type(load_base(str(save_wan(tmp_path / "one", None))).network).__name__ == "WanTransformer3DModel"


def near(first: Any, size: float) -> Any:
    """Copy a transformer with a little noise on its weights."""
    network, draws = tiny_wan(), torch.Generator().manual_seed(5)
    network.load_state_dict(
        {k: v + size * torch.randn(v.shape, generator=draws) for k, v in first.state_dict().items()}
    )
    return network


def lines_of(events: Any) -> list[str]:
    return [event for event in events if isinstance(event, str)]


def test_two_transformers_are_merged_into_one_and_their_cosine_is_told(tmp_path: Path) -> None:
    folder = save_wan(tmp_path / "base", transformer_2=near(tiny_wan(), 0.02))
    experts = [folder / "transformer", folder / "transformer_2"]
    lines = lines_of(merge_models(str(folder), experts, Merge(weights=[0.7, 0.3]), tmp_path / "one"))
    both = [DiffusionPipeline.from_pretrained(folder).components[path.name].state_dict() for path in experts]
    matrices = [torch.cat([v.flatten() for v in each.values() if v.dim() > 1]) for each in both]
    expected = torch.nn.functional.cosine_similarity(*matrices, dim=0)
    assert f"the cosine of their weights is {expected:.4f}" in lines[0]
    assert not any("nothing in common" in line for line in lines)
    one = stock(tmp_path / "one")
    assert one.transformer_2 is None
    assert one.config.boundary_ratio is None
    assert not (tmp_path / "one/transformer_2").exists()
    for key, value in one.transformer.state_dict().items():
        torch.testing.assert_close(value, 0.7 * both[0][key] + 0.3 * both[1][key], rtol=0, atol=1e-6)
    assert stock_frames(one, [1, 2], num_inference_steps=2).shape == (2, 3, 16, 16)
    list(repeat_merge(tmp_path / "one", tmp_path / "again"))
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_transformers_that_were_trained_apart_are_told_before_they_are_merged(tmp_path: Path) -> None:
    folder = save_wan(tmp_path / "base")
    experts = [folder / "transformer_2", folder / "transformer"]
    lines = lines_of(merge_models(str(folder), experts, Merge(weights=[0.5, 0.5]), tmp_path / "one", dry_run=True))
    assert "nothing in common" in lines[1]
    assert not (tmp_path / "one").exists()


def test_a_run_merges_the_two_transformers_that_a_base_has(text_config: Callable[..., Config], tmp_path: Path) -> None:
    folder = save_wan(tmp_path / "base", transformer_2=near(tiny_wan(), 0.05))
    config = whole_config(folder, text_config, experts="denoisers")
    planned = lines_of(describe(config, tmp_path / "run"))
    assert "experts: transformer_2 on [0, 875), transformer on [875, 1000), as the base has them" in planned
    assert not any("finetuning" in line for line in planned)
    # An expert is one of the two, and the base that they are merged into is one, too.
    size = 4 * sum(p.numel() for p in tiny_wan().parameters())
    assert any(f"2 of 2 networks in fp32 {2 * size / 1e3:.1f} kB" in line for line in planned)
    lines = lines_of(workflow.run(config, tmp_path / "run"))
    assert any("the cosine of their weights is 0.9" in line for line in lines)
    # The ensemble of the two is the base.
    expected = stock_frames(stock(folder), [0, 1], num_inference_steps=4, guidance_scale=1.0)
    ensemble = stock(tmp_path / "run/merged")
    assert ensemble.transformer_2 is None
    ensemble.transformer = load_ensemble(tmp_path / "run")
    found = stock_frames(ensemble, [0, 1], num_inference_steps=4, guidance_scale=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    list(repeat_merge(tmp_path / "run/merged", tmp_path / "again"))
    assert load_base(str(tmp_path / "again")).sha256 == load_base(str(tmp_path / "run/merged")).sha256


def test_only_a_base_with_two_denoisers_can_give_experts(text_config: Callable[..., Config], tmp_path: Path) -> None:
    config = whole_config(save_wan(tmp_path / "one", None), text_config, experts="denoisers")
    with pytest.raises(ValueError, match=r"experts is denoisers, and base .* has one; expected a WanPipeline with two"):
        list(describe(config, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"experts is denoisers, which .* set neither ranges nor lora"):
        whole_config(tmp_path, text_config, experts="denoisers", ranges={"unit": "sigma", "edges": [0.5]})


def test_an_expert_of_a_run_and_a_lora_are_merged_into_both_transformers(tmp_path: Path) -> None:
    folder, expert = save_wan(tmp_path / "base"), tmp_path / "expert"
    expert.mkdir()
    start = load_base(str(folder)).network.state_dict()
    write_tensors(expert / "model.safetensors", {key: value + 1 for key, value in start.items()})
    list(merge_models(str(folder), [expert], Merge(weights=[0.5]), tmp_path / "merged"))
    for key, value in load_base(str(tmp_path / "merged")).network.state_dict().items():
        torch.testing.assert_close(value, start[key] + 0.5)
    factors = {
        f"{part}.blocks.0.attn1.to_q.lora_{side}.weight": torch.ones((2, 24) if side == "A" else (24, 2))
        for part in ("transformer", "transformer_2")
        for side in "AB"
    }
    write_tensors(tmp_path / "lora.safetensors", factors)
    list(merge_models(str(folder), [tmp_path / "lora.safetensors"], Merge(weights=[1]), tmp_path / "both"))
    found = load_base(str(tmp_path / "both")).network.state_dict()
    moved = [key for key, value in found.items() if not torch.equal(value, start[key])]
    assert moved == [f"{part}.blocks.0.attn1.to_q.weight" for part in ("transformer", "transformer_2")]
