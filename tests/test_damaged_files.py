"""Files and paths that are not what they should be: one line, exit status 2; our own faults keep their traceback."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decouple_merge.cli import main as cli
from decouple_merge.config import Config, Merge
from decouple_merge.errors import UserError
from decouple_merge.evaluation.checks import check_num_references
from decouple_merge.evaluation.compare import compare
from decouple_merge.experiment.plan import check
from decouple_merge.merging.recipes import merge_models, repeat_merge
from decouple_merge.models.base import load_base
from decouple_merge.searching.study import open_storage, open_study
from decouple_merge.storage.files import append_record, read_records, read_tensors, write_tensors
from decouple_merge.storage.reading import read_record
from decouple_merge.storage.tensors import TensorFiles
from decouple_merge.training.state import load_state

MakeConfig = Callable[..., Config]


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- what is at a path


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing", "device"])
@pytest.mark.parametrize("read", [lambda p: TensorFiles([p]), read_tensors, lambda p: read_record(p, "look")])
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, kind: str, read: Callable[[Path], Any]) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/null")
    with pytest.raises(UserError, match=f"{path}( is a {kind}|: No such file)"):
        read(path)


# -- records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1, column 1: not JSON"),
        ('{"base_sha256": "a', r"line 1, column 17: not JSON"),
        ("[]", r"found list, expected an object with base_sha256"),
        ("7", r"found int, expected an object"),
        ("{}", r"base_sha256 is missing"),
        ('{"base_sha256": 3}', r"base_sha256 is '3'"),
        ('{"base_sha256": null}', r"base_sha256 is 'None'"),
        ("[" * 100_000, r"nested too deep"),
        ("9" * 5_000, r"too many digits"),
        ('{"base_sha256": "a"}{}', r"line 1, column 21: not JSON \(Extra data\)"),
    ],
    ids=lambda v: repr(v[:20]),
)
def test_a_record_of_another_shape_is_named_with_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "expert.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"expert\.json.*{message}.*; make it again"):
        read_record(path, "make it again", base_sha256=str)


@pytest.mark.parametrize("text", ["[]", "{}", '{"base_sha256": 1}', "{", "[" * 9999, "\ud800"])
def test_an_expert_with_another_record_is_refused_by_a_merge(tmp_path: Path, text: str) -> None:
    expert = tmp_path / "expert"
    write_tensors(tmp_path / "base.safetensors", {"w": torch.zeros(3)})
    write_tensors(expert / "model.safetensors", {"w": torch.ones(3)})
    (expert / "expert.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError, match=r"expert\.json"):
        list(
            merge_models(str(tmp_path / "base.safetensors"), [expert], Merge(weights=[1.0]), tmp_path / "o.safetensors")
        )
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"metric": "fid", "value": 1}', '{"model": 1}', "", "[" * 9999, "NaN"]
)
def test_a_line_of_records_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"model": "a", "metric": "fid", "value": 1.0})
    with path.open("a") as file:
        file.write(f'{line}\n{{"model": "a", "metric": "fid", "value": 2.0}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_records(path, model=str, metric=str)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        list(compare(str(path), str(path)))


@pytest.mark.parametrize(
    "changes", [{"base": "x"}, {"experts": "ab"}, {"experts": [1]}, {"settings": []}, {"base": {}}]
)
def test_a_recipe_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = {"base": {"name": "b", "sha256": "c"}, "experts": ["e"], "experts_sha256": ["d"], "settings": {}}
    (tmp_path / "merge.json").write_text(json.dumps(recipe | changes))
    with pytest.raises(UserError, match=r"merge\.json.*; give the merge\.json of a deme merge or of a run"):
        list(repeat_merge(tmp_path / "merge.json", tmp_path / "out"))


# -- bases


def test_a_base_without_some_of_its_tensors_is_refused(tiny_base: Path) -> None:
    path = tiny_base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.weight"], tensors["conv_out.bias"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"(lacks 2 tensors, conv_in\.weight among them|can't be loaded)"):
        load_base(str(tiny_base))


def test_a_base_whose_tensors_have_another_shape_is_refused(tiny_base: Path) -> None:
    path = tiny_base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"conv_out.bias": torch.zeros(5)}, path)
    with pytest.raises(UserError, match=r"can't be loaded .*conv_out\.bias"):
        load_base(str(tiny_base))


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_end": 1.5},
        {"beta_end": float("nan")},
        {"beta_start": -0.5, "beta_end": -0.1},
        {"beta_start": float("inf")},
        {"trained_betas": [0.5] * 39 + [2.0]},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": "many"},
        {"beta_schedule": "steep"},
    ],
)
def test_a_schedule_that_is_none_is_refused(tiny_base: Path, changes: dict[str, Any]) -> None:
    change_json(tiny_base / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(UserError, match=r"^base '"):
        load_base(str(tiny_base))


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": 0},
        {"sample_size": "8"},
        {"sample_size": [8, 9]},
        {"sample_size": True},
        {"sample_size": -8},
        {"_class_name": "AutoencoderKL"},
        {"_class_name": 3},
        {"down_block_types": ["Nothing"]},
        {"block_out_channels": [7, 9]},
        {"in_channels": -1},
    ],
)
def test_a_network_config_of_another_kind_is_refused(tiny_base: Path, changes: dict[str, Any]) -> None:
    change_json(tiny_base / "unet" / "config.json", **changes)
    with pytest.raises(UserError, match=r"^base '"):
        load_base(str(tiny_base))


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", "3", "{", "[" * 9999, '{"_class_name": []}', "\xff"])
def test_a_damaged_config_of_a_base_is_refused(tiny_base: Path, file: str, text: str) -> None:
    (tiny_base / file).write_text(text, encoding="latin-1")
    if (file, text) != ("scheduler/scheduler_config.json", "{}"):  # A schedule of nothing but defaults.
        with pytest.raises(UserError, match=r"^base '"):
            load_base(str(tiny_base))


# -- before training


@pytest.mark.parametrize(("metric", "least"), [("precision_effnetlite0", 4), ("coverage_effnetlite0", 6)])
def test_too_few_images_to_compare_with_are_found_before_training(
    tiny_config: MakeConfig, tmp_path: Path, metric: str, least: int
) -> None:
    config = tiny_config(evaluate={"metrics": [metric], "num_reference_images": least - 1})
    with pytest.raises(UserError, match=f"{metric} compares with {least - 1} image.*expected at least {least}"):
        check(config, tmp_path / "run")
    enough = tiny_config(evaluate={"metrics": [metric], "num_reference_images": least})
    check_num_references(enough, 48, 48)
    with pytest.raises(UserError, match=f"compares with {least - 1} image"):
        check_num_references(enough, least - 1, least - 1)


# -- the command


def run_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(**kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    cli.main()


@pytest.mark.parametrize(
    "error",
    [
        UserError("a is 3,\n expected 4"),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/a/b"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/b"),
        NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/a/b"),
        IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "/a/b"),
        OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "/a/b"),
        OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/b"),
        OSError(errno.ELOOP, os.strerror(errno.ELOOP), "/a/b"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_a_user_can_mend_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, error)
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("deme: ")
    assert text.count("\n") == 1
    assert not isinstance(error, OSError) or error.filename is None or "/a/b" in text


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ours"),
        KeyError("a"),
        RuntimeError("b"),
        AssertionError(),
        TypeError("c"),
        IndexError(),
        OSError("d"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_command(monkeypatch, error)
    assert caught.value is error


def test_a_path_that_can_not_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments in (
        ["run", str(tmp_path / ("x" * 300))],
        ["search", str(tmp_path / "nowhere")],
        ["info", "x" * 5000],
        ["merge", "x" * 300, "y" * 300, "--weights", "1", "--out", str(tmp_path / "o.safetensors")],
    ):
        monkeypatch.setattr(sys, "argv", ["deme", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


# -- studies, states, adapters


@pytest.mark.parametrize(
    "content", [b"garbage" * 200 + b"\n", b"SQLite format 3\0" + b"\0" * 50, b"x", b'{"a": 1}\n', b"[]\n"]
)
def test_a_study_that_is_no_journal_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.jsonl").write_bytes(2 * content)
    with pytest.raises(UserError, match=r"study\.jsonl: no journal of studies .*; remove it to have it made again"):
        open_storage(tmp_path / "study.jsonl")
    assert (tmp_path / "study.jsonl").read_bytes() == 2 * content


def test_half_a_line_of_a_journal_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    open_study(open_storage(path), "screen").set_user_attr("a", 1)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"op_code":2,"worker_id":"')
    open_study(open_storage(path), "screen").set_user_attr("b", 2)
    assert open_study(open_storage(path), "screen").user_attrs == {"a": 1, "b": 2}
    assert path.read_bytes().startswith(whole)


def test_half_of_a_journals_first_line_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    path.write_bytes(b'{"op_code":0,"worker_id"')
    open_study(open_storage(path), "screen").set_user_attr("a", 1)
    assert open_study(open_storage(path), "screen").user_attrs == {"a": 1}


def test_a_state_without_its_record_is_named(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    weights = {k: v.detach() for k, v in layer.state_dict().items()}
    write_tensors(tmp_path / "state.safetensors", weights)
    with pytest.raises(UserError, match=r"state\.safetensors.*not JSON.*; remove it to have it made again"):
        load_state(tmp_path / "state.safetensors", weights, torch.optim.AdamW(layer.parameters()))


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 9999, "\xff", "9" * 5000])
def test_an_adapter_config_of_another_shape_is_named(tmp_path: Path, text: str) -> None:
    factors = {"a.lora_A.weight": torch.ones(1, 3), "a.lora_B.weight": torch.ones(3, 1)}
    write_tensors(tmp_path / "base.safetensors", {"a.weight": torch.ones(3, 3)})
    write_tensors(tmp_path / "adapter_model.safetensors", factors)
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    base, out = str(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"adapter_config\.json.*; expected the settings of a LoRA|is not UTF-8"):
        list(merge_models(base, [tmp_path / "adapter_model.safetensors"], Merge(weights=[1.0]), out))
