"""Adapters as experts: what peft's and diffusers' own merges give, by every name; and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from decouple_merge.config import Merge
from decouple_merge.errors import UserError
from decouple_merge.merging.recipes import merge_models

Tensors = dict[str, Tensor]
TARGETS = ["to_q", "to_out.0", "conv1", "conv_shortcut", "proj_in", "time_emb_proj", "conv_in", "ff.net.0.proj"]


def make_unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 2,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(arguments | changes))


@torch.no_grad()
def disturb(network: nn.Module) -> None:
    """Move all that an adapter trains away from where it changes nothing."""
    draws = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)


def adapted(config: LoraConfig) -> UNet2DConditionModel:
    unet = make_unet()
    unet.add_adapter(config)
    disturb(unet)
    return unet


def saved(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def merged(base: nn.Module | Tensors, adapter: Path, tmp_path: Path, weight: float = 1.0) -> Tensors:
    tensors = base.state_dict() if isinstance(base, nn.Module) else base
    origin, out = saved(tmp_path / "merge-base.safetensors", tensors), tmp_path / "merged.safetensors"
    lines = list(merge_models(str(origin), [adapter], Merge(weights=[weight]), out))
    assert lines
    return load_file(out)


def assert_alike(found: Tensors, expected: Tensors, base: Tensors) -> None:
    assert found.keys() == expected.keys() == base.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert any(not torch.allclose(expected[k], base[k], atol=1e-3) for k in base)


# -- what peft and diffusers write


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 3, "use_rslora": True},
        {"lora_alpha": 6, "use_dora": True},
        {"lora_alpha": 6, "lora_bias": True, "target_modules": [t for t in TARGETS if t != "to_q"]},
        {"alpha_pattern": {"down_blocks.*to_q": 1, "conv1": 5}, "rank_pattern": {r"up_blocks\.\d.*to_out\.0": 2}},
        {"alpha_pattern": {"^conv_in": 9, r"resnets\.1\.conv1": 7}, "use_dora": True, "use_rslora": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_an_adapter_with_its_config_in_the_header_is_what_diffusers_fuses(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    unet = adapted(LoraConfig(**({"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | settings)))
    unet.save_lora_adapter(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    base = make_unet()
    unet.fuse_lora()
    unet.unload_lora()
    assert_alike(merged(base, path, tmp_path), unet.state_dict(), base.state_dict())


class Net(nn.Module):
    """Layers of every kind that peft adapts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.head, self.embed = nn.Linear(6, 6), nn.Linear(4, 3), nn.Embedding(7, 4)
        self.conv, self.point, self.volume = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 1), nn.Conv3d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 2, "use_rslora": True, "target_modules": ["to_q", "embed", "volume"]},
        {"use_dora": True, "target_modules": ["to_q", "conv", "point", "volume"]},
        {"modules_to_save": ["head", "norm"]},
        {"bias": "all"},
        {"bias": "lora_only", "lora_bias": False},
        {"lora_bias": True, "target_modules": ["to_q", "conv"]},
        {"alpha_pattern": {"q|conv": 64, "to_q": 1}, "rank_pattern": {"to_q": 3}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_an_adapter_of_peft_is_what_peft_merges(tmp_path: Path, settings: dict[str, Any]) -> None:
    targets = {"target_modules": ["to_q", "conv", "point", "embed"]}
    network: Any = get_peft_model(Net(), LoraConfig(**({"r": 2, "lora_alpha": 5} | targets | settings)))  # type: ignore[arg-type]
    disturb(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter += 1
    network.save_pretrained(tmp_path / "adapter")
    expected = network.merge_and_unload().state_dict()
    assert_alike(merged(Net(), tmp_path / "adapter", tmp_path), expected, Net().state_dict())


def test_a_pipelines_file_has_a_config_for_each_part(tmp_path: Path) -> None:
    unet = adapted(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"], init_lora_weights=False))
    layers = get_peft_model_state_dict(unet)
    text = {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        layers,
        text,  # type: ignore[arg-type]
        unet_lora_adapter_metadata={"r": 4, "lora_alpha": 16},
        text_encoder_lora_adapter_metadata={"r": 2, "lora_alpha": 1},
    )
    path, base = tmp_path / "pytorch_lora_weights.safetensors", make_unet()
    unet.fuse_lora()
    unet.unload_lora()
    assert_alike(merged(base, path, tmp_path), unet.state_dict(), base.state_dict())
    origin = saved(tmp_path / "b.safetensors", base.state_dict())
    lines = list(merge_models(str(origin), [path], Merge(weights=[1.0]), tmp_path / "o.safetensors", dry_run=True))
    assert re.search(r"1 tensors for text_encoder, text_encoder\.text_model\.\S+ among them, are not merged", lines[0])  # type: ignore[arg-type]


TEXT_SPELLINGS = {
    "diffusers": lambda m: f"text_encoder.{m}.lora_linear_layer.{{}}.weight",
    "old diffusers": lambda m: (
        "text_encoder." + m.replace("q_proj", "to_q_lora").replace("out_proj", "to_out_lora") + ".{}.weight"
    ),
    "peft": lambda m: f"text_encoder.{m}.lora_{{}}.weight",
    "kohya": lambda m: f"lora_te_{m.replace('.', '_')}.lora_{{}}.weight",
    "kohya for SDXL": lambda m: f"lora_te1_{m.replace('.', '_')}.lora_{{}}.weight",
}


@pytest.mark.parametrize("spelling", TEXT_SPELLINGS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_text_encoders_layers_are_merged_where_it_is_chosen(tmp_path: Path, spelling: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = CLIPTextModel(CLIPTextConfig(vocab_size=9, max_position_embeddings=5, **sizes))
    base.save_pretrained(tmp_path / "base/text_encoder")
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "out_proj"], init_lora_weights=False)
    network: Any = get_peft_model(base, config)
    state = get_peft_model_state_dict(network)
    tensors: Tensors = {}
    for key, value in state.items():
        module, side = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()  # type: ignore[union-attr]
        name = side if spelling == "peft" else {"A": "down", "B": "up"}[side]
        module = module if module.startswith("text_model.") else f"text_model.{module}"
        tensors[TEXT_SPELLINGS[spelling](module).format(name)] = value
    path = saved(tmp_path / "l.safetensors", tensors)
    settings = Merge(weights=[1.0], component="text_encoder")
    list(merge_models(str(tmp_path / "base"), [path], settings, tmp_path / "out"))
    found, start = (load_file(tmp_path / name / "text_encoder/model.safetensors") for name in ("out", "base"))
    network.merge_and_unload().save_pretrained(tmp_path / "expected")
    assert_alike(found, load_file(tmp_path / "expected/model.safetensors"), start)


def test_a_config_of_another_part_alone_is_refused(tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": json.dumps({"text_encoder.r": 2, "text_encoder.lora_alpha": 1})}
    layers = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    with pytest.raises(UserError, match=r"found text_encoder\.lora_alpha, expected lora_alpha of what"):
        merged(make_unet(), saved(tmp_path / "l.safetensors", layers, header), tmp_path)


# -- other names


def factors(unet: UNet2DConditionModel) -> dict[str, tuple[Tensor, Tensor]]:
    state = get_peft_model_state_dict(unet)
    modules = sorted(k.removesuffix(".lora_A.weight") for k in state if k.endswith("lora_A.weight"))
    return {m: (state[f"{m}.lora_A.weight"], state[f"{m}.lora_B.weight"]) for m in modules}


def plain(modules: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    return {
        f"{m}.{side}.weight": f
        for m, pair in modules.items()
        for side, f in zip(("lora_A", "lora_B"), pair, strict=True)
    }


SPELLINGS: dict[str, Callable[[str], str]] = {
    "diffusers": lambda m: f"unet.{m}.lora.{{}}.weight",
    "old diffusers": lambda m: (
        "unet."
        + m.replace(".to_out.0", ".processor.to_out_lora.{}.weight").replace(".to_q", ".processor.to_q_lora.{}.weight")
        if "attn" in m
        else f"unet.{m}.lora.{{}}.weight"
    ),
    "kohya": lambda m: f"lora_unet_{m.replace('.', '_')}.lora_{{}}.weight",
    "lycoris": lambda m: f"lycoris_{m.replace('.', '_')}.lora_{{}}.weight",
    "comfy": lambda m: f"diffusion_model.{m}.lora_{{}}.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_module_is_that_module(tmp_path: Path, spelling: str) -> None:
    unet = adapted(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False))
    renamed = {
        SPELLINGS[spelling](m).format(side): factor
        for m, pair in factors(unet).items()
        for side, factor in zip(("down", "up"), pair, strict=True)
    }
    base = make_unet()
    unet.fuse_lora()
    unet.unload_lora()
    found = merged(base, saved(tmp_path / "l.safetensors", renamed), tmp_path)
    assert_alike(found, unet.state_dict(), base.state_dict())


def test_diffusers_own_conversion_to_kohya_is_merged_with_its_alphas(tmp_path: Path) -> None:
    unet = adapted(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = {f"base_model.model.unet.{k}": v for k, v in get_peft_model_state_dict(unet).items()}
    kohya = {k.removeprefix("base_model_model_"): v for k, v in convert_state_dict_to_kohya(state).items()}
    alphas = [k for k in kohya if k.endswith(".alpha")]
    for key in alphas:
        kohya[key] = torch.tensor(2.0)
    assert alphas
    base = make_unet()
    unet.fuse_lora()
    unet.unload_lora()
    found = merged(base, saved(tmp_path / "l.safetensors", kohya), tmp_path)
    assert_alike(found, unet.state_dict(), base.state_dict())


def kohya_file(tmp_path: Path) -> Path:
    """SDXL's blocks as kohya's trainer names them, by the numbers of the original code."""
    torch.manual_seed(3)
    # Its inner names are diffusers' attention and the original's residual blocks.
    sizes = {
        "input_blocks_1_0_in_layers_2": (8, 8, 3),
        "input_blocks_3_0_op": (8, 8, 3),
        "input_blocks_4_0_skip_connection": (8, 16, 1),
        "input_blocks_5_1_transformer_blocks_0_attn1_to_q": (16, 16, 0),
        "middle_block_1_proj_in": (16, 16, 0),
        "output_blocks_0_1_transformer_blocks_0_ff_net_2": (64, 16, 0),
        "output_blocks_2_2_conv": (16, 16, 3),
        "output_blocks_3_0_emb_layers_1": (32, 8, 0),
    }
    tensors: Tensors = {}
    for name, (inputs, outputs, kernel) in sizes.items():
        side = (kernel, kernel) if kernel else ()
        tensors |= {
            f"lora_unet_{name}.lora_down.weight": torch.randn(2, inputs, *side) / 10,
            f"lora_unet_{name}.lora_up.weight": torch.randn(outputs, 2, *(1 for _ in side)) / 10,
            f"lora_unet_{name}.alpha": torch.tensor(3.0),
        }
    return saved(tmp_path / "kohya.safetensors", tensors)


def test_kohyas_block_numbers_are_those_that_diffusers_resolves(tmp_path: Path) -> None:
    sdxl = {
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    path, base = kohya_file(tmp_path), make_unet(**sdxl)
    layers, alphas = StableDiffusionXLPipeline.lora_state_dict(path, unet_config=base.config)[:2]  # type: ignore[misc]
    unet = make_unet(**sdxl)
    StableDiffusionXLPipeline.load_lora_into_unet(layers, alphas, unet)
    unet.fuse_lora()
    unet.unload_lora()
    assert_alike(merged(base, path, tmp_path), unet.state_dict(), base.state_dict())


def test_one_modules_alpha_is_no_others(tmp_path: Path) -> None:
    names = ["transformer_blocks.0.to_q", "single_transformer_blocks.0.to_q"]
    base = {f"{n}.weight": torch.zeros(3, 3) for n in names}
    layers = {f"{n}.lora_{side}.weight": torch.ones(3, 3) for n in names for side in "AB"}
    for owner in names:
        path = saved(tmp_path / "l.safetensors", layers | {f"{owner}.alpha": torch.tensor(30.0)})
        found = merged(base, path, tmp_path)
        assert [float(found[f"{n}.weight"][0, 0]) for n in names] == [30.0 if n == owner else 3.0 for n in names]


def test_a_middle_factor_is_a_convolution_between_the_two(tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, mid, up = torch.randn(3, 4, 1, 1), torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    tensors = {"c.lora_down.weight": down, "c.lora_mid.weight": mid, "c.lora_up.weight": up}
    found = merged({"c.weight": torch.zeros(5, 4, 3, 3)}, saved(tmp_path / "l.safetensors", tensors), tmp_path)
    image = torch.randn(1, 4, 6, 6)
    expected = F.conv2d(F.conv2d(F.conv2d(image, down), mid), up)
    torch.testing.assert_close(F.conv2d(image, found["c.weight"]), expected, rtol=1e-4, atol=1e-4)


def test_a_matrix_adapts_a_convolution_of_one_pixel(tmp_path: Path) -> None:
    down, up = torch.randn(2, 3), torch.randn(4, 2)
    path = saved(tmp_path / "l.safetensors", {"c.lora_A.weight": down, "c.lora_B.weight": up})
    found = merged({"c.weight": torch.zeros(4, 3, 1, 1)}, path, tmp_path)
    torch.testing.assert_close(found["c.weight"], (up @ down)[:, :, None, None])


def test_lycoris_magnitudes_of_rows_are_peft_s(tmp_path: Path) -> None:
    unet = adapted(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"], use_dora=True))
    state, base = get_peft_model_state_dict(unet), make_unet()
    tensors: Tensors = {}
    for key, value in state.items():
        module, _, kind = key.partition(".lora_")
        name = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight", "magnitude_vector": "dora_scale"}[kind]
        ones = (1,) * (state[f"{module}.lora_A.weight"].dim() - 1)
        shaped = value.reshape(-1, *ones) if name == "dora_scale" else value
        tensors[f"lora_unet_{module.replace('.', '_')}.{name}"] = shaped
    unet.fuse_lora()
    unet.unload_lora()
    found = merged(base, saved(tmp_path / "l.safetensors", tensors), tmp_path)
    assert_alike(found, unet.state_dict(), base.state_dict())


# -- what is refused


DOWN, UP = "q.lora_A.weight", "q.lora_B.weight"
WRONG: dict[str, tuple[Tensors, str]] = {
    "swapped": ({DOWN: torch.ones(4, 2), UP: torch.ones(2, 6)}, "the factors look swapped; found q.lora_A.weight"),
    "ranks differ": ({DOWN: torch.ones(2, 6), UP: torch.ones(4, 3)}, "the factors are of different ranks"),
    "rank 0": ({DOWN: torch.ones(0, 6), UP: torch.ones(4, 0)}, "a factor is of rank 0"),
    "no matrix": ({DOWN: torch.ones(6), UP: torch.ones(4)}, "a factor is no matrix"),
    "too wide": (
        {DOWN: torch.ones(2, 7), UP: torch.ones(4, 2)},
        r"the factors don't fit the tensor; .*q\.weight \(4, 6\)",
    ),
    "a kernel": ({DOWN: torch.ones(2, 6, 3, 3), UP: torch.ones(4, 2, 1, 1)}, "the factors don't fit"),
    "integers": ({DOWN: torch.ones(2, 6).int(), UP: torch.ones(4, 2)}, "q.lora_A.weight is torch.int32, expected a fl"),
    "NaN": ({"q.alpha": torch.tensor(float("nan"))}, "alpha is nan for q, expected a finite number"),
    "no alpha": ({"q.alpha": torch.zeros(())}, "alpha is 0 for q, which some read as its rank 2 and others as no"),
    "alphas": ({"q.alpha": torch.ones(2)}, "q.alpha has 2 numbers, expected one"),
    "half": ({UP: torch.ones(0)[:0]}, "a factor is no matrix"),
    "magnitudes of columns": (
        {"q.lora_magnitude_vector": torch.ones(1, 6)},
        "expected a number for each of the 4 rows",
    ),
    "magnitude": ({"q.dora_scale": torch.ones(1, 4)}, r"q\.dora_scale has shape \(1, 4\)"),
    "bias": ({"q.lora_B.bias": torch.ones(4)}, "q.lora_B.bias has no place, expected a base with q.bias"),
    "whole": ({"q.weight": torch.ones(4, 5)}, r"q\.weight has shape \(4, 5\), expected \(4, 6\)"),
    "unknown": ({"p.lora_A.weight": torch.ones(2, 6)}, r"unknown: p\.weight \(of p\.lora_A\.weight\)"),
    "unknown whole": ({"q.strange": torch.ones(2)}, r"unknown: q\.strange"),
    "unknown alpha": ({"p.alpha": torch.ones(())}, r"unknown: p\.weight \(of p\.alpha\)"),
    "twice": ({"q.lora_down.weight": torch.ones(2, 6)}, "q.lora_A.weight and q.lora_down.weight both change q.weight"),
    "LoHa": ({"lora_unet_q.hada_w1_a": torch.ones(2)}, "lora_unet_q.hada_w1_a is of LoHa, expected a LoRA"),
    "LoKr": ({"q.lokr_w1": torch.ones(2)}, "q.lokr_w1 is of LoKr"),
    "OFT": ({"q.oft_blocks": torch.ones(2)}, "q.oft_blocks is of OFT"),
    "BOFT": ({"base_model.model.q.boft_R.default": torch.ones(2)}, "boft_R.default is of OFT"),
    "IA3": ({"q.ia3_l": torch.ones(2)}, "q.ia3_l is of IA3"),
    "differences": ({"q.diff": torch.ones(2)}, "q.diff is of differences of whole tensors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_that_does_not_fit_is_refused_by_key(tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    tensors = {DOWN: torch.ones(2, 6), UP: torch.ones(4, 2)} | change
    path = saved(tmp_path / "l.safetensors", tensors)
    with pytest.raises(UserError, match=message) as error:
        merged({"q.weight": torch.ones(4, 6)}, path, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": "much"}, "alpha 'much' for q, expected a number"),
        ({"lora_alpha": float("nan")}, "alpha is nan for q"),
        ({"lora_alpha": 1, "alpha_pattern": {"q": 0}}, "alpha is 0 for q"),
        ({"lora_alpha": 1, "r": 3}, "rank 3 for q, found factors of rank 2"),
        ({"lora_alpha": 1, "rank_pattern": {".*": 5}}, "rank 5 for q, found factors of rank 2"),
        ({"lora_alpha": 1, "alpha_pattern": {"(": 5}}, "alpha_pattern is .* expected regular expressions"),
        ({"lora_alpha": 1, "alpha_pattern": [3]}, "alpha_pattern is .* expected regular expressions"),
        ({"lora_alpha": 1, "use_dora": True}, "says use_dora, expected a magnitude for q"),
        ({"lora_alpha": 1, "peft_type": "LOHA"}, "peft_type is LOHA; expected a plain LoRA"),
        ({"lora_alpha": 1, "fan_in_fan_out": True}, "fan_in_fan_out is set; expected a plain LoRA"),
        ({"r": 2}, "found no lora_alpha, expected lora_alpha of what"),
        ([1], "expected the settings of a LoRA as JSON"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["header", "file"])
def test_a_config_that_can_not_be_followed_is_refused(tmp_path: Path, settings: Any, message: str, place: str) -> None:
    tensors, text = {DOWN: torch.ones(2, 6), UP: torch.ones(4, 2)}, json.dumps(settings)
    path = saved(
        tmp_path / "l/adapter_model.safetensors",
        tensors,
        {"lora_adapter_metadata": text} if place == "header" else None,
    )
    if place == "file":
        (path.parent / "adapter_config.json").write_text(text)
    for given in (path, path.parent):
        with pytest.raises(UserError, match=message):
            merged({"q.weight": torch.ones(4, 6)}, given, tmp_path)


def test_an_adapter_of_other_parts_alone_says_so(tmp_path: Path) -> None:
    tensors = {f"text_encoder.q.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    with pytest.raises(UserError, match=r"nothing of it is for .*: 2 tensors for text_encoder, text_encoder\.q"):
        merged({"q.weight": torch.ones(2, 2)}, saved(tmp_path / "l.safetensors", tensors), tmp_path)


def test_two_modules_of_one_flat_name_are_not_guessed_between(tmp_path: Path) -> None:
    base = {"a.b_c.weight": torch.ones(2, 2), "a_b.c.weight": torch.ones(2, 2)}
    tensors = {f"lora_unet_a_b_c.lora_{s}.weight": torch.ones(2, 2) for s in ("down", "up")}
    with pytest.raises(UserError, match=r"unknown: a_b_c\.weight"):
        merged(base, saved(tmp_path / "l.safetensors", tensors), tmp_path)
