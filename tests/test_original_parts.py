"""VAEs and text encoders in the original layout: against diffusers' own conversion, and merges across layouts."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from decouple_merge.config import Merge
from decouple_merge.errors import UserError
from decouple_merge.merging.recipes import merge_models

Tensors = dict[str, Tensor]
SD2, SDXL = "cond_stage_model.model.", "conditioner.embedders.1.model."
ATTENTION = "mid_block.attentions.0."


def make_vae(shift: float = 0.0) -> AutoencoderKL:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes: dict[str, Any] = {"block_out_channels": (4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    return shifted(AutoencoderKL(**kinds, **sizes, sample_size=8), shift)


def make_text_encoder(shift: float = 0.0, layers: int = 3) -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "projection_dim": 6}
    config = CLIPTextConfig(vocab_size=9, max_position_embeddings=5, num_hidden_layers=layers, **sizes)
    return shifted(CLIPTextModelWithProjection(config), shift)


@torch.no_grad()
def shifted(network: Any, shift: float) -> Any:
    for p in network.parameters():
        p.add_(shift)
    return network


def original_vae(vae: AutoencoderKL) -> Tensors:
    """The same weights as the code of latent diffusion saves them, whose decoder counts from the image."""

    def name(key: str) -> str:
        key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{2 - int(m[1])}", key).replace("down_blocks.", "down.")
        for theirs, ours in (("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2")):
            key = key.replace(theirs, ours)
        key = key.replace(ATTENTION, "mid.attn_1.").replace("attn_1.to_out.0", "attn_1.proj_out")
        key = key.replace("attn_1.to_", "attn_1.").replace("attn_1.group_norm", "attn_1.norm")
        key = key.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample")
        key = key.replace("upsamplers.0", "upsample").replace("conv_shortcut", "nin_shortcut")
        return key.replace("conv_norm_out", "norm_out")

    found = {name(key): value.clone() for key, value in vae.state_dict().items()}
    # Its attention is of convolutions.
    return {k: v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in found.items()}


def open_clip(encoder: CLIPTextModelWithProjection) -> Tensors:
    """The same weights as OpenCLIP saves them."""
    state = {k.removeprefix("text_model."): v.clone() for k, v in encoder.state_dict().items()}
    found = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "text_projection": state.pop("text_projection.weight").T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for key, value in state.items():
        block = key.replace("encoder.layers.", "transformer.resblocks.").replace("layer_norm", "ln_")
        block = block.replace("fc1", "c_fc").replace("fc2", "c_proj").replace("self_attn", "attn")
        if "q_proj" in block:
            parts = [state[key.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            found[block.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif "k_proj" not in block and "v_proj" not in block:
            found[block.replace("final_ln_", "ln_final").replace("final_layer_norm", "ln_final")] = value
    return found


def test_the_layouts_made_here_are_those_that_diffusers_converts() -> None:
    vae, encoder = make_vae(), make_text_encoder()
    found = convert_ldm_vae_checkpoint(original_vae(vae), dict(vae.config))
    assert found.keys() == vae.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in vae.state_dict().items())
    # Of SDXL's prefix, since diffusers leaves out layer 23 of the other.
    given = {SDXL + k: v for k, v in open_clip(encoder).items()}
    # It takes the projection's width for that of the layers.
    given[SDXL + "text_projection"] = torch.zeros(8, 8)
    found = convert_open_clip_checkpoint(SimpleNamespace(config=encoder.config), given, SDXL)
    state = {f"text_model.{k}".replace("text_model.text_", "text_"): v for k, v in plain(encoder).items()}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], v) for k, v in state.items() if k != "text_projection.weight")


def plain(encoder: CLIPTextModelWithProjection) -> Tensors:
    return {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + k: v for k, v in tensors.items()}


def saved(path: Path, tensors: Tensors) -> Path:
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)
    return path


def pipeline(folder: Path, **parts: Any) -> Path:
    for name, network in parts.items():
        network.save_pretrained(folder / name)
    index = {name: ["diffusers", type(network).__name__] for name, network in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **index}))
    return folder


def merge_into(base: Path, expert: Path, out: Path, **settings: Any) -> list[str]:
    lines = merge_models(str(base), [expert], Merge(**({"weights": [0.5]} | settings)), out)
    return [line for line in lines if isinstance(line, str)]


def assert_shifted(found: Tensors, start: Tensors, shift: float) -> None:
    assert found.keys() == start.keys()
    for key, value in start.items():
        assert found[key].shape == value.shape
        torch.testing.assert_close(found[key], value + shift, rtol=0, atol=1e-5)


PARTS: dict[str, tuple[Any, Any, str]] = {
    "vae": (make_vae, original_vae, "first_stage_model."),
    "text_encoder": (make_text_encoder, open_clip, SD2),
    "text_encoder_2": (make_text_encoder, open_clip, SDXL),
}


@pytest.mark.parametrize("component", PARTS)
@pytest.mark.parametrize("is_whole", [True, False], ids=["file of all parts", "file of the part"])
def test_a_pipelines_part_and_the_same_in_the_original_layout_are_merged(
    tmp_path: Path, component: str, is_whole: bool
) -> None:
    make, original, prefix = PARTS[component]
    prefix = prefix if is_whole else ""
    rest = {"model.diffusion_model.x": torch.full((2,), 7.0)} if is_whole else {}
    base = pipeline(tmp_path / "base", **{component: make()})
    expert = saved(tmp_path / "e.safetensors", prefixed(prefix, original(make(0.2))) | rest)
    lines = merge_into(base, expert, tmp_path / "out", component=component)
    (file,) = (tmp_path / "out" / component).glob("*.safetensors")
    assert_shifted(load_file(file), load_file(base / component / file.name), 0.1)
    num_others = bool(rest) + (component != "vae")
    assert (f"{num_others} tensors of it, for other parts" in "".join(lines)) == bool(num_others)
    # And back: a file of the original layout takes a pipeline, a folder, and a file of one.
    start = prefixed(prefix, original(make())) | rest
    single, other = saved(tmp_path / "b.safetensors", start), pipeline(tmp_path / "other", **{component: make(0.2)})
    # A run's expert knows its base by the hash of diffusers' keys, which this file has not.
    (other / component / "expert.json").write_text(json.dumps({"base_sha256": "0" * 64}))
    kept = {k: v for k, v in start.items() if k in rest or k.endswith("logit_scale")}
    for given in (other, other / component, next((other / component).glob("*.safetensors")), expert):
        merge_into(single, given, tmp_path / "out.safetensors", component=component)
        found = load_file(tmp_path / "out.safetensors")
        assert_shifted(
            {k: v for k, v in found.items() if k not in kept}, {k: v for k, v in start.items() if k not in kept}, 0.1
        )
        assert all(torch.equal(found[k], v) for k, v in kept.items() if given is not expert or k in rest)


def test_a_vae_that_is_no_pipelines_tells_what_it_is(tmp_path: Path) -> None:
    make_vae().save_pretrained(tmp_path / "vae")
    file = prefixed("first_stage_model.", original_vae(make_vae(0.2))) | {"model.diffusion_model.x": torch.ones(1)}
    merge_into(tmp_path / "vae", saved(tmp_path / "e.safetensors", file), tmp_path / "out")
    name = "diffusion_pytorch_model.safetensors"
    assert_shifted(load_file(tmp_path / "out" / name), load_file(tmp_path / "vae" / name), 0.1)


def test_the_last_layer_that_stable_diffusion_2_never_reads_stays_as_it_is(tmp_path: Path) -> None:
    whole, cut = open_clip(make_text_encoder()), make_text_encoder(0.2, layers=2)
    del cut.text_projection
    base = saved(tmp_path / "b.safetensors", prefixed(SD2, whole))
    cut_file = saved(tmp_path / "e.safetensors", cut.state_dict())
    out = tmp_path / "out.safetensors"
    lines = merge_into(base, cut_file, out, component="text_encoder")
    assert "14 tensors of the base, for other parts" in lines[0]
    found = load_file(out)
    for key, value in prefixed(SD2, whole).items():
        is_kept = "resblocks.2." in key or key.endswith(("text_projection", "logit_scale"))
        assert torch.equal(found[key], value) == is_kept
    merge_into(cut_file, base, out, component="text_encoder")
    assert load_file(out).keys() == cut.state_dict().keys()
    # Two layers fewer are another network.
    short = make_text_encoder(layers=1)
    with pytest.raises(
        UserError, match=r"missing: cond_stage_model\.model\.transformer\.resblocks\.1\.attn\.in_proj_bias"
    ):
        merge_into(base, saved(tmp_path / "s.safetensors", short.state_dict()), out, component="text_encoder")


def test_a_part_is_chosen_between_two_files_of_the_original_layout(tmp_path: Path) -> None:
    def file(shift: float) -> Tensors:
        parts = prefixed("first_stage_model.", original_vae(make_vae(shift)))
        return parts | prefixed(SDXL, open_clip(make_text_encoder(shift))) | {"model.diffusion_model.x": torch.ones(1)}

    base, expert = saved(tmp_path / "b.safetensors", file(0)), saved(tmp_path / "e.safetensors", file(0.2))
    for component in ("vae", "text_encoder_2"):
        merge_into(base, expert, tmp_path / "out.safetensors", component=component)
        found, start = load_file(tmp_path / "out.safetensors"), load_file(base)
        changed = {key for key in start if not torch.equal(found[key], start[key])}
        prefix = PARTS[component][2]
        assert changed == {k for k in start if k.startswith(prefix) and not k.endswith("logit_scale")}


def test_a_lacking_third_is_named_and_stays_the_bases_where_asked(tmp_path: Path) -> None:
    base = saved(tmp_path / "b.safetensors", prefixed(SD2, open_clip(make_text_encoder())))
    state = make_text_encoder(0.2).state_dict()
    del state[next(k for k in state if k.endswith("layers.1.self_attn.k_proj.weight"))]
    expert, out, key = (
        saved(tmp_path / "e.safetensors", state),
        tmp_path / "o.safetensors",
        "resblocks.1.attn.in_proj_weight",
    )
    with pytest.raises(UserError, match=rf"missing: cond_stage_model\.model\.transformer\.{key}; expected"):
        merge_into(base, expert, out, component="text_encoder")
    merge_into(base, expert, out, component="text_encoder", missing_keys="base")
    moved = (load_file(out)[f"{SD2}transformer.{key}"] - load_file(base)[f"{SD2}transformer.{key}"]).view(3, -1)
    assert [pytest.approx(0.1, abs=1e-5), 0, pytest.approx(0.1, abs=1e-5)] == moved.mean(1).tolist()


def test_shapes_are_compared_as_both_layouts_have_them(tmp_path: Path) -> None:
    base = saved(tmp_path / "b.safetensors", prefixed(SD2, open_clip(make_text_encoder())))
    state = make_text_encoder().state_dict()
    key = next(k for k in state if k.endswith("layers.0.self_attn.v_proj.weight"))
    state[key] = torch.zeros(9, 8)
    with pytest.raises(
        UserError, match=r"of another shape: cond_stage_model\.model\.\S+0\.attn\.in_proj_weight; expected"
    ):
        merge_into(base, saved(tmp_path / "e.safetensors", state), tmp_path / "o.safetensors", component="text_encoder")


def test_numbers_of_places_that_older_text_encoders_hold_are_no_weights(tmp_path: Path) -> None:
    state = {f"text_model.{k}": v for k, v in plain(make_text_encoder()).items() if k != "text_projection.weight"}
    old = state | {"text_model.embeddings.position_ids": torch.arange(5)[None]}
    prefix = "cond_stage_model.transformer."
    base = saved(tmp_path / "b.safetensors", prefixed(prefix, old))
    expert = saved(tmp_path / "e.safetensors", {k: v + 0.2 for k, v in state.items()})
    merge_into(base, expert, tmp_path / "o.safetensors", component="text_encoder")
    found = load_file(tmp_path / "o.safetensors")
    assert_shifted({k: v for k, v in found.items() if v.is_floating_point()}, prefixed(prefix, state), 0.1)
    assert found[f"{prefix}text_model.embeddings.position_ids"].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("component", ["", "text_encoder_2"])
def test_a_text_encoders_adapter_changes_openclips_tensor_where_it_lies(tmp_path: Path, component: str) -> None:
    start = prefixed(SDXL, open_clip(make_text_encoder())) | {"model.diffusion_model.q.weight": torch.ones(8, 8)}
    base, out = saved(tmp_path / "b.safetensors", start), tmp_path / "o.safetensors"
    modules = ["lora_te2_text_model_encoder_layers_1_self_attn_k_proj", "lora_te2_text_model_encoder_layers_0_mlp_fc1"]
    sizes = {modules[0]: 8, modules[1]: 12, "lora_unet_q": 8}
    factors = {f"{m}.lora_down.weight": torch.ones(1, 8) for m in sizes}
    factors |= {f"{m}.lora_up.weight": torch.ones(n, 1) for m, n in sizes.items()}
    merge_into(base, saved(tmp_path / "l.safetensors", factors), out, component=component or None)
    found = load_file(out)
    expected = {k: v.clone() for k, v in start.items()}
    expected[f"{SDXL}transformer.resblocks.1.attn.in_proj_weight"][8:16] += 0.5
    expected[f"{SDXL}transformer.resblocks.0.mlp.c_fc.weight"] += 0.5
    expected["model.diffusion_model.q.weight"] += 0 if component else 0.5
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in expected.items())
    strange = saved(tmp_path / "l.safetensors", {k.replace("layers_1", "layers_7"): v for k, v in factors.items()})
    with pytest.raises(UserError, match=r"unknown: .*layers_7_self_attn_k_proj"):
        merge_into(base, strange, out, component=component or None)
