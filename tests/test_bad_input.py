"""Mistakes of a user end before any compute, in an error that names what was found and what was expected."""

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError

from conftest import make_unet
from decouple_merge.cli import main as cli
from decouple_merge.config import Config, Data, dump_config
from decouple_merge.data.decoding import decode
from decouple_merge.data.sources import load_images, open_images
from decouple_merge.errors import UserError
from decouple_merge.evaluation.extractors import Extractor
from decouple_merge.evaluation.references import read_statistics
from decouple_merge.experiment.plan import check, prepare
from decouple_merge.experiment.provenance import made_from
from decouple_merge.models import base as models
from decouple_merge.models.base import load_base
from decouple_merge.models.export import export_pipeline
from decouple_merge.models.network import load_network
from decouple_merge.storage import files as runs
from decouple_merge.storage.files import read_tensors, write_json, write_tensors

MakeConfig = Callable[..., Config]


def write_pngs(folder: Path, num: int = 12, size: int = 8, channels: int = 1) -> Path:
    folder.mkdir()
    for i in range(num):
        shape = (size, size) if channels == 1 else (size, size, channels)
        pixels = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def test_a_good_config_passes_and_checking_writes_nothing(tiny_config: MakeConfig, tmp_path: Path) -> None:
    check(tiny_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- settings against the base


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"finetune": {"num_ranges": 41}}, "num_ranges is 41, expected 1 to 40"),
        (
            {"finetune": {"ranges": [(0, 20), (20, 50)]}},
            r"range 1 is \[20, 50\), expected a non-empty part of \[0, 40\)",
        ),
        ({"finetune": {"ranges": [(0, 20), (25, 40)]}}, "range 1 starts at 25, expected 20"),
        ({"sample": {"sampler": "DIMM"}}, "sampler is 'DIMM', expected one of .*DDIM, "),
        ({"sample": {"num_steps": 50}}, "sampler DDIMScheduler with 50 steps: .*40"),
        ({"search": {"num_steps": 50}}, "sampler DDIMScheduler with 50 steps: .*40"),
        (
            {"evaluate": {"metrics": ["fdi"]}},
            "metric is 'fdi', expected one of fd_effnetlite0, kd_effnetlite0, mind_effnetlite0, fd_infinity",
        ),
        ({"search": {"metric": "recall_inception"}}, "expected a distance, which is smaller for better images"),
        (
            {"evaluate": {"metrics": ["precision_effnetlite0"], "num_images": 3}},
            "evaluate.num_images is 3, expected at least 4 for precision_effnetlite0",
        ),
        ({"search": {"num_images": 1}}, "search.num_images is 1, expected at least 2 for fd_effnetlite0"),
        (
            {"search": {"metric": "fd_infinity_effnetlite0", "num_images": 20, "num_final_images": 19}},
            "search.num_final_images is 19, expected at least 20 for fd_infinity_effnetlite0",
        ),
        (
            {"finetune": {"distance": {"every": 3, "metric": "fd_infinity_effnetlite0", "num_images": 9}}},
            "distance.num_images is 9, expected at least 20 for fd_infinity_effnetlite0",
        ),
        ({"search": {"metric": "loss"}}, "metric is 'loss', expected one of fd_effnetlite0"),
        ({"evaluate": {"metrics": ["fid"]}}, "metric 'fid' needs the TensorFlow Inception weights: set evaluate.incep"),
        ({"search": {"metric": "kid"}}, "metric 'kid' needs the TensorFlow Inception weights"),
        (
            {"evaluate": {"metrics": ["fid"], "inception_weights": "nowhere.pth"}},
            "Inception weights: there is no file nowhere.pth",
        ),
        (
            {"search": {"metric": "cmmd"}},
            "metric 'cmmd' needs a clip model: set evaluate.clip of a config, or deme evaluate --set clip",
        ),
        (
            {"evaluate": {"metrics": ["kd_dinov2"], "dinov2": "nowhere"}},
            "dinov2 nowhere: can't be loaded .*expected a dinov2 or dinov2_with_registers model",
        ),
        ({"search": {"frozen": {2: 1.0}}}, "search.frozen fixes weight 2, which doesn't exist: expected 0 to 1"),
        (
            {"search": {"start": [[1.0, 2.6]]}},
            r"search.start holds \[1.0, 2.6\], whose weight 1 lies outside search.low to search.high, -0.2 to 2.5",
        ),
        ({"search": {"start": [[1.0, 1.0, 1.0]]}}, r"search.start holds \[1.0, 1.0, 1.0\], expected 2 weights"),
        (
            {"search": {"start": [[1.0, 0.5]], "frozen": {1: 0.0}}},
            r"search.start holds \[1.0, 0.5\], whose weight 1 search.frozen fixes at 0",
        ),
        ({"search": {"frozen": {1: 0.0}, "strategy": "greedy"}}, "search.frozen fixes weights, and strategy greedy"),
        (
            {"search": {"blocks": ["up_blocks.*"]}},
            r"no pattern of up_blocks.\* matches conv_in",
        ),
        ({"search": {"checkpoints": ["nowhere"]}}, "search.checkpoints: nowhere doesn't exist"),
        ({"search": {"first_seed": 5}}, r"search seeds \[5, 25\) overlap report seeds \[0, 10\)"),
        ({"data": {"num_held_out": 48}}, "the data has 48 images and data.num_held_out is 48: nothing is left"),
    ],
    ids=lambda v: json.dumps(v) if isinstance(v, dict) else "",
)
def test_a_setting_that_does_not_fit_is_refused_before_any_compute(
    tiny_config: MakeConfig, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(tiny_config(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- the base


def test_a_missing_base_says_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nowhere' can't be loaded .*; expected a diffusers pipeline of a UNet2DModel"
    ):
        load_base(str(tmp_path / "nowhere"))


def test_a_conditional_network_in_an_unconditional_pipeline_says_what_is_supported(tmp_path: Path) -> None:
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"UNet2DConditionModel; supported is a diffusers pipeline of a UNet2DModel"):
        load_base(str(tmp_path / "base"))


def test_a_base_that_predicts_a_variance_is_refused(tmp_path: Path) -> None:
    DDPMPipeline(make_unet(out_channels=2), DDPMScheduler()).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="maps 1 channels to 2, expected as many out as in"):
        load_base(str(tmp_path / "base"))


def test_a_folder_that_is_no_pipeline_says_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"can't be loaded .*expected a diffusers pipeline of a UNet2DModel"):
        load_base(str(write_pngs(tmp_path / "pictures")))


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_damaged_weights_of_a_base_are_named(tiny_base: Path, damage: str) -> None:
    weights = tiny_base / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        cut(weights)
    else:
        weights.write_bytes(b"" if damage == "empty" else b"\xff" * 200)
    with pytest.raises(ValueError, match=rf"base '{tiny_base}'.*diffusion_pytorch_model\.safetensors"):
        load_base(str(tiny_base))


def test_a_damaged_expert_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"w": torch.zeros(100)})
    cut(tmp_path / "model.safetensors")
    for read, advice in ((read_tensors, "remove it"), (load_network, "fetch or copy it again")):
        with pytest.raises(ValueError, match=rf"model\.safetensors: no whole safetensors file .*; {advice}"):
            read(tmp_path / "model.safetensors")


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "expert.pt"
    path.write_bytes(b"never read")
    with pytest.raises(ValueError, match=r"expert\.pt is a pickle, expected safetensors"):
        load_network(path)


# -- the data


@pytest.mark.parametrize(
    ("size", "channels", "found"),
    [(9, 1, r"9×9 with 1 channel\(s\)"), (8, 3, r"8×8 with 3 channel\(s\)")],
    ids=["size", "channels"],
)
@pytest.mark.parametrize("kind", ["folder", "npz", "datasets"])
def test_images_of_another_size_or_channel_count_are_refused(
    tiny_config: MakeConfig, tmp_path: Path, kind: str, size: int, channels: int, found: str
) -> None:
    folder = write_pngs(tmp_path / "pictures", size=size, channels=channels)
    pictures = [Image.open(p).copy() for p in sorted(folder.iterdir())]
    source = str(folder)
    if kind == "npz":
        source = str(tmp_path / "other.npz")
        np.savez(source, images=np.stack([np.asarray(p) for p in pictures]))
    elif kind == "datasets":
        rows = datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()}))
        rows.save_to_disk(tmp_path / "rows")
        source = f"datasets:{tmp_path / 'rows'}"
    with pytest.raises(ValueError, match=f"found (images )?{found}, expected 8×8 with 1, as the base model has"):
        check(tiny_config(data={"source": source}), tmp_path / "run")


def test_one_image_of_another_size_among_many_is_named(tiny_config: MakeConfig, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "pictures")
    Image.new("L", (8, 9)).save(folder / "07.png")
    # It isn't damaged: skipping it unasked would hide a mistake.
    for skip_damaged in (False, True):
        with pytest.raises(ValueError, match=r"07\.png: found 8×9 with 1 channel\(s\), expected 8×8"):
            check(tiny_config(data={"source": str(folder), "skip_damaged": skip_damaged}), tmp_path / "run")


def test_an_empty_folder_is_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: found no images, expected files ending in \.apng, .*\.bmp, .*\.jpeg"):
        check(tiny_config(data={"source": str(tmp_path / "empty")}), tmp_path / "run")


@pytest.mark.parametrize("source", ["nowhere", "nowhere.npz", "fashion_mnist"])
def test_an_unknown_source_lists_the_known_ones(tiny_config: MakeConfig, tmp_path: Path, source: str) -> None:
    with pytest.raises(
        ValueError, match=rf"data.source is '{source}' \(looked for .*\), expected fashion-mnist, noto-emoji, a folder"
    ):
        check(tiny_config(data={"source": source}), tmp_path / "run")


def test_a_truncated_image_is_named_and_skipped_only_if_asked(tiny_config: MakeConfig, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "pictures", num=12)
    cut(folder / "05.png")
    data = {"source": str(folder), "num_held_out": 2}
    with pytest.raises(ValueError, match=r"05\.png: can't be decoded .*; mend or remove it, or set data.skip_damaged"):
        check(tiny_config(data=data), tmp_path / "run")
    images = check(tiny_config(data={**data, "skip_damaged": True}), tmp_path / "run").images
    whole = [torch.from_numpy(np.asarray(Image.open(folder / f"{i:02}.png")).copy()) for i in range(12) if i != 5]
    assert torch.equal(images.stack(range(len(images))), torch.stack(whole)[:, None])


def test_a_folder_of_damaged_images_only_is_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "pictures", num=2)
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 2 images can be used"):
        check(tiny_config(data={"source": str(folder), "skip_damaged": True}), tmp_path / "run")


def test_open_images_names_a_damaged_first_image(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "pictures", num=2)
    (folder / "00.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"00\.png: can't be decoded"):
        open_images(str(folder))


@pytest.mark.parametrize("damage", ["cut", "empty"])
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_a_damaged_array_file_is_named(tmp_path: Path, kind: str, damage: str) -> None:
    path = tmp_path / f"images.{kind}"
    pixels = np.zeros((20, 8, 8), np.uint8)
    if kind == "npz":
        np.savez(path, images=pixels)
    else:
        np.save(path, pixels)
    if damage == "cut":
        cut(path)
    else:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"images\.{kind}: (can't be read as plain arrays|an array says)"):
        load_images(Data(source=str(path)), 1, 8)


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"images\.npy: can't be read as plain arrays"):
        load_images(Data(source=str(tmp_path / "images.npy")), 1, 8)


def test_an_array_of_floats_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((3, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"found float32 of shape \(3, 8, 8\), expected uint8 \[N, H, W\]"):
        load_images(Data(source=str(tmp_path / "images.npy")), 1, 8)


def test_an_array_without_images_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((0, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="holds no images"):
        load_images(Data(source=str(tmp_path / "images.npy")), 1, 8)


def test_an_unknown_column_lists_the_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"picture": [1], "label": [2]}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"has columns picture, label, expected 'image': set data\.column"):
        load_images(Data(source=f"datasets:{tmp_path / 'rows'}"), 1, 8)


def test_a_damaged_image_in_a_data_set_is_refused_and_skipped_only_if_asked(tmp_path: Path) -> None:
    good = (write_pngs(tmp_path / "pictures", num=1) / "00.png").read_bytes()
    rows = [{"bytes": good, "path": None}, {"bytes": good[: len(good) * 2 // 3], "path": None}]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features).save_to_disk(tmp_path / "rows")
    data = Data(source=f"datasets:{tmp_path / 'rows'}")
    with pytest.raises(ValueError, match=r"can't be decoded .*; mend or remove it, or set data\.skip_damaged"):
        load_images(data, 1, 8)
    images = load_images(data.model_copy(update={"skip_damaged": True}), 1, 8)
    assert len(images) == 1
    assert torch.equal(images[0], decode(tmp_path / "pictures" / "00.png", 1, 8, "exact").pixels)


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_fault_of_the_machine_is_no_damage_of_an_image(
    tmp_path: Path, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **named: Any) -> Any:
        raise fault

    data = Data(source=str(write_pngs(tmp_path / "pictures", num=3)), skip_damaged=True)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        with pytest.raises(type(fault)):
            load_images(data, 1, 8)
    assert len(load_images(data, 1, 8)) == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"PK"])
def test_damaged_reference_statistics_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "reference.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"reference\.npz: can't be read as plain arrays"):
        read_statistics(tmp_path / "reference.npz", Extractor("pixels", "0" * 64, {"features": 4}, dict))


# -- the run folder


def test_a_run_folder_of_another_config_names_the_keys_that_differ(tiny_config: MakeConfig, tmp_path: Path) -> None:
    plan = prepare(tiny_config(), tmp_path / "run")
    write_json(plan.run.expert(0) / "expert.json", made_from("experts/0", plan))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    prepare(tiny_config(), tmp_path / "run")
    with pytest.raises(UserError, match=r"seed was 0 and is 3; training\.learning_rate was 0\.0002 and is 0\.5; put "):
        prepare(tiny_config(seed=3, finetune={"learning_rate": 0.5}), tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tiny_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter-1.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis is not empty and not a run folder \(no config.yaml\); give another"):
        prepare(tiny_config(), folder)
    assert [p.name for p in folder.iterdir()] == ["chapter-1.txt"]


# -- a full disk

NO_SPACE = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    # What safetensors' Rust side raises.
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


def fail_half_way(error: Exception) -> Callable[..., None]:
    def save(tensors: Any, path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    return save


@pytest.mark.parametrize("error", NO_SPACE, ids=["ENOSPC", "EDQUOT", "safetensors"])
def test_a_full_disk_leaves_the_earlier_weights_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "experts" / "model.safetensors"
    write_tensors(path, {"w": torch.arange(3.0)}, {"update": "1"})
    monkeypatch.setattr(runs, "save_file", fail_half_way(error))
    with pytest.raises(ValueError, match=r"model\.safetensors: the disk is full; what was finished is safe: make room"):
        write_tensors(path, {"w": torch.zeros(3)}, {"update": "2"})
    tensors, metadata = read_tensors(path)
    assert torch.equal(tensors["w"], torch.arange(3.0))
    assert metadata == {"update": "1"}
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_a_full_disk_leaves_the_earlier_export_intact(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = load_base(str(tiny_base)), tmp_path / "merged"
    weights = base.network.state_dict()
    export_pipeline(base, weights, folder, None, {"weights": [0.0]})
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def save_pretrained(self: Any, path: Path, **kwargs: Any) -> None:
        Path(path).mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", save_pretrained)
    with pytest.raises(ValueError, match="merged: the disk is full"):
        export_pipeline(base, {k: v + 1 for k, v in weights.items()}, folder, None, {"weights": [1.0]})
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir() if "merged" in p.name) == ["merged"]


def test_a_full_disk_leaves_an_earlier_record_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"a": 1})

    def write_text(self: Path, text: str, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", write_text)
        with pytest.raises(ValueError, match=r"manifest\.json: the disk is full"):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_other_failures_of_the_disk_are_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "save_file", fail_half_way(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        write_tensors(tmp_path / "model.safetensors", {"w": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


# -- through the command

Command = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``deme`` with arguments that are wrong; returns its one line on stderr."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["deme", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        text = capsys.readouterr().err
        assert text.startswith("deme: ")
        assert text.count("\n") == 1
        return text

    return run


@pytest.fixture
def config_file(tiny_config: MakeConfig, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(tiny_config()))
    return path


@pytest.mark.parametrize("verb", ["run", "finetune"])
def test_the_command_refuses_an_unknown_key_in_one_line(refused: Command, config_file: Path, verb: str) -> None:
    text = refused(verb, config_file, "--set", "finetune.num_range=3", "--out", config_file.parent / "run")
    assert "unknown key 'finetune.num_range'; the nearest valid key is 'finetune.num_ranges'" in text
    assert not (config_file.parent / "run").exists()


def test_the_command_refuses_malformed_yaml_in_one_line(refused: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("finetune:\n  num_ranges: [4\n")
    assert "bad.yaml is not valid YAML" in refused("run", tmp_path / "bad.yaml")


def test_the_command_refuses_overlapping_seeds_in_one_line(refused: Command, config_file: Path) -> None:
    text = refused("run", config_file, "--set", "search.first_seed=3", "--dry-run")
    assert "tiny.yaml: search seeds [3, 23) overlap report seeds [0, 10)" in text


def test_the_command_refuses_a_range_that_does_not_exist_in_one_line(refused: Command, config_file: Path) -> None:
    text = refused("finetune", config_file, "--range", "2", "--out", config_file.parent / "run")
    assert "--range is 2, and the range doesn't exist: expected 0 to 1" in text


def test_the_command_refuses_a_folder_that_is_no_run_in_one_line(refused: Command, tmp_path: Path) -> None:
    assert "has no config.yaml, expected a run folder" in refused("search", tmp_path)


def test_the_command_refuses_weights_that_do_not_fit_in_one_line(
    refused: Command, tiny_base: Path, tmp_path: Path
) -> None:
    arguments = ("merge", tiny_base, tiny_base, "--out", tmp_path / "merged")
    assert "2 weights for 1 experts, expected one each" in refused(*arguments, "--weights", "1,2")
    assert "--weights is 'much', expected numbers separated by commas" in refused(*arguments, "--weights", "much")
    wrong = ("--weights", "1", "--set", "densty=0.5")
    assert "merge: unknown key 'densty'; the nearest valid key is 'density'" in refused(*arguments, *wrong)
    assert "--recipe says what is merged and how" in refused(*arguments, "--weights", "1", "--recipe", "merge.json")
    assert not (tmp_path / "merged").exists()


def test_the_command_refuses_a_damaged_base_in_one_line(refused: Command, config_file: Path, tiny_base: Path) -> None:
    cut(tiny_base / "unet" / "diffusion_pytorch_model.safetensors")
    text = refused("run", config_file, "--dry-run")
    assert f"base '{tiny_base}'" in text
    assert "diffusion_pytorch_model.safetensors" in text


def test_supported_models_are_said_in_one_line() -> None:
    assert "\n" not in models.SUPPORTED
