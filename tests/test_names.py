"""Stable Diffusion's two layouts: the names against diffusers' own conversion, and merges across them."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from decouple_merge.config import Merge
from decouple_merge.errors import UserError
from decouple_merge.merging.names import diffusers_keys, original_keys
from decouple_merge.merging.recipes import merge_models

Tensors = dict[str, Tensor]
PREFIX = "model.diffusion_model."
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SD = {"down_block_types": (CROSS, CROSS, CROSS, PLAIN), "block_out_channels": (8, 8, 16, 16)}
SDXL = {
    "down_block_types": (PLAIN, CROSS, CROSS),
    "block_out_channels": (8, 16, 16),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 24,
}
NETWORKS: dict[str, dict[str, Any]] = {"SD 1.x": SD, "SDXL": SDXL}


# Nobody changes one.
@functools.cache
def make_unet(name: str, shift: float = 0.0, seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    settings = NETWORKS[name] | changes
    up = tuple(kind.replace("Down", "Up") for kind in reversed(settings["down_block_types"]))
    unet = UNet2DConditionModel(
        **{"layers_per_block": 2, "cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 4} | settings,
        up_block_types=up,
        sample_size=8,
    )
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(shift)
    return unet


def original(unet: UNet2DConditionModel, prefix: str = PREFIX) -> Tensors:
    """The same weights in the names of the original code."""
    state = unet.state_dict()
    names = original_keys(state)
    assert names.keys() == state.keys()
    return {prefix + names[key]: value.clone() for key, value in state.items()}


def whole(unet: UNet2DConditionModel, value: float) -> Tensors:
    """A file of the original layout with the other parts of its pipeline."""
    others = [
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final.weight",
        "betas",
    ]
    return original(unet) | {name: torch.full((3,), value) for name in others}


def saved(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def pipeline(folder: Path, unet: UNet2DConditionModel) -> Path:
    unet.save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    index = '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    (folder / "model_index.json").write_text(index)
    return folder


def merge_into(base: Path, expert: Path, out: Path, **settings: Any) -> list[str]:
    lines = merge_models(str(base), [expert], Merge(**({"weights": [0.5]} | settings)), out)
    return [line for line in lines if isinstance(line, str)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_name_is_the_one_that_diffusers_converts(name: str) -> None:
    unet = make_unet(name)
    converted = convert_ldm_unet_checkpoint(original(unet), dict(unet.config))
    assert converted.keys() == unet.state_dict().keys()
    assert all(torch.equal(converted[k], v) for k, v in unet.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_names_are_translated_back_to_what_they_were(name: str, layers: int) -> None:
    names = original_keys(make_unet(name, layers_per_block=layers).state_dict())
    assert len(set(names.values())) == len(names)
    assert diffusers_keys(names.values()) == {value: key for key, value in names.items()}


def test_other_networks_have_no_other_names() -> None:
    for keys in (
        [],
        ["blocks.0.attn.weight"],
        ["double_blocks.0.img_attn.qkv.weight"],
        ["transformer_blocks.0.q.weight"],
    ):
        assert original_keys(keys) == diffusers_keys(keys) == {}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_a_pipeline_takes_an_expert_in_the_original_layout(tmp_path: Path, name: str, prefix: str) -> None:
    base = pipeline(tmp_path / "base", make_unet(name))
    expert = whole(make_unet(name, 0.2), 9.0) if prefix else original(make_unet(name, 0.2), prefix)
    lines = merge_into(base, saved(tmp_path / "e.safetensors", expert), tmp_path / "out")
    assert ("3 tensors of it, for other parts, are not merged" in lines[0]) == bool(prefix)
    found, start = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors"), make_unet(name).state_dict()
    assert found.keys() == start.keys()
    assert all(torch.allclose(found[k], v + 0.1, atol=1e-5) for k, v in start.items())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["pipeline", "network", "file", "unprefixed"])
def test_a_file_in_the_original_layout_stays_one(tmp_path: Path, name: str, kind: str) -> None:
    base, out = whole(make_unet(name), 4.0), tmp_path / "out.safetensors"
    other = make_unet(name, 0.2)
    expert = pipeline(tmp_path / "e", other)
    if kind == "network":
        expert = expert / "unet"
    elif kind != "pipeline":
        tensors = other.state_dict() if kind == "file" else original(other, "")
        expert = saved(tmp_path / "e.safetensors", {k: v.clone() for k, v in tensors.items()})
    lines = merge_into(saved(tmp_path / "b.safetensors", base), expert, out)
    assert "3 tensors of the base, for other parts, stay as they are" in lines[0]
    found = load_file(out)
    assert found.keys() == base.keys()
    for key, value in base.items():
        assert torch.allclose(found[key], value + (0.1 if key.startswith(PREFIX) else 0.0), atol=1e-5)


def test_files_of_one_layout_are_compared_key_by_key(tmp_path: Path) -> None:
    base = saved(tmp_path / "b.safetensors", whole(make_unet("SD 1.x"), 4.0))
    expert = saved(tmp_path / "e.safetensors", whole(make_unet("SD 1.x", 0.2), 8.0))
    merge_into(base, expert, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["betas"].tolist() == [6.0] * 3
    saved(expert, original(make_unet("SD 1.x")))
    with pytest.raises(UserError, match=r"missing: betas, cond_stage_model.*or --missing-keys base"):
        merge_into(base, expert, tmp_path / "out.safetensors")


def test_keys_that_lack_or_are_too_many_across_layouts_are_named_by_their_own_names(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", make_unet("SD 1.x"))
    expert = original(make_unet("SD 1.x", 0.2))
    del expert[f"{PREFIX}input_blocks.1.0.in_layers.2.weight"]
    path = saved(tmp_path / "e.safetensors", expert | {f"{PREFIX}strange.weight": torch.ones(1)})
    message = r"missing: down_blocks\.0\.resnets\.0\.conv1\.weight; unknown: model\.diffusion_model\.strange\.weight"
    with pytest.raises(UserError, match=message):
        merge_into(base, path, tmp_path / "out")
    with pytest.raises(UserError, match=r"unknown: model\.diffusion_model\.strange\.weight.*or --extra-keys drop$"):
        merge_into(base, path, tmp_path / "out", missing_keys="base", extra_keys="keep")
    lines = merge_into(base, path, tmp_path / "out", missing_keys="base", extra_keys="drop")
    assert "strange" in "".join(lines)
    found = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    key = "down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(found[key], make_unet("SD 1.x").state_dict()[key])


def test_the_text_encoder_of_a_file_in_the_original_layout_can_be_chosen(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", make_unet("SD 1.x"))
    (base / "text_encoder").mkdir()
    saved(base / "text_encoder/model.safetensors", {"text_model.final.weight": torch.zeros(3)})
    index = (base / "model_index.json").read_text()
    (base / "model_index.json").write_text(index.replace("}", ', "text_encoder": ["transformers", "CLIPTextModel"]}'))
    expert = saved(tmp_path / "e.safetensors", whole(make_unet("SD 1.x"), 4.0))
    merge_into(base, expert, tmp_path / "out", component="text_encoder")
    found = load_file(tmp_path / "out/text_encoder/model.safetensors")
    assert found["text_model.final.weight"].tolist() == [2.0] * 3


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_adapter_changes_the_same_weights_in_either_layout(tmp_path: Path, layout: str, name: str) -> None:
    unet = make_unet(name)
    state, other = unet.state_dict(), original_keys(unet.state_dict())
    places = ["mid_block.attentions.0.proj_in", "up_blocks.1.upsamplers.0.conv", "down_blocks.1.resnets.0.conv2"]
    factors: Tensors = {}
    for place in places:
        inputs, outputs = state[f"{place}.weight"].shape[1], state[f"{place}.weight"].shape[0]
        kernel = state[f"{place}.weight"].shape[2:]
        module = place if layout == "diffusers" else other[f"{place}.weight"].removesuffix(".weight")
        factors[f"lora_unet_{module.replace('.', '_')}.lora_down.weight"] = torch.ones(1, inputs, *kernel)
        factors[f"lora_unet_{module.replace('.', '_')}.lora_up.weight"] = torch.ones(outputs, 1, *(1 for _ in kernel))
    adapter = saved(tmp_path / "l.safetensors", factors)
    file = saved(tmp_path / "b.safetensors", original(unet))
    merge_into(file, adapter, tmp_path / "file.safetensors")
    merge_into(pipeline(tmp_path / "base", unet), adapter, tmp_path / "out")
    in_file = load_file(tmp_path / "file.safetensors")
    in_folder = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    for key, value in state.items():
        expected = value + 0.5 if key.removesuffix(".weight") in places else value
        assert torch.allclose(in_folder[key], expected)
        assert torch.equal(in_file[PREFIX + other[key]], in_folder[key])


def test_a_text_encoders_adapter_changes_the_file_that_holds_one(tmp_path: Path) -> None:
    key = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    base = saved(tmp_path / "b.safetensors", original(make_unet("SD 1.x")) | {key: torch.zeros(2, 2)})
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    factors = {f"{name}.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    merge_into(base, saved(tmp_path / "l.safetensors", factors), tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")[key].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_a_text_encoder_that_an_older_transformers_saved_is_the_same(tmp_path: Path) -> None:
    names = ["encoder.layers.0.mlp.fc1.weight", "final_layer_norm.bias"]
    old = saved(tmp_path / "old.safetensors", {f"text_model.{n}": torch.ones(2) for n in names})
    new = saved(tmp_path / "new.safetensors", {n: torch.full((2,), 3.0) for n in names})
    for base, expert in ((old, new), (new, old)):
        merge_into(base, expert, tmp_path / "out.safetensors")
        found = load_file(tmp_path / "out.safetensors")
        assert found.keys() == load_file(base).keys()
        assert all(v.tolist() == [2.0, 2.0] for v in found.values())
