"""Merging files out of core: layouts, laws, LoRAs, recipes, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from conftest import make_unet
from decouple_merge.cli import main as cli
from decouple_merge.config import Merge
from decouple_merge.merging import files as merging
from decouple_merge.merging.arithmetic import merge
from decouple_merge.merging.described import describe_model
from decouple_merge.merging.experts import open_expert
from decouple_merge.merging.recipes import merge_models, repeat_merge
from decouple_merge.merging.rules import RULES
from decouple_merge.merging.rules.rule import Context, Rule
from decouple_merge.merging.rules.sums import Coefficients
from decouple_merge.merging.sources import Sources
from decouple_merge.storage.layouts import weight_files
from decouple_merge.storage.tensors import TensorFiles, shards

Tensors = dict[str, Tensor]


def network(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Weights of a made-up transformer, with an integer buffer and two tied tensors."""
    draws = torch.Generator().manual_seed(seed)
    tied = torch.randn(6, 4, generator=draws).to(dtype)
    return {
        "blocks.0.attn.weight": torch.randn(4, 4, generator=draws).to(dtype),
        "blocks.0.conv.weight": torch.randn(6, 4, 3, 3, generator=draws).to(dtype),
        "blocks.1.attn.weight": torch.randn(4, 4, generator=draws).to(dtype),
        "embed.weight": tied,
        "head.weight": tied.clone(),
        "ids": torch.arange(5),
        "scale": torch.randn((), generator=draws).to(dtype),
    }


def saved(path: Path, tensors: Tensors, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt", **metadata})
    return path


def sharded(folder: Path, tensors: Tensors) -> Path:
    """Write a network's folder in two shards with an index, as diffusers does."""
    keys = sorted(tensors)
    parts = [keys[:3], keys[3:]]
    names = [f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, part in zip(names, parts, strict=True):
        saved(folder / name, {k: tensors[k] for k in part})
    places = {k: name for name, part in zip(names, parts, strict=True) for k in part}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"_class_name": "MadeUp"}')
    return folder


def run(base: Path, experts: list[Path], out: Path, **settings: Any) -> list[Any]:
    return list(merge_models(str(base), experts, Merge(**settings), out))


def equal(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def test_a_file_and_shards_of_the_same_tensors_merge_alike(tmp_path: Path) -> None:
    base, expert = network(0), network(1)
    run(
        saved(tmp_path / "b.safetensors", base),
        [sharded(tmp_path / "e", expert)],
        tmp_path / "m.safetensors",
        weights=[0.3],
    )
    assert equal(load_file(tmp_path / "m.safetensors"), merge(base, [expert], [0.3]))
    out = tmp_path / "shards"
    run(sharded(tmp_path / "b", base), [tmp_path / "e"], out, weights=[0.3], max_shard_bytes=300)
    files = weight_files(out)
    assert len(files) > 1
    assert equal({k: v for f in files for k, v in load_file(f).items()}, merge(base, [expert], [0.3]))
    assert (out / "config.json").exists()
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(base)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in base.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_zero_give_the_base_and_one_the_expert_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base, experts = network(0, dtype), [network(1, dtype), network(2, dtype)]
    paths = [saved(tmp_path / f"{i}.safetensors", e) for i, e in enumerate(experts)]
    origin = saved(tmp_path / "base.safetensors", base)
    for weights, expected in (([0.0, 0.0], base), ([0.0, 1.0], experts[1])):
        run(origin, paths, tmp_path / "m.safetensors", weights=weights)
        assert equal(load_file(tmp_path / "m.safetensors"), {**expected, "ids": base["ids"]})
        run(origin, paths, tmp_path / "m.safetensors", weights=weights, method="dare")
        assert equal(load_file(tmp_path / "m.safetensors"), {**expected, "ids": base["ids"]})


def test_halves_are_summed_in_float32_and_written_as_asked(tmp_path: Path) -> None:
    base, expert = network(0, torch.float16), network(1, torch.float32)
    paths = saved(tmp_path / "b.safetensors", base), saved(tmp_path / "e.safetensors", expert)
    run(paths[0], [paths[1]], tmp_path / "half.safetensors", weights=[0.7])
    run(paths[0], [paths[1]], tmp_path / "full.safetensors", weights=[0.7], dtype="F32")
    half, full = load_file(tmp_path / "half.safetensors"), load_file(tmp_path / "full.safetensors")
    key = "blocks.0.attn.weight"
    exact = base[key].double() + 0.7 * (expert[key].double() - base[key].double())
    assert half[key].dtype == torch.float16
    torch.testing.assert_close(full[key].double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(half[key], full[key].half())
    assert full["ids"].dtype == torch.int64


def test_a_blocks_weights_hold_for_its_tensors_alone(tmp_path: Path) -> None:
    base, experts = network(0), [network(1), network(2)]
    paths = [saved(tmp_path / f"{i}.safetensors", e) for i, e in enumerate(experts)]
    blocks = {"blocks.0.*": [1.0, 0.0], "blocks.*": [0.0, 1.0]}
    run(saved(tmp_path / "b.safetensors", base), paths, tmp_path / "m.safetensors", weights=[0.0, 0.0], blocks=blocks)
    found = load_file(tmp_path / "m.safetensors")
    expected = {
        k: experts[0 if k.startswith("blocks.0") else 1][k] if k.startswith("blocks") else v for k, v in base.items()
    }
    assert equal(found, expected)


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties"])
def test_the_order_of_experts_changes_no_method(tmp_path: Path, method: str) -> None:
    origin = saved(tmp_path / "b.safetensors", network(0))
    paths = [saved(tmp_path / f"{i}.safetensors", network(i + 1)) for i in range(2)]
    for name, order, weights in (("x", paths, [0.3, 0.9]), ("y", paths[::-1], [0.9, 0.3])):
        run(origin, order, tmp_path / f"{name}.safetensors", weights=weights, method=method, density=0.5)
    x, y = (load_file(tmp_path / f"{name}.safetensors") for name in "xy")
    assert equal(x, y)
    assert not equal(x, network(0))


def test_a_merged_pipeline_is_the_bases_with_other_weights(tmp_path: Path) -> None:
    DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=40)).save_pretrained(tmp_path / "base")
    other = make_unet()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    DDPMPipeline(other, DDPMScheduler()).save_pretrained(tmp_path / "expert")
    # A copy in another precision must not survive beside the merged weights.
    saved(tmp_path / "base/unet/diffusion_pytorch_model.bin", {"a": torch.zeros(1)})
    run(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", weights=[0.5])
    assert sorted(p.name for p in (tmp_path / "out/unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.num_train_timesteps == 40
    start = make_unet().state_dict()
    for key, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, start[key] + 0.05)
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["merged_sha256"] == open_expert(tmp_path / "out").files.sha256()
    assert "0.5000" in (tmp_path / "out/README.md").read_text()


def test_fisher_files_weight_each_entry(tmp_path: Path) -> None:
    base, experts = network(0), [network(1), network(2)]
    paths = [saved(tmp_path / f"{i}.safetensors", e) for i, e in enumerate(experts)]
    informed = [{k: torch.rand(v.shape) + 0.1 for k, v in base.items()} for _ in experts]
    files = [saved(tmp_path / f"fisher-{i}.safetensors", f) for i, f in enumerate(informed)]
    origin, out = saved(tmp_path / "b.safetensors", base), tmp_path / "m.safetensors"
    run(origin, paths, out, weights=[1.0, 2.0], method="fisher", fishers=files)
    key = "head.weight"
    a, b = informed[0][key], 2 * informed[1][key]
    torch.testing.assert_close(load_file(out)[key], (a * experts[0][key] + b * experts[1][key]) / (a + b))
    with pytest.raises(ValueError, match="fishers names 1 files for 2 experts, without gaps; expected one"):
        run(origin, paths, out, weights=[1.0, 1.0], method="fisher", fishers=files[:1])
    saved(files[0], {"head.weight": a})
    with pytest.raises(ValueError, match=r"fishers names 2 files for 2 experts, without blocks\.0\.attn\.weight"):
        run(origin, paths, out, weights=[1.0, 1.0], method="fisher", fishers=files)


def test_a_projection_that_is_none_of_the_trunks_is_an_unknown_key(tmp_path: Path) -> None:
    base, eye = network(0), torch.eye(2)
    origin, out = saved(tmp_path / "b.safetensors", base), tmp_path / "m"
    strange = saved(tmp_path / "e.safetensors", base | {"text_projection.weight": eye})
    with pytest.raises(ValueError, match=r"doesn't fit the base: unknown: text_projection\.weight; expected"):
        run(origin, [strange], tmp_path / "m.safetensors", weights=[1.0])
    trunk = saved(tmp_path / "t.safetensors", base | {"up_blocks.12.projection.weight": 3 * eye})
    run(sharded(tmp_path / "folder", base), [trunk], out, weights=[0.5])
    assert equal(load_file(out / "projections.safetensors"), {"up_blocks.12.projection.weight": 2 * eye})
    record = json.loads((out / "merge.json").read_text())
    assert record["projection"] == "trunk"
    assert "projections.safetensors" in (out / "README.md").read_text()
    with pytest.raises(ValueError, match=r"m has projections.safetensors, layers .*; expected a stock model"):
        run(out, [trunk], tmp_path / "again", weights=[0.5])


def test_a_rule_of_the_users_own_merges_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loudest(base: Tensor, experts: list[Tensor], weights: list[float], context: Context) -> Coefficients:
        """Take each entry from the expert that moved it most."""
        moves = torch.stack([(e - base).abs() for e in experts])
        chosen: Coefficients = [(moves.argmax(0) == i).float() for i in range(len(experts))]
        return [0.0, *chosen]

    monkeypatch.setitem(RULES, "loudest", Rule(loudest))
    base, experts = network(0), [network(1), network(2)]
    paths = [saved(tmp_path / f"{i}.safetensors", e) for i, e in enumerate(experts)]
    run(saved(tmp_path / "b.safetensors", base), paths, tmp_path / "m.safetensors", weights=[1, 1], method="loudest")
    found = load_file(tmp_path / "m.safetensors")["head.weight"]
    moves = [(e["head.weight"] - base["head.weight"]).abs() for e in experts]
    assert torch.equal(found, torch.where(moves[0] >= moves[1], experts[0]["head.weight"], experts[1]["head.weight"]))
    with pytest.raises(ValueError, match="expected one of linear, ties"):
        run(tmp_path / "b.safetensors", paths, tmp_path / "m.safetensors", weights=[1, 1], method="quietest")
    with pytest.raises(ValueError, match=r"method: expected one of linear, ties, .*, found 'quietest'"):
        merge(base, experts, [1.0, 1.0], "quietest")


# -- LoRA


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.conv = nn.Linear(6, 4), nn.Conv2d(3, 5, 3)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_lora_merges_as_peft_itself_merges_it(tmp_path: Path, rslora: bool) -> None:
    base = Block()
    saved(tmp_path / "base.safetensors", base.state_dict())
    adapter: Any = get_peft_model(
        Block(),
        LoraConfig(r=2, lora_alpha=6, use_rslora=rslora, target_modules=["to_q", "conv"], init_lora_weights=False),
    )
    adapter.save_pretrained(tmp_path / "lora")
    expected = adapter.merge_and_unload().state_dict()
    run(tmp_path / "base.safetensors", [tmp_path / "lora"], tmp_path / "out.safetensors", weights=[1.0])
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == base.state_dict().keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["conv.weight"], base.state_dict()["conv.weight"])


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_a_diffusers_lora_is_the_product_times_its_scale(tmp_path: Path, names: tuple[str, str]) -> None:
    base = network(0)
    down, up = torch.randn(2, 4), torch.randn(4, 2)
    factors = {f"unet.blocks.0.attn.{names[0]}.weight": down, f"unet.blocks.0.attn.{names[1]}.weight": up}
    origin = saved(tmp_path / "b.safetensors", base)
    for alpha, scale in ((None, 1.0), (0.5, 0.25)):
        extra = {} if alpha is None else {"unet.blocks.0.attn.alpha": torch.tensor(alpha)}
        run(origin, [saved(tmp_path / "l.safetensors", factors | extra)], tmp_path / "m.safetensors", weights=[0.5])
        found = load_file(tmp_path / "m.safetensors")
        changed = base["blocks.0.attn.weight"] + 0.5 * scale * up @ down
        torch.testing.assert_close(found.pop("blocks.0.attn.weight"), changed, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(v, base[k]) for k, v in found.items())


# -- recipes


def test_a_recipe_repeats_a_merge_to_the_same_bytes(tmp_path: Path) -> None:
    base, expert = sharded(tmp_path / "b", network(0)), saved(tmp_path / "e.safetensors", network(1))
    settings = {
        "weights": [0.4],
        "method": "dare_ties",
        "density": 0.5,
        "seed": 3,
        "dtype": "BF16",
        "max_shard_bytes": 200,
    }
    run(base, [expert], tmp_path / "first", **settings)
    list(repeat_merge(tmp_path / "first/merge.json", tmp_path / "again"))
    contents = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("first", "again")]
    assert contents[0] == contents[1]
    assert len(contents[0]) > 4
    list(repeat_merge(tmp_path / "first/merge.json", tmp_path / "third", dry_run=True))
    assert not (tmp_path / "third").exists()
    saved(expert, network(2))
    with pytest.raises(ValueError, match=r"e\.safetensors is not what the recipe was made with: found"):
        list(repeat_merge(tmp_path / "first/merge.json", tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_info_reads_back_what_a_merge_was(tmp_path: Path) -> None:
    base, expert = saved(tmp_path / "b.safetensors", network(0)), saved(tmp_path / "e.safetensors", network(1))
    run(base, [expert], tmp_path / "m.safetensors", weights=[0.25])
    lines = "\n".join(describe_model(tmp_path / "m.safetensors"))
    assert "7 tensors" in lines
    assert f"{TensorFiles([expert]).sha256()}" in lines
    assert "0.25" in lines
    assert "no record of a merge" in "\n".join(describe_model(base))


def test_a_dry_run_writes_nothing_and_says_what_would_be(tmp_path: Path) -> None:
    base, expert = saved(tmp_path / "b.safetensors", network(0)), saved(tmp_path / "e.safetensors", network(1))
    out = tmp_path / "m.safetensors"
    arguments = ["merge", str(base), str(expert), "--weights", "0.5", "--out", str(out), "--block", "blocks.*=1"]
    done = CliRunner().invoke(cli.app, [*arguments, "--dry-run"])
    assert done.exit_code == 0
    assert "linear merge of 1 experts: 7 tensors" in done.output
    assert not out.exists()
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert torch.equal(load_file(out)["blocks.0.attn.weight"], network(1)["blocks.0.attn.weight"])


# -- memory


def test_no_more_than_a_few_tensors_are_held_whatever_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {f"{i:02}": torch.randn(8) for i in range(40)}
    base, expert = saved(tmp_path / "b.safetensors", many), saved(tmp_path / "e.safetensors", many)
    held, most = 0, 0
    original: Callable[..., Tensor] = Sources.merged

    def counted(self: Sources, key: str, dtype: torch.dtype) -> Tensor:
        nonlocal held, most
        held += 1
        most = max(most, held)
        return original(self, key, dtype)

    monkeypatch.setattr(Sources, "merged", counted)
    for _ in (
        e
        for e in merge_models(str(base), [expert], Merge(weights=[1.0]), tmp_path / "m.safetensors")
        if not isinstance(e, str)
    ):
        held -= 1
    assert held == 0
    assert most <= merging.NUM_AHEAD + 1


def test_shards_hold_every_tensor_once_and_keep_to_their_size() -> None:
    layout = {f"k{i}": (torch.float32 if i % 2 else torch.int64, (i + 1,)) for i in range(12)}
    groups = shards(layout, 64)
    assert sorted(k for g in groups for k in g) == sorted(layout)
    sizes = [sum(d.itemsize * s[0] for d, s in g.values()) for g in groups]
    assert all(size <= 64 or len(g) == 1 for size, g in zip(sizes, groups, strict=True))


# -- what is refused


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path) -> None:
    bad = network(1)
    bad["blocks.1.attn.weight"][2, 2] = float("nan")
    base, expert = saved(tmp_path / "b.safetensors", network(0)), saved(tmp_path / "e.safetensors", bad)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.weight has NaN or infinity"):
        run(base, [expert], tmp_path / "m.safetensors", weights=[1.0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.safetensors", "e.safetensors"]
    run(base, [expert], tmp_path / "m.safetensors", weights=[1.0], allow_non_finite=True)
    assert load_file(tmp_path / "m.safetensors")["blocks.1.attn.weight"].isnan().sum() == 1


def refused_inputs(tmp_path: Path) -> dict[str, Path]:
    tensors = network(1)
    missing = {k: v for k, v in tensors.items() if k != "scale"}
    (tmp_path / "pickled").mkdir()
    torch.save({"a": 1}, tmp_path / "pickled/model.bin")
    half = saved(tmp_path / "cut.safetensors", tensors)
    half.write_bytes(half.read_bytes()[:300])
    return {
        "missing: scale": saved(tmp_path / "missing.safetensors", missing),
        "unknown: more": saved(tmp_path / "more.safetensors", {**tensors, "more": torch.ones(1)}),
        "of another shape: scale": saved(tmp_path / "shape.safetensors", {**tensors, "scale": torch.ones(2)}),
        r"can't be added, scale \(F8_E4M3\)": saved(
            tmp_path / "fp8.safetensors", {**tensors, "scale": torch.ones(()).to(torch.float8_e4m3fn)}
        ),
        r"scale is of I8, the base's of F32, and the two can't be added": saved(
            tmp_path / "int8.safetensors", {**tensors, "scale": torch.ones((), dtype=torch.int8)}
        ),
        "only pickles: model.bin": tmp_path / "pickled",
        "is a pickle, expected safetensors": tmp_path / "pickled/model.bin",
        "no whole safetensors file": half,
        "there is no such file or folder": tmp_path / "nowhere",
        "with only one factor": saved(tmp_path / "half.safetensors", {"blocks.0.attn.lora_A.weight": torch.ones(2, 4)}),
        r"unknown: elsewhere\.weight": saved(
            tmp_path / "l.safetensors",
            {"elsewhere.lora_A.weight": torch.ones(2, 4), "elsewhere.lora_B.weight": torch.ones(4, 2)},
        ),
    }


def test_experts_that_dont_fit_are_refused_by_name(tmp_path: Path) -> None:
    base = saved(tmp_path / "b.safetensors", network(0))
    for message, path in refused_inputs(tmp_path).items():
        with pytest.raises(ValueError, match=message):
            run(base, [path], tmp_path / "out.safetensors", weights=[1.0])
        assert not (tmp_path / "out.safetensors").exists()


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    tensors = network(0) | {"head.weight": torch.ones(2, 4, dtype=torch.int8)}
    base = saved(tmp_path / "b.safetensors", tensors)
    with pytest.raises(ValueError, match=r"b.safetensors: head.weight is of I8, expected weights that can be added"):
        run(base, [base], tmp_path / "out.safetensors", weights=[1.0])


@pytest.mark.parametrize("method", [name for name, rule in RULES.items() if rule.only_finite and not rule.needs])
def test_a_rule_that_takes_finite_weights_alone_takes_no_others(tmp_path: Path, method: str) -> None:
    base = saved(tmp_path / "b.safetensors", network(0))
    for number in (math.nan, math.inf):
        tensors = network(1)
        tensors["head.weight"][0, 0] = number
        expert = saved(tmp_path / "e.safetensors", tensors)
        with pytest.raises(ValueError, match=f"has NaN or infinity; .* method {method} takes no others"):
            run(base, [expert], tmp_path / "m.safetensors", weights=[1.0], method=method, allow_non_finite=True)


def test_an_expert_of_another_base_is_refused_whatever_the_bases_dtype(tmp_path: Path) -> None:
    half = network(0, torch.float16)
    base = saved(tmp_path / "b.safetensors", half)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    origin = TensorFiles([saved(tmp_path / "wide.safetensors", wide)]).sha256()
    expert = saved(tmp_path / "expert/model.safetensors", network(1))
    (tmp_path / "expert/expert.json").write_text(json.dumps({"base_sha256": origin}))
    run(base, [expert.parent], tmp_path / "m.safetensors", weights=[1.0])
    (tmp_path / "expert/expert.json").write_text(json.dumps({"base_sha256": "0" * 64}))
    for path in (expert, expert.parent):
        with pytest.raises(ValueError, match="was finetuned from another base"):
            run(base, [path], tmp_path / "m.safetensors", weights=[1.0])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"nothing.*": [1.0]}, r"no tensor matches 'nothing\.\*'"),
        ({"blocks.*": [1.0, 2.0]}, "has 2 weights for 1 experts"),
        ({"blocks.*": [1.0], "blocks.0.*": [0.0]}, r"matches 'blocks\.0\.\*' matches an earlier pattern"),
        ({"*0*": [1.0], "blocks.1.*": [1.0], "blocks*": [0.0]}, r"matches 'blocks\*' matches an earlier pattern"),
    ],
)
def test_blocks_that_match_nothing_or_have_other_counts_are_refused(
    tmp_path: Path, blocks: dict[str, list[float]], message: str
) -> None:
    base, expert = saved(tmp_path / "b.safetensors", network(0)), saved(tmp_path / "e.safetensors", network(1))
    with pytest.raises(ValueError, match=message):
        run(base, [expert], tmp_path / "m.safetensors", weights=[1.0], blocks=blocks)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "b", network(0))
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="1 of 2 shards are missing, diffusion_pytorch_model-00002-of-00002"):
        weight_files(folder)


def test_old_attention_names_are_those_of_today(tmp_path: Path) -> None:
    old = {f"mid.attentions.0.{n}.weight": torch.full((2, 2), float(i)) for i, n in enumerate(("query", "proj_attn"))}
    new = {f"mid.attentions.0.{n}.weight": torch.ones(2, 2) for n in ("to_q", "to_out.0")}
    base, expert = saved(tmp_path / "b.safetensors", old), saved(tmp_path / "e.safetensors", new)
    run(base, [expert], tmp_path / "m.safetensors", weights=[0.0])
    found = load_file(tmp_path / "m.safetensors")
    assert torch.equal(found["mid.attentions.0.to_out.0.weight"], torch.ones(2, 2))
    assert torch.equal(found["mid.attentions.0.to_q.weight"], torch.zeros(2, 2))
