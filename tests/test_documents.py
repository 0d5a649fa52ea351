"""Configs as files: what YAML allows and a config doesn't have is refused, in one line and at once."""

import math
import os
import socket
from pathlib import Path

import pytest

from decouple_merge.config import (
    Data,
    Ema,
    Evaluate,
    Merge,
    Search,
    Training,
    dump_config,
    load_config,
    load_protocol,
    validate,
)
from decouple_merge.config.document import MAX_BYTES, MAX_DEPTH, dump, parse
from decouple_merge.errors import UserError


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(tmp_path: Path, text: str | bytes, overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value)


# -- numbers


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", ".NaN", "+.INF"])
@pytest.mark.parametrize(
    "key",
    [
        "finetune.learning_rate",
        "finetune.global_prob",
        "finetune.betas.0",
        "finetune.ema.max_decay",
        "finetune.weighting_options.gamma",
        "search.low",
        "search.max_minutes",
        "search.start.0.1",
        "search.frozen.2",
        "text.guidance_scale",
        "pretrain.scheduler.beta_end",
        "pretrain.model.block_out_channels.1",
        "evaluate.num_images",
    ],
)
def test_nan_and_infinity_are_refused_in_every_number(tmp_path: Path, key: str, value: str) -> None:
    *parents, last = key.split(".")
    nested = f"[0.5, {value}]" if last.isdecimal() else f"{{{last}: {value}}}"
    for parent in reversed([p for p in parents if not p.isdecimal()]):
        nested = f"{{{parent}: {nested}}}"
    assert "config.yaml: " in refused(tmp_path, nested)


def test_nan_and_infinity_are_refused_where_no_file_is_read() -> None:
    for values in ({"weights": [math.nan]}, {"weights": [1.0], "blocks": {"a.*": [math.inf]}}):
        with pytest.raises(UserError, match="expected a finite number"):
            validate(Merge, values, "merge")
    for make in (
        lambda: Search(low=-math.inf),
        lambda: Training(learning_rate=math.nan),
        lambda: Search(high=math.nan),
    ):
        with pytest.raises(ValueError, match="finite number"):
            make()


@pytest.mark.parametrize(
    "text",
    [
        "finetune: {num_updates: true}",
        "finetune: {global_prob: true}",
        "finetune: {betas: [false, 0.9]}",
        "seed: false",
        "search: {frozen: {1: true}}",
        "finetune: {ranges: [[false, true]]}",
        "search: {start: [[true, 0.5]]}",
    ],
)
def test_true_and_false_are_no_numbers(tmp_path: Path, text: str) -> None:
    assert "expected a number, found " in refused(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    ["seed: '7'", "seed: 010", "seed: 0x1f", "finetune: {learning_rate: '1e-3'}", "seed: 1:30", "seed: ٣", "seed: 1_"],
)
def test_texts_are_no_numbers(tmp_path: Path, text: str) -> None:
    assert "expected a number, found" in refused(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "seed: 99999999999999999999",
        "seed: " + "9" * 5000,
        "search: {first_seed: 9223372036854775808}",
        "finetune: {learning_rate: 1e39}",
        "finetune: {learning_rate: 1e999}",
        "finetune: {eps: -1e-8}",
        "finetune: {eps: -0.0}",
        "finetune: {betas: [0.9, 1.0]}",
        "finetune: {betas: [-0.1, 0.9]}",
        "finetune: {betas: [0.9]}",
        "finetune: {betas: [0.9, 0.99, 0.999]}",
        "pretrain: {betas: [1, 1]}",
        "finetune: {ema: {max_decay: 1}}",
        "finetune: {ema: {power: 0}}",
        "evaluate: {num_images: 5000000000, num_seed_sets: 5000000000}",
    ],
)
def test_numbers_beyond_what_they_mean_are_refused(tmp_path: Path, text: str) -> None:
    assert "\n" not in refused(tmp_path, text).strip()


def test_numbers_are_read_as_yaml_1_2_has_them(tmp_path: Path) -> None:
    text = (
        "finetune: {learning_rate: 1e-3, eps: 1E-10, num_updates: 20_000, weight_decay: -0.0,"
        " schedule: cosine, floor: .5, max_grad_norm: 2}"
    )
    finetune = load_config(write(tmp_path, text)).finetune
    assert (finetune.learning_rate, finetune.eps, finetune.num_updates) == (1e-3, 1e-10, 20_000)
    assert (finetune.floor, finetune.max_grad_norm) == (0.5, 2.0)
    assert math.copysign(1, finetune.weight_decay) == 1
    assert load_config(write(tmp_path, "data: {source: 2024-01-01}")).data.source == "2024-01-01"


@pytest.mark.parametrize(
    "text", ["1e5", "010", "2024-01-01", "1:30", "yes", "null", "~x", "a: b", "1_0", "é", "- a", "0x1", ""]
)
def test_texts_that_look_like_something_else_survive_a_dump(text: str) -> None:
    assert parse(dump({"key": text}), "here") == {"key": text}


# -- the document


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("seed: 1\nbase: a\nseed: 2", ("'seed'", "line 1", "line 3")),
        ("finetune:\n  num_updates: 5\nsearch: {}\nfinetune:\n  num_ranges: 2", ("'finetune'", "line 1", "line 4")),
        ("search:\n  frozen:\n    1: 0.5\n    '1': 0.7", ("'1'", "line 3", "line 4")),
        ("data: {flip: true,\n flip: false}", ("'flip'", "line 1", "line 2")),
        ("pretrain:\n  model: {a: 1, a: 2}", ("'a'", "line 2")),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path: Path, text: str, lines: tuple[str, ...]) -> None:
    found = refused(tmp_path, text)
    assert all(part in found for part in lines)


def bomb(levels: int, width: int, form: str) -> str:
    lines = [f"x0: &x0 {form.format('1', '1')}"]
    for i in range(1, levels):
        lines.append(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * width)}]")
    return "\n".join(lines)


def merge_bomb(levels: int, width: int) -> str:
    lines = ["b0: &b0 {x: 1}"]
    for i in range(1, levels):
        lines.append(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * width)}]}}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(9, 10, "[{}]"),
        bomb(30, 2, "{{a: {}}}"),
        "a: &a [*a]",
        "a: &a {b: *a}",
        merge_bomb(9, 9),
        "[" * 5000,
        "[" * (MAX_BYTES - 1),
        "{a: " * 200 + "1" + "}" * 200,
        "\n".join(" " * i + "a:" for i in range(300)),
        "a: [" + "1, " * (MAX_BYTES // 3) + "1]",
        "? [a, b]\n: 1",
        "? {a: b}\n: 1",
        "seed: !!int x",
        "seed: !!python/object/apply:os.system [ls]",
        "seed: !!binary aGVsbG8=",
        "a: !!set {b, c}",
        "seed: !mine 3",
        "a: b\n---\nc: d",
        "%YAML 9.9\n---\nseed: 1",
        "seed: 1\n\tbase: x",
        "1: 2",
        "true: 2",
        "null: 2",
        'base: "a\\0b"',
        'data: {source: "\\ud800"}',
        "just a text",
        "- seed",
        b"seed: 1\nbase: \xff\xfe",
        "seed: 1\nbase: é".encode("utf-16"),
        "seed: 1\nbase: é".encode("latin-1"),
        bytes(range(256)),
        b"\0" * 100,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_a_config_does_not_have_is_refused_at_once(tmp_path: Path, text: str | bytes) -> None:
    assert str(tmp_path) in refused(tmp_path, text)


def test_the_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    assert "config.yaml, line 2, is not UTF-8" in refused(tmp_path, b"seed: 1\nbase: \xfc")


def test_aliases_that_stay_small_are_read(tmp_path: Path) -> None:
    text = "finetune: &t {num_updates: 5, ema: {power: 0.5}}\npretrain: {<<: *t, num_updates: 7}"
    config = load_config(write(tmp_path, text), ["finetune.ema.power=0.6"])
    assert config.pretrain is not None
    assert (config.finetune.num_updates, config.pretrain.num_updates) == (5, 7)
    assert (config.finetune.ema, config.pretrain.ema) == (Ema(power=0.6), Ema(power=0.5))


def test_a_level_below_the_limit_is_read() -> None:
    assert parse("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), "here")


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "link to itself", "below a file", "long name"])
def test_a_config_that_is_no_file_is_refused_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "config.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # Names of sockets are short.
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("config.yaml")
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "below a file":
        path.write_text("{}")
        path = path / "config.yaml"
    else:
        path = tmp_path / ("x" * 300)
    with pytest.raises(UserError, match=f"{path}.*; give the path of a YAML file"):
        load_config(path)


# -- overrides


@pytest.mark.parametrize(
    "assignment",
    [
        "finetune.=3",
        ".seed=3",
        "finetune..ema=3",
        ".=",
        "finetune.ranges.0=[1, 2]",
        "data.source.x=1",
        "seed.a.b=1",
        "finetune=[1]",
        "finetune.betas=0.9",
        "finetune.betas=[0.9]",
        "seed=",
        "seed=.nan",
        "seed={seed: 1, seed: 2}",
        "seed=[",
        "seed=!!int x",
        "seed=&a [*a]",
        "search.start=[[.inf]]",
        'data.source="\\0"',
        "evaluate.metrics=fid",
        "finetune.num_updates=yes",
    ],
)
def test_overrides_that_make_no_sense_are_refused(tmp_path: Path, assignment: str) -> None:
    assert refused(tmp_path, "finetune: {ranges: [[0, 3]]}\ndata: {source: a}", [assignment])


def test_an_override_of_a_section_that_is_empty_makes_it(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "finetune:\nseed: 1"), ["finetune.num_ranges=3", "pretrain.num_updates=4"])
    assert config.finetune.num_ranges == 3
    assert config.pretrain is not None
    assert config.pretrain.num_updates == 4


# -- places


def test_the_home_folder_is_put_in_the_place_of_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    text = (
        "base: ~/models/a\ndata: {source: 'webdataset:~/shards', path: ~/raw}\nsearch: {checkpoints: [~/a.safetensors]}"
        "\ntext: {prompts: ~/p.txt}\nevaluate: {inception_weights: ~/w.pth, dinov2: ~/dino, clip: org/clip~1}"
    )
    config = load_config(write(tmp_path, text))
    assert (config.base, config.data.source) == ("/home/ada/models/a", "webdataset:/home/ada/shards")
    assert config.search.checkpoints == ["/home/ada/a.safetensors"]
    assert (config.text.prompts, config.data.path) == (Path("/home/ada/p.txt"), Path("/home/ada/raw"))
    assert (config.evaluate.inception_weights, config.evaluate.clip) == (Path("/home/ada/w.pth"), "org/clip~1")
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert Data(source="~nobody-of-that-name/x").source == "~nobody-of-that-name/x"
    assert Evaluate(dinov2="~/a").dinov2 == "/home/ada/a"


def test_protocols_do_not_share_what_is_changed() -> None:
    assert load_protocol("coco-30k", {}, ["sample.num_steps=3"]).sample.num_steps == 3
    assert load_protocol("coco-30k", {}).sample.num_steps != 3


@pytest.mark.parametrize("metrics", ["[]", "[kd_effnetlite0, fd_effnetlite0, kd_effnetlite0]"])
def test_metrics_are_some_and_each_is_named_once(tmp_path: Path, metrics: str) -> None:
    assert "evaluate.metrics" in refused(tmp_path, f"evaluate: {{metrics: {metrics}}}")
