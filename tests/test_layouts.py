"""Layouts that diffusers reads: which files are merged, where they are written, which keys may differ."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    UNet2DModel,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from decouple_merge.cli import main as cli
from decouple_merge.config import Merge
from decouple_merge.errors import UserError
from decouple_merge.merging.described import describe_model
from decouple_merge.merging.recipes import merge_models, repeat_merge
from decouple_merge.storage.layouts import denoisers, weight_files
from decouple_merge.storage.tensors import TensorFiles

Tensors = dict[str, Tensor]


def make_unet(shift: float = 0.0) -> UNet2DModel:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return shifted(unet, shift)


@torch.no_grad()
def shifted(network: Any, shift: float) -> Any:
    for p in network.parameters():
        p.add_(shift)
    return network


def merge_into(base: Path, expert: Path, out: Path, **settings: Any) -> list[Any]:
    return list(merge_models(str(base), [expert], Merge(**({"weights": [0.5]} | settings)), out))


def is_shifted(network: nn.Module, start: nn.Module, shift: float) -> bool:
    found, expected = network.state_dict(), start.state_dict()
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[k], expected[k] + shift, atol=1e-5) for k in expected)


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    """An expert, 0.2 from the base in every parameter."""
    make_unet(0.2).save_pretrained(tmp_path / "expert")
    return tmp_path / "expert"


# -- which files


def at_root(folder: Path) -> None:
    """As google/ddpm-cifar10-32 is laid out."""
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(folder)
    for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        path.rename(folder / path.name)
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()


def sharded_variant(folder: Path) -> None:
    make_unet().save_pretrained(folder, max_shard_size="20KB", variant="fp16")


def old_sharded_variant(folder: Path) -> None:
    """As diffusers before 0.28 named shards, the variant last."""
    make_unet().save_pretrained(folder, max_shard_size="20KB", variant="fp16")
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    text = index.read_text()
    for path in sorted(folder.glob("*.fp16-*")):
        new = path.name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
        text = text.replace(path.name, new)
        path.rename(folder / new)
    index.write_text(text)


def variant_only(folder: Path) -> None:
    make_unet().save_pretrained(folder, variant="fp16")


def side_by_side(folder: Path) -> None:
    for variant in ("fp16", "non_ema"):
        make_unet(7.0).save_pretrained(folder, variant=variant)
    make_unet().save_pretrained(folder)


def shards_before_a_file(folder: Path) -> None:
    make_unet(7.0).save_pretrained(folder)
    stale = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    make_unet().save_pretrained(folder, max_shard_size="20KB")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(stale)


def beside_others(folder: Path) -> None:
    make_unet().save_pretrained(folder)
    save_file({"a": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "lay_out",
    [at_root, sharded_variant, old_sharded_variant, variant_only, side_by_side, shards_before_a_file, beside_others],
)
def test_a_network_is_what_diffusers_loads_and_is_written_under_the_plain_name(
    tmp_path: Path, expert: Path, lay_out: Any
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    lay_out(base)
    merge_into(base, expert, out)
    assert is_shifted(UNet2DModel.from_pretrained(out), make_unet(), 0.1)
    weights = [p.name for p in out.iterdir() if "safetensors" in p.name]
    assert weights == ["diffusion_pytorch_model.safetensors"]
    # As an expert, too.
    plain = tmp_path / "plain"
    make_unet(1.0).save_pretrained(plain)
    merge_into(plain, base, tmp_path / "second")
    assert is_shifted(UNet2DModel.from_pretrained(tmp_path / "second"), make_unet(), 0.5)
    if lay_out not in (sharded_variant, old_sharded_variant, variant_only):
        assert is_shifted(UNet2DModel.from_pretrained(base), make_unet(), 0.0)


def test_a_network_at_the_root_stays_a_pipeline(tmp_path: Path, expert: Path) -> None:
    at_root(tmp_path / "base")
    merge_into(tmp_path / "base", expert, tmp_path / "out")
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert is_shifted(pipeline.unet, make_unet(), 0.1)


def two_variants(folder: Path) -> None:
    for variant in ("fp16", "non_ema"):
        make_unet().save_pretrained(folder, variant=variant)


def variant_beside_a_pickle(folder: Path) -> None:
    make_unet().save_pretrained(folder, variant="fp16")
    make_unet().save_pretrained(folder, safe_serialization=False)


def pickle_only(folder: Path) -> None:
    make_unet().save_pretrained(folder, safe_serialization=False)


def pipeline_of_pickles(folder: Path) -> None:
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(folder, safe_serialization=False)


def lost_shard(folder: Path) -> None:
    sharded_variant(folder)
    sorted(folder.glob("*-00002-of-*"))[0].unlink()


def index_without_a_map(folder: Path) -> None:
    sharded_variant(folder)
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text('{"weight_map": [1]}')


def index_that_climbs(folder: Path) -> None:
    sharded_variant(folder)
    text = json.dumps({"weight_map": {"a": "../expert/diffusion_pytorch_model.safetensors"}})
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(text)


def broken_pipeline(folder: Path) -> None:
    at_root(folder)
    (folder / "model_index.json").write_text("[1")


def no_denoiser(folder: Path) -> None:
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(folder)
    shutil.rmtree(folder / "unet")


@pytest.mark.parametrize(
    ("lay_out", "message"),
    [
        (two_variants, r"which of diffusion_pytorch_model\.fp16\.safetensors, .*non_ema\.safetensors is meant"),
        (variant_beside_a_pickle, r"the plain weights are a pickle, diffusion_pytorch_model\.bin, beside fp16"),
        (pickle_only, r"only pickles: diffusion_pytorch_model\.bin"),
        (pipeline_of_pickles, r"unet: only pickles: diffusion_pytorch_model\.bin"),
        (lost_shard, "1 of [0-9]+ shards are missing, .*-00002-of-"),
        (index_without_a_map, "expected a weight_map"),
        (index_that_climbs, "expected a weight_map of keys to files beside it"),
        (broken_pipeline, r"model_index\.json, line 1, column 3: not JSON"),
        (no_denoiser, "is a pipeline without unet, transformer or prior"),
    ],
)
def test_weights_that_no_rule_chooses_are_refused_in_one_line(
    tmp_path: Path, expert: Path, lay_out: Any, message: str
) -> None:
    lay_out(tmp_path / "base")
    for base, other in ((tmp_path / "base", expert), (expert, tmp_path / "base")):
        with pytest.raises(UserError, match=message) as error:
            merge_into(base, other, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


def test_a_variant_is_read_where_its_file_is_given(tmp_path: Path) -> None:
    two_variants(tmp_path)
    (name,) = (p for p in tmp_path.iterdir() if "non_ema" in p.name)
    assert weight_files(name) == [name]


# -- which parts


def make_wan(shift: float = 0.0, seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return shifted(
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=8,
            ffn_dim=8,
            num_layers=1,
            rope_max_seq_len=8,
        ),
        shift,
    )


def save_wan(folder: Path, shifts: tuple[float, ...]) -> Path:
    """As Wan 2.2 is laid out: a transformer for much noise, and one for little."""
    names = ["transformer", "transformer_2"][: len(shifts)]
    for i, (name, shift) in enumerate(zip(names, shifts, strict=True)):
        make_wan(shift, i).save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {n: ["diffusers", "WanTransformer3DModel"] for n in names}
    index |= {"_class_name": "WanPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index |= {key: [None, None] for key in ("tokenizer", "text_encoder", "vae")}
    index |= {} if len(shifts) > 1 else {"transformer_2": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def transformers(folder: Path) -> list[WanTransformer3DModel]:
    return [WanTransformer3DModel.from_pretrained(folder / name) for name in ("transformer", "transformer_2")]


def test_all_denoisers_of_a_pipeline_are_merged(tmp_path: Path) -> None:
    base, expert = save_wan(tmp_path / "base", (0.0, 0.0)), save_wan(tmp_path / "expert", (0.2, 0.6))
    merge_into(base, expert, tmp_path / "out", blocks={"transformer_2.proj_out.*": [1.0]}, max_shard_bytes=3000)
    first, second = transformers(tmp_path / "out")
    assert is_shifted(first, make_wan(0.0, 0), 0.1)
    assert torch.allclose(second.proj_out.weight, make_wan(0.6, 1).proj_out.weight)
    second.proj_out.load_state_dict(make_wan(0.3, 1).proj_out.state_dict())
    assert is_shifted(second, make_wan(0.0, 1), 0.3)
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert "transformer_2" in "\n".join(describe_model(tmp_path / "out"))
    list(repeat_merge(tmp_path / "out/merge.json", tmp_path / "again"))
    assert json.loads((tmp_path / "again/merge.json").read_text())["merged_sha256"] == record["merged_sha256"]


def test_one_of_two_denoisers_is_chosen_by_its_name(tmp_path: Path) -> None:
    base, expert = save_wan(tmp_path / "base", (0.0, 0.0)), save_wan(tmp_path / "expert", (0.2, 0.6))
    for other in (expert, expert / "transformer_2"):
        merge_into(base, other, tmp_path / "out", component="transformer_2")
        first, second = transformers(tmp_path / "out")
        assert is_shifted(first, make_wan(0.0, 0), 0.0)
        assert is_shifted(second, make_wan(0.0, 1), 0.3)


def test_other_denoisers_than_the_bases_are_named(tmp_path: Path) -> None:
    two, one = save_wan(tmp_path / "two", (0.0, 0.0)), save_wan(tmp_path / "one", (0.2,))
    for base, other in ((two, one), (two, one / "transformer"), (one, two)):
        with pytest.raises(
            UserError, match=r"transformer and transformer_2.*; give .* or choose a part with --component"
        ):
            merge_into(base, other, tmp_path / "out")
    with pytest.raises(UserError, match=r"is a pipeline of scheduler, transformer, expected one with transformer_2"):
        merge_into(one, two, tmp_path / "out", component="transformer_2")


def test_an_adapter_for_the_second_denoiser_is_merged_there(tmp_path: Path) -> None:
    base = save_wan(tmp_path / "base", (0.0, 0.0))
    for prefix in ("", "transformer.", "transformer_2."):
        factors = {f"{prefix}proj_out.lora_{s}.weight": torch.ones((1, 24) if s == "A" else (16, 1)) for s in "AB"}
        save_file(factors, tmp_path / "l.safetensors")
        merge_into(base, tmp_path / "l.safetensors", tmp_path / "out", component="transformer_2")
        first, second = transformers(tmp_path / "out")
        assert is_shifted(first, make_wan(0.0, 0), 0.0)
        assert torch.allclose(second.proj_out.weight, make_wan(0.0, 1).proj_out.weight + 0.5)
    with pytest.raises(UserError, match=r"nothing of it is for transformer; .*2 tensors for transformer_2"):
        merge_into(base, tmp_path / "l.safetensors", tmp_path / "out", component="transformer")


def make_vae(shift: float = 0.0) -> AutoencoderKL:
    torch.manual_seed(0)
    return shifted(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8), shift)


def test_any_part_of_a_pipeline_can_be_merged(tmp_path: Path, expert: Path) -> None:
    for name, shift in (("base", 0.0), ("other", 0.4)):
        DDPMPipeline(make_unet(shift), DDPMScheduler()).save_pretrained(tmp_path / name)
        make_vae(shift).save_pretrained(tmp_path / name / "vae")
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        (tmp_path / name / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    arguments = ["merge", str(tmp_path / "base"), str(tmp_path / "other"), "--weights", "0.5", "--component", "vae"]
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert is_shifted(AutoencoderKL.from_pretrained(tmp_path / "out/vae"), make_vae(), 0.2)
    assert is_shifted(UNet2DModel.from_pretrained(tmp_path / "out/unet"), make_unet(), 0.0)
    with pytest.raises(UserError, match=r"is a pipeline of scheduler, unet, vae, expected one with text_encoder"):
        merge_into(tmp_path / "base", tmp_path / "other", tmp_path / "no", component="text_encoder")


# -- which keys


def keys_file(path: Path, *keys: str, value: float = 1.0) -> Path:
    save_file({k: torch.full((2,), float(value)) for k in keys}, path)
    return path


@pytest.mark.parametrize("extra", ["text_projection.weight", "x.projection.weight", "mid_block.projection.bias"])
def test_extra_keys_are_refused_dropped_or_kept(tmp_path: Path, extra: str) -> None:
    base, expert = (
        keys_file(tmp_path / "b.safetensors", "a"),
        keys_file(tmp_path / "e.safetensors", "a", extra, value=3),
    )
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=rf"unknown: {extra}; expected .*, or --extra-keys drop or keep"):
        merge_into(base, expert, out)
    (line, *_) = merge_into(base, expert, out, extra_keys="drop")
    assert f"--extra-keys drop of unknown: {extra}" in line
    assert load_file(out).keys() == {"a"}
    (line, *_) = merge_into(base, expert, out, extra_keys="keep", dtype="F16")
    assert f"--extra-keys keep of unknown: {extra}" in line
    found = load_file(out)
    assert {k: v.tolist() for k, v in found.items()} == {"a": [2.0, 2.0], extra: [3.0, 3.0]}
    assert found[extra].dtype == torch.float32


def test_experts_that_disagree_on_an_extra_key_are_refused(tmp_path: Path) -> None:
    base = keys_file(tmp_path / "b.safetensors", "a")
    experts = [keys_file(tmp_path / f"{v}.safetensors", "a", "x", value=v) for v in (1.0, 2.0)]
    settings = Merge(weights=[1.0, 1.0], extra_keys="keep")
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"2\.0\.safetensors: x differs from another expert's"):
        list(merge_models(str(base), experts, settings, out))
    list(merge_models(str(base), [experts[1], experts[1]], settings, out))
    assert load_file(out)["x"].tolist() == [2.0, 2.0]


def test_missing_keys_are_refused_or_the_bases(tmp_path: Path) -> None:
    base, expert = keys_file(tmp_path / "b.safetensors", "a", "c"), keys_file(tmp_path / "e.safetensors", "a", value=3)
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"missing: c; expected .*, or --missing-keys base"):
        merge_into(base, expert, out)
    arguments = ["merge", str(base), str(expert), "--weights", "0.5", "--out", str(out), "--missing-keys", "base"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "--missing-keys base of missing: c" in done.output.replace("\n", "")
    assert {k: v.tolist() for k, v in load_file(out).items()} == {"a": [2.0, 2.0], "c": [1.0, 1.0]}


def test_an_adapters_unknown_keys_are_dropped_where_asked(tmp_path: Path) -> None:
    save_file({"q.weight": torch.zeros(2, 2)}, tmp_path / "b.safetensors")
    save_file({f"{m}.lora_{s}.weight": torch.ones(2, 2) for m in "qx" for s in "AB"}, tmp_path / "l.safetensors")
    given = tmp_path / "b.safetensors", tmp_path / "l.safetensors", tmp_path / "o.safetensors"
    with pytest.raises(UserError, match=r"unknown: x\.weight \(of x\.lora_A\.weight\).*or --extra-keys drop"):
        merge_into(*given, extra_keys="keep")
    (line, *_) = merge_into(*given, extra_keys="drop")
    assert "x.lora_B.weight" in line
    assert load_file(given[2])["q.weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_a_run_reads_a_network_at_the_root(tmp_path: Path) -> None:
    at_root(tmp_path)
    assert denoisers(tmp_path) == {"unet": tmp_path}
    assert TensorFiles(weight_files(tmp_path)).entries.keys() == make_unet().state_dict().keys()
    assert issubclass(UNet2DModel, ModelMixin)
