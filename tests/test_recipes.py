"""Records are recipes: from anywhere, to the same bytes; what model cards say, and what experts have otherwise."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from conftest import make_unet
from decouple_merge.cli import console
from decouple_merge.cli import main as cli
from decouple_merge.config import Merge
from decouple_merge.merging.arithmetic import merge
from decouple_merge.merging.recipes import merge_models, repeat_merge
from decouple_merge.storage.tensors import TensorFiles

Tensors = dict[str, Tensor]
NAME = "diffusion_pytorch_model.safetensors"


def network(seed: int) -> Tensors:
    draws = torch.Generator().manual_seed(seed)
    return {f"blocks.{i}.weight": torch.randn(6, 4, generator=draws) for i in range(3)}


def saved(path: Path, seed: int, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(network(seed), path, {"format": "pt", **metadata})
    return path


def pipeline(folder: Path, seed: int, kind: str = "DDPMPipeline", **parts: Any) -> Path:
    """Write a pipeline's folder with a made-up network and an index that names its other parts."""
    saved(folder / "unet" / NAME, seed)
    (folder / "unet/config.json").write_text(json.dumps({"_class_name": "MadeUp", "attention_head_dim": 8}))
    index = {"_class_name": kind, "unet": ["diffusers", "MadeUp"], **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def merged(base: Path, experts: list[Path], out: Path, **settings: Any) -> list[str]:
    settings = {"weights": [0.5] * len(experts)} | settings
    return [e for e in merge_models(str(base), experts, Merge(**settings), out) if isinstance(e, str)]


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def given(folder: Path, kind: str) -> tuple[Path, list[Path], str]:
    """Make a base, two experts, and the name of an output of the same kind."""
    if kind == "file":
        files = [saved(folder / f"inputs/{i}.safetensors", i) for i in range(3)]
        return files[0], files[1:], "m.safetensors"
    folders = [pipeline(folder / f"inputs/{i}", i) for i in range(3)]
    return folders[0], folders[1:], "m"


# -- records as recipes


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(
    "settings", [{"dtype": "BF16"}, {"method": "dare_ties", "density": 0.5, "blocks": {"*.1.*": [1, 0]}}]
)
def test_a_merge_is_repeated_to_the_same_bytes_from_any_directory_to_any_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any]
) -> None:
    base, experts, name = given(tmp_path, kind)
    out = tmp_path / "made" / name
    monkeypatch.chdir(tmp_path)
    merged(base.relative_to(tmp_path), [e.relative_to(tmp_path) for e in experts], out, **settings)
    (tmp_path / "far/away").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "far/away")
    for recipe in [out] if kind == "file" else [out, out / "merge.json"]:
        list(repeat_merge(recipe, Path("again") / name))
        assert contents(Path("again") / name) == contents(out)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_tree_that_was_moved_holds_its_recipe_with_its_inputs(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, name = given(tmp_path / "here", kind)
    merged(base, experts, tmp_path / "here/made" / name)
    shutil.move(tmp_path / "here", tmp_path / "there")
    list(repeat_merge(tmp_path / "there/made" / name, tmp_path / "there/again" / name))
    assert contents(tmp_path / "there/again" / name) == contents(tmp_path / "there/made" / name)
    # A repeated one is a recipe, too.
    list(repeat_merge(tmp_path / "there/again" / name, tmp_path / "third" / name))
    assert contents(tmp_path / "third" / name) == contents(tmp_path / "there/made" / name)


@pytest.mark.parametrize("nested", [True, False])
def test_a_recipe_is_written_by_hand_with_paths_from_its_folder(
    tmp_path: Path, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, name = given(tmp_path, "file")
    settings = {"weights": [0.25, 1e-5], "method": "linear", "blocks": {"blocks.0.*": [1, 1]}}
    recipe: dict[str, Any] = {
        "base": "../inputs/0.safetensors",
        "experts": [f"../inputs/{i}.safetensors" for i in (1, 2)],
    }
    recipe |= {"settings": settings} if nested else settings
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = CliRunner().invoke(cli.app, ["merge", "--recipe", "../recipes/mine.yaml", "--out", name])
    assert done.exit_code == 0, done.exception
    found = load_file(name)
    expected = merge(network(0), [network(1), network(2)], [0.25, 1e-5])
    assert torch.equal(found["blocks.1.weight"], expected["blocks.1.weight"])
    assert torch.equal(
        found["blocks.0.weight"], merge(network(0), [network(1), network(2)], [1.0, 1.0])["blocks.0.weight"]
    )
    # What it makes is a recipe itself, from where it lies.
    list(repeat_merge(Path(name), Path("again.safetensors")))
    assert contents(Path("again.safetensors")) == contents(Path(name))


def test_a_setting_that_the_method_does_not_read_is_refused_in_a_recipe(tmp_path: Path) -> None:
    given(tmp_path, "file")
    recipe = {"base": "inputs/0.safetensors", "experts": ["inputs/1.safetensors"], "weights": [1], "density": 0.7}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=r"density is set, and method linear doesn't read it"):
        list(repeat_merge(tmp_path / "mine.yaml", tmp_path / "out.safetensors"))


def test_a_path_of_any_characters_is_read_back(tmp_path: Path) -> None:
    base, experts, name = given(tmp_path / "😀", "folder")
    merged(base, experts, tmp_path / name)
    list(repeat_merge(tmp_path / name, tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(tmp_path / name)


def test_the_fields_of_merge_json_are_those_of_a_recipe_by_hand(tmp_path: Path) -> None:
    base, experts, name = given(tmp_path, "folder")
    merged(base, experts, tmp_path / "made" / name, density=0.5, method="ties")
    record = json.loads((tmp_path / "made" / name / "merge.json").read_text())
    record["weights"] = record["settings"]["weights"] = [0.1, 0.2]
    (tmp_path / "made" / name / "other.yaml").write_text(yaml.safe_dump(record))
    list(repeat_merge(tmp_path / "made" / name / "other.yaml", tmp_path / "again"))
    again = json.loads((tmp_path / "again/merge.json").read_text())
    assert again["weights"] == [0.1, 0.2]
    assert again["merged_sha256"] != record["merged_sha256"]
    assert again["experts_sha256"] == record["experts_sha256"]


def test_fisher_files_count_from_the_recipe_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts, name = given(tmp_path, "file")
    fishers = []
    for i in range(2):
        fishers.append(tmp_path / f"fisher/{i}.safetensors")
        fishers[i].parent.mkdir(exist_ok=True)
        save_file({k: v.square() for k, v in network(i + 7).items()}, fishers[i])
    merged(base, experts, tmp_path / "made" / name, method="fisher", fishers=fishers)
    monkeypatch.chdir("/")
    list(repeat_merge(tmp_path / "made" / name, tmp_path / "a/b/c" / name))
    assert contents(tmp_path / "a/b/c" / name) == contents(tmp_path / "made" / name)
    save_file({k: 2 * v.square() for k, v in network(7).items()}, fishers[0])
    with pytest.raises(ValueError, match=r"fisher/0.safetensors is not what the recipe was made with"):
        list(repeat_merge(tmp_path / "made" / name, tmp_path / "changed" / name))


def test_an_input_that_is_another_one_or_gone_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    base, experts, name = given(tmp_path, "file")
    merged(base, experts, tmp_path / name)
    saved(base, 9)
    with pytest.raises(ValueError, match=r"0\.safetensors is not what the recipe was made with"):
        list(repeat_merge(tmp_path / name, tmp_path / "again.safetensors"))
    experts[1].unlink()
    with pytest.raises(ValueError, match=r"there is no \./inputs/2\.safetensors from .* on, expected an input"):
        list(repeat_merge(tmp_path / name, tmp_path / "again.safetensors"))
    base.unlink()
    with pytest.raises(ValueError, match=r"there is no \./inputs/[02]\.safetensors from"):
        list(repeat_merge(tmp_path / name, tmp_path / "again.safetensors"))
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: a\nexperts: [b]\nweigths: [1]", "unknown key 'weigths'; the nearest valid key is 'weights'"),
        ("base: a\nexperts: [b]", "weights: Field required"),
        ("base: a\nexperts: []\nweights: [1]", "experts: List should have at least 1 item"),
        ("experts: [b]\nweights: [1]", "base: Field required"),
        ("base: a\nexperts: [b]\nweights: [.nan]", "finite number"),
        ("base: a\nexperts: [b]\nweights: [1]\nsettings: {weights: [2]}", "weights and settings.weights differ"),
        ("base: a\nexperts: [b]\nweights: [1]\nexperts_sha256: [x, y]", "2 hashes for 1 experts"),
        ("base: a\nexperts: [b]\nweights: [1]\nsettings: 3", "expected base, experts and weights"),
        ("- base", "expected base, experts and weights"),
        ("", "expected base, experts and weights"),
        ("base: [", "r.yaml is not valid YAML"),
        ('{"base": 3, "experts": ["b"], "weights": [1]}', "base"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(repeat_merge(tmp_path / "r.yaml", tmp_path / "m"))


def test_files_without_a_record_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"base: \xff\xfe")
    for path, message in (
        (saved(tmp_path / "b.safetensors", 0), "no record of a merge in its metadata"),
        (
            tmp_path / "nowhere.json",
            "No such file or directory; give the merge.json of a deme merge",
        ),
        (tmp_path / "latin.yaml", "line 1, is not UTF-8"),
        (tmp_path / "empty", r"merge\.json: No such file or directory"),
    ):
        with pytest.raises(ValueError, match=message):
            list(repeat_merge(path, tmp_path / "m"))


def test_masks_by_chance_are_those_of_the_run_whose_hashes_are_of_wider_weights(tmp_path: Path) -> None:
    halves = [{k: v.bfloat16() for k, v in network(i).items()} for i in range(3)]
    for i, tensors in enumerate(halves):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        save_file({k: v.float() for k, v in tensors.items()}, tmp_path / f"wide{i}.safetensors")
    wide = [tmp_path / f"wide{i}.safetensors" for i in range(3)]
    list(
        merge_models(
            str(wide[0]), wide[1:], Merge(weights=[1, 1], method="dare", density=0.5), tmp_path / "w.safetensors"
        )
    )
    recipe = {"base": "./0.safetensors", "experts": ["./1.safetensors", "./2.safetensors"], "weights": [1, 1]}
    recipe |= {"settings": {"method": "dare", "density": 0.5}}
    recipe |= {"experts_sha256": [TensorFiles([path]).sha256() for path in wide[1:]]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    list(repeat_merge(tmp_path / "recipe.yaml", tmp_path / "h.safetensors"))
    found, expected = load_file(tmp_path / "h.safetensors"), load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[key], expected[key].bfloat16()) for key in expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "karcher", "--weights", "1,-1"], r"weights are \[1\.0, -1\.0\], expected none below 0"),
        (["--method", "karcher", "--weights", "1,1", "--block", "blocks.2*=1,-1"], "expected none below 0"),
        (["--method", "slerp", "--weights", "1,-1"], "slerp has 2 experts with weights"),
        (["--weights", "1,1", "--set", "density=0.7"], "density is set, and method linear doesn't read it; .*ties or "),
        (["--weights", "1,1", "--set", "seed=3"], "seed is set, and method linear doesn't read it; .*dare or "),
    ],
)
def test_a_dry_run_refuses_what_the_merge_would(tmp_path: Path, options: list[str], message: str) -> None:
    base, experts, name = given(tmp_path, "file")
    arguments = ["merge", str(base), *map(str, experts), "--out", str(tmp_path / name), "--dry-run", *options]
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)


def test_a_pattern_given_twice_is_refused(tmp_path: Path) -> None:
    arguments = ["merge", "b", "e", "--weights", "1", "--out", "m", "--block", "a*=1", "--block", "a*=2"]
    assert "'a*' is given twice" in str(CliRunner().invoke(cli.app, arguments).exception)


# -- the card


def card_of(folder: Path, base: Path, experts: list[Path]) -> str:
    merged(base, experts, folder / "made/out")
    return (folder / "made/out/README.md").read_text()


TEXT = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}


@pytest.mark.parametrize(
    ("kind", "parts", "task", "call"),
    [
        ("DDPMPipeline", {}, "unconditional-image-generation", "pipeline(num_inference_steps"),
        ("StableDiffusionPipeline", TEXT, "text-to-image", 'pipeline("'),
        ("FluxPipeline", TEXT | {"text_encoder_2": ["transformers", "T5EncoderModel"]}, "text-to-image", 'pipeline("'),
        ("StableDiffusionImg2ImgPipeline", TEXT, "image-to-image", "image=image"),
        ("StableDiffusionInpaintPipeline", TEXT, "image-to-image", "mask_image=mask"),
        ("LDMSuperResolutionPipeline", {}, "image-to-image", "image=image"),
        ("WanPipeline", TEXT, "text-to-video", 'pipeline("'),
        ("WanImageToVideoPipeline", TEXT, "image-to-video", "image=image, prompt="),
        ("DiTPipeline", {}, "class-conditional-image-generation", "class_labels=[0]"),
        ("SomePipeline", {"text_encoder": [None, None]}, "unconditional-image-generation", "pipeline(num_inference"),
    ],
)
def test_the_card_says_what_a_pipeline_is_for_and_how_it_is_called(
    tmp_path: Path, kind: str, parts: dict[str, Any], task: str, call: str
) -> None:
    card = card_of(
        tmp_path, pipeline(tmp_path / "base", 0, kind, **parts), [pipeline(tmp_path / "e", 1, kind, **parts)]
    )
    assert f"tags: [{task}, decouple-then-merge]" in card
    code = card.split("```python\n")[1].split("```")[0]
    ast.parse(code)
    assert call in code


def test_a_class_conditional_unet_is_told_from_an_unconditional_one(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", 0)
    (base / "unet/config.json").write_text(json.dumps({"_class_name": "MadeUp", "num_class_embeds": 10}))
    assert "class-conditional-image-generation" in card_of(tmp_path, base, [saved(tmp_path / "e.safetensors", 1)])


def test_a_networks_card_loads_it_by_its_class(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", 0) / "unet"
    card = card_of(tmp_path, base, [saved(tmp_path / "e.safetensors", 1)])
    assert "from diffusers import MadeUp" in card
    assert "DiffusionPipeline" not in card
    assert "tags: [decouple-then-merge]" in card


def test_the_card_of_an_unconditional_pipeline_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "e"):
        DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=60)).save_pretrained(tmp_path / name)
    card = card_of(tmp_path, tmp_path / "base", [tmp_path / "e"])
    monkeypatch.chdir(tmp_path)
    code = card.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", "made/out")
    exec(code.replace("num_inference_steps=50", "num_inference_steps=2"), {})
    assert (tmp_path / "image.png").exists()


def test_the_card_prints_no_path_of_this_machine(tmp_path: Path) -> None:
    base, experts, _ = given(tmp_path / "private", "folder")
    card = card_of(tmp_path, base, experts)
    assert str(tmp_path) not in card
    assert "private" not in card
    assert "`0` (sha256 " in card


def test_only_experts_with_ranges_are_timestep_experts(tmp_path: Path) -> None:
    base, experts, _ = given(tmp_path, "folder")
    card = card_of(tmp_path, base, experts)
    assert "timestep" not in card
    assert "# Merged from 2 models" in card
    assert "| 1 | 0.5000 |" in card
    ranged, origin = [], TensorFiles([base / "unet" / NAME]).sha256()
    for i in range(2):
        ranged.append(saved(tmp_path / f"experts/{i}/model.safetensors", i + 1).parent)
        (ranged[i] / "expert.json").write_text(
            json.dumps({"base_sha256": origin, "own": {"low": 500 * i, "high": 500 * i + 500}})
        )
    card = card_of(tmp_path / "ranged", base, ranged)
    assert "# Merged from 2 timestep experts" in card
    assert "| 1 | [500, 1000] | 0.5000 |" in card
    mixed = card_of(tmp_path / "mixed", base, [ranged[0], experts[1]])
    assert "# Merged from 2 models" in mixed
    assert "| 0 | [0, 500] | 0.5000 |" in mixed


def test_the_bases_licence_and_origin_are_kept(tmp_path: Path) -> None:
    base, experts, _ = given(tmp_path, "folder")
    front = "license: other\nlicense_name: made-up\nlicense_link: LICENSE.md\nbase_model:\n- org/first\n- org/second\n"
    (base / "README.md").write_text(f"---\ntags: [a]\n{front}datasets:\n- d\n---\nlicense: none of this\n")
    card = card_of(tmp_path, base, experts)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == yaml.safe_load(front) | {
        "library_name": "diffusers",
        "tags": ["unconditional-image-generation", "decouple-then-merge"],
    }


def test_a_hub_base_is_named_as_what_the_merge_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts, _ = given(tmp_path, "folder")
    monkeypatch.setattr("decouple_merge.merging.recipes.pipeline_folder", lambda name: base)
    list(merge_models("org/model", experts, Merge(weights=[1, 1]), tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: org/model\n" in card
    assert "`org/model` (sha256 " in card
    assert json.loads((tmp_path / "out/merge.json").read_text())["base"]["name"] == "org/model"


# -- what isn't merged


SCHEDULER = {"scheduler": ["diffusers", "DDPMScheduler"]}
VAE = {"vae": ["diffusers", "AutoencoderKL"]}


def write_config(folder: Path, name: str, **values: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: write_config(e / "unet", "config.json", _class_name="MadeUp", attention_head_dim=4),
            r"unet has attention_head_dim 4 \(8 in the base\)",
        ),
        (
            lambda e: write_config(e / "scheduler", "scheduler_config.json", prediction_type="v_prediction"),
            r"scheduler has prediction_type 'v_prediction' \('epsilon' in the base\)",
        ),
        (
            lambda e: write_config(e / "vae", "config.json", scaling_factor=0.13),
            r"vae has scaling_factor 0.13 \(0.18 in",
        ),
        (
            lambda e: save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, e / "vae" / NAME),
            "vae has other weights than the base's, .*: it is not merged",
        ),
        (lambda e: saved(e / "vae" / NAME, 6), "vae has other weights than the base's, .*: it is not merged"),
        (
            lambda e: pipeline(e, 1, **SCHEDULER, vae=["diffusers", "AsymmetricAutoencoderKL"]),
            "vae is a AsymmetricAutoencoderKL, the base's a AutoencoderKL",
        ),
    ],
)
def test_parts_that_differ_are_told(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    folders = []
    for i, name in enumerate(("base", "e")):
        folders.append(pipeline(tmp_path / name, i, **SCHEDULER, **VAE))
        write_config(folders[i] / "vae", "config.json", scaling_factor=0.18, _diffusers_version=f"0.{i}")
        saved(folders[i] / "vae" / NAME, 5)
        write_config(folders[i] / "scheduler", "scheduler_config.json", prediction_type="epsilon")
    assert not [line for line in merged(folders[0], folders[1:], tmp_path / "same") if "warning" in line]
    change(folders[1])
    warnings = [line for line in merged(folders[0], folders[1:], tmp_path / "other") if "warning" in line]
    assert len(warnings) == 1
    assert re.search(message, warnings[0])


def test_weights_in_a_folder_do_not_carry_the_record_of_the_merge_that_made_the_base(tmp_path: Path) -> None:
    base, expert = (pipeline(tmp_path / name, i) for i, name in enumerate(("base", "e")))
    saved(base / "unet" / NAME, 0, merge="{}", more="kept")
    merged(base, [expert], tmp_path / "out")
    assert TensorFiles([tmp_path / "out/unet" / NAME]).metadata == {"format": "pt", "more": "kept"}


def test_a_part_that_is_not_merged_may_be_of_a_kind_that_cannot_be_added(tmp_path: Path) -> None:
    folders = [pipeline(tmp_path / name, i, **VAE) for i, name in enumerate(("base", "e"))]
    for folder in folders:
        write_config(folder / "vae", "config.json")
        save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, folder / "vae" / NAME)
    assert not [line for line in merged(folders[0], folders[1:], tmp_path / "out") if "warning" in line]


def test_a_networks_folder_is_compared_with_the_bases_network(tmp_path: Path) -> None:
    base, expert = (pipeline(tmp_path / name, i) for i, name in enumerate(("base", "e")))
    write_config(expert / "unet", "config.json", _class_name="MadeUp", attention_head_dim=4)
    assert any("attention_head_dim 4" in line for line in merged(base, [expert / "unet"], tmp_path / "out"))


def test_a_merge_in_a_pipe_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts, name = given(tmp_path, "file")
    arguments = ["merge", str(base), str(experts[0]), "--weights", "1", "--out"]
    assert "GB written" not in CliRunner().invoke(cli.app, [*arguments, str(tmp_path / name)]).output
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    output = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "again.safetensors")]).output
    assert re.findall(r"GB written, (\d+)%", output) == ["33", "67", "100"]
