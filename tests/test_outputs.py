"""What a path that the user gave may replace: an earlier result of the same kind that is no input, nothing else."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import children
from decouple_merge.cli.main import app, main
from decouple_merge.config import Merge
from decouple_merge.errors import UserError
from decouple_merge.merging import described
from decouple_merge.merging.recipes import merge_models
from decouple_merge.storage import files
from decouple_merge.storage.files import append_record, atomic_path, remove_leftovers, write_text
from decouple_merge.storage.outputs import MERGED_FOLDER, RECORDS, check_output


def save_network(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"a.weight": torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, an expert and a data set, which is the current one."""
    here = tmp_path / "here"
    save_network(here / "base", 0)
    save_network(here / "expert", 1)
    monkeypatch.chdir(here)
    return here


def snapshot(folder: Path) -> dict[str, Any]:
    def content(path: Path) -> Any:
        return os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None

    return {str(p.relative_to(folder)): content(p) for p in folder.rglob("*")}


def merge(out: str, *more: str, base: str = "base", expert: str = "expert") -> Any:
    arguments = ["merge", base, expert, "--weights", "0.5", "--out", out, *more]
    return CliRunner().invoke(app, arguments)


def others(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out/notes.txt").write_text("mine")


def others_hidden(place: Path) -> None:
    (place / "out/.git").mkdir(parents=True)
    (place / "out/.git/HEAD").write_text("mine")


def others_that_look_alike(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out/merge.json").write_text('{"files": "all"}')


def a_pipeline(place: Path) -> None:
    save_network(place / "out/unet", 5)
    (place / "out/model_index.json").write_text("{}")


def inputs_inside(place: Path) -> None:
    for name in ("base", "expert"):
        shutil.move(place / name, place / "out" / name)
        (place / name).symlink_to(place / "out" / name)


def a_run(place: Path) -> None:
    (place / "out/experts/0").mkdir(parents=True)
    (place / "out/config.yaml").write_text("seed: 0\n")


def a_file(place: Path) -> None:
    (place / "out").write_text("mine")


def a_pipe(place: Path) -> None:
    os.mkfifo(place / "out")


def a_link_to_others(place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / "elsewhere/notes.txt").write_text("mine")
    (place / "out").symlink_to("elsewhere")


def a_link_to_itself(place: Path) -> None:
    (place / "out").symlink_to("out")


def a_merge_with_something_added(place: Path) -> None:
    assert merge("out").exit_code == 0
    (place / "out/plots").mkdir()
    (place / "out/plots/grid.png").write_bytes(b"mine")


def a_merge_with_a_link_added(place: Path) -> None:
    assert merge("out").exit_code == 0
    (place / "out/data").symlink_to(place / "base")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    "prepare",
    [
        others,
        others_hidden,
        others_that_look_alike,
        a_pipeline,
        inputs_inside,
        a_run,
        a_file,
        a_pipe,
        a_link_to_others,
        a_link_to_itself,
        a_merge_with_something_added,
        a_merge_with_a_link_added,
    ],
)
def test_a_merge_leaves_alone_what_is_not_its_own(
    prepare: Callable[[Path], None], dry: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(place)
    before = snapshot(place)
    found = merge("out", *dry)
    assert isinstance(found.exception, UserError)
    assert str(found.exception).startswith("--out is out, which ")
    assert snapshot(place) == before


@pytest.mark.parametrize(
    "out",
    [
        "base",
        "./expert",
        "base/../base",
        "expert/inside",
        "base/a/b",
        ".",
        "..",
        "again/../base",
        "link",
        "link/inside",
    ],
)
def test_a_merge_is_not_written_over_into_or_around_an_input(out: str, place: Path) -> None:
    (place / "link").symlink_to("base")
    before = snapshot(place)
    found = merge(out)
    assert isinstance(found.exception, UserError)
    assert snapshot(place) == before


def test_an_input_is_known_through_a_link_too(place: Path) -> None:
    (place / "link").symlink_to("base")
    assert merge("m").exit_code == 0
    (place / "m2").symlink_to("m")
    # A merged folder might be replaced, but this one is the expert.
    assert "is an input" in str(merge("m", expert="m2").exception)
    assert "is an input" in str(merge("m2", base="m").exception)
    assert "is an input" in str(merge("base", base="link").exception)


@pytest.mark.parametrize("out", ["expert/config.json/x", "/proc/nothing/x", "n" * 300, "/dev/null/x"])
def test_an_output_that_cannot_be_made_is_refused_in_one_line(out: str, place: Path) -> None:
    before = snapshot(place)
    for arguments in ([], ["--dry-run"]):
        found = merge(out, *arguments)
        assert isinstance(found.exception, UserError)
        assert "\n" not in str(found.exception)
    assert snapshot(place) == before


def test_an_earlier_merge_is_replaced(place: Path) -> None:
    for weight in ("0.5", "0.25"):
        found = CliRunner().invoke(app, ["merge", "base", "expert", "--weights", weight, "--out", "out"])
        assert found.exit_code == 0, found.output
        assert json.loads((place / "out/merge.json").read_text())["weights"] == [float(weight)]
    assert sorted(p.name for p in place.iterdir()) == ["base", "expert", "out"]
    assert [*json.loads((place / "out/merge.json").read_text())["files"]] == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize("name", ["README.md", "diffusion_pytorch_model.safetensors"])
def test_a_merge_that_was_changed_by_hand_is_not_replaced(name: str, place: Path) -> None:
    assert merge("out").exit_code == 0
    if name.endswith(".md"):
        (place / "out" / name).write_text("mine")
    else:
        # Trained on, and saved where it came from: names and sizes stay.
        weights = load_file(place / "out" / name)
        save_file({key: tensor + 1 for key, tensor in weights.items()}, place / "out" / name, {"format": "pt"})
    before = snapshot(place)
    for arguments in ([], ["--dry-run"]):
        assert f"holds {name}, which was changed since" in str(merge("out", *arguments).exception)
    assert snapshot(place) == before


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_a_terminal_cannot_show_is_escaped(encoding: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"m\xe9rge-\xc3\xa9")
    shutil.copytree("base", name)
    written = [io.BytesIO(), io.BytesIO()]
    for stream, into in zip(("stdout", "stderr"), written, strict=True):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(into, encoding=encoding, errors="strict", write_through=True))
    monkeypatch.setattr(sys, "argv", ["deme", "info", name])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert written[0].getvalue().startswith(rb"m\udce9rge-")


def test_an_interrupted_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(model: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(described, "describe_model", interrupted)
    monkeypatch.setattr(sys, "argv", ["deme", "info", "model"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "deme: interrupted; run the same command again to go on\n"


def test_an_output_whose_name_is_no_utf8_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match="no UTF-8"):
        check_output(place / os.fsdecode(b"m\xe9rge"), MERGED_FOLDER)


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_written_through(dangling: bool, place: Path, tmp_path: Path) -> None:
    target = tmp_path / "disk/merged"
    if not dangling:
        target.mkdir(parents=True)
    (place / "out").symlink_to(target)
    for _ in range(2):
        assert merge("out").exit_code == 0
    assert (place / "out").is_symlink()
    assert (target / "merge.json").is_file()
    assert [p.name for p in target.parent.iterdir()] == ["merged"]
    assert sorted(p.name for p in place.iterdir()) == ["base", "expert", "out"]


def test_integers_that_are_not_the_bases_are_told(place: Path) -> None:
    names = []
    for name, numbers in (("a", [0, 1]), ("same", [0, 1]), ("other", [0, 2])):
        save_file({"ids": torch.tensor(numbers), "w": torch.ones(2)}, place / f"{name}.safetensors")
        names.append(str(place / f"{name}.safetensors"))
    base, same, other = names
    told = [merge("m.safetensors", base=base, expert=expert).output for expert in (same, other)]
    assert "are of integers" not in told[0]
    assert "other.safetensors: ids are of integers and not the base's" in told[1].replace("\n", "")
    assert load_file("m.safetensors")["ids"].tolist() == [0, 1]


def test_of_files_only_merged_ones_are_replaced(place: Path) -> None:
    base, expert = (str(place / f"{n}/diffusion_pytorch_model.safetensors") for n in ("base", "expert"))
    Path("mine.safetensors").write_bytes(Path(base).read_bytes())
    Path("text.safetensors").write_text("mine")
    Path("link.safetensors").symlink_to(base)
    Path("dir.safetensors").mkdir()
    before = snapshot(place)
    for out in ("mine.safetensors", "text.safetensors", "link.safetensors", "dir.safetensors", base, expert):
        assert isinstance(merge(out, base=base, expert=expert).exception, UserError), out
    assert snapshot(place) == before
    for _ in range(2):
        assert merge("out.safetensors", base=base, expert=expert).exit_code == 0
    assert "is an input" in str(merge("out.safetensors", base=base, expert="out.safetensors").exception)
    Path("through.safetensors").symlink_to("out.safetensors")
    assert merge("through.safetensors", base=base, expert=expert).exit_code == 0
    assert Path("through.safetensors").is_symlink()
    assert load_file("out.safetensors").keys() == {"a.weight"}


def test_a_recipe_is_an_input(place: Path) -> None:
    assert merge("out").exit_code == 0
    found = CliRunner().invoke(app, ["merge", "--recipe", "out/merge.json", "--out", "out"])
    assert "holds out/merge.json, which is an input" in str(found.exception)


# -- other verbs
def test_statistics_replace_only_statistics_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    np.savez("images.npz", images=images)
    np.savez("theirs.npz", mu=np.zeros(3), sigma=np.eye(3))
    Path("broken.npz").write_text("mine")
    before = snapshot(tmp_path)
    for out in ("images.npz", "theirs.npz", "broken.npz", "./images.npz", "images.npz/x.npz"):
        found = CliRunner().invoke(app, ["stats", "images.npz", "--out", out])
        assert isinstance(found.exception, UserError), out
    assert snapshot(tmp_path) == before
    for _ in range(2):
        assert CliRunner().invoke(app, ["stats", "images.npz", "--out", "ours.npz"]).exit_code == 0
    with np.load("ours.npz") as written:
        assert sorted(written.files) == ["mu", "sigma"]


def test_metrics_are_appended_only_to_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8))
    Path("data.jsonl").write_text('{"metric": "fid", "value": 1}\n{"file_name": "a.png", "text": "mine"}\n')
    Path("notes.txt").write_text("mine")
    Path("folder").mkdir()
    before = snapshot(tmp_path)
    for out in ("data.jsonl", "notes.txt", "images.npy", "folder", "notes.txt/m.jsonl", "/dev/null"):
        arguments = ["evaluate", "images.npy", "--reference", "images.npy", "--out", out]
        assert isinstance(CliRunner().invoke(app, arguments).exception, UserError), out
    assert snapshot(tmp_path) == before


def sample(base: Path, out: Path, *more: str) -> Any:
    arguments = ["sample", str(base), "--out", str(out), "--num-steps", "2", *more]
    return CliRunner().invoke(app, arguments)


def test_images_are_not_mixed_with_others(tiny_base: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "with-others").mkdir()
    shutil.move(tmp_path / "1.png", tmp_path / "with-others/1.png")
    (tmp_path / "with-notes").mkdir()
    (tmp_path / "with-notes/notes.txt").write_text("mine")
    for out in (tmp_path / "with-others", tmp_path / "with-notes", tiny_base, tiny_base / "images"):
        before = snapshot(tmp_path)
        assert isinstance(sample(tiny_base, out, "--num-images", "2").exception, UserError), out
        assert snapshot(tmp_path) == before


def test_images_of_the_same_are_kept_and_the_missing_are_drawn(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sample(tiny_base, tmp_path / "all", "--num-images", "6").exit_code == 0
    assert "3 were drawn now" in sample(tiny_base, out, "--num-images", "3", "--seed", "1").output
    made = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert "3 were drawn now" in sample(tiny_base, out, "--num-images", "6").output
    assert {name: (out / name).stat().st_mtime_ns for name in made} == made
    assert snapshot(out) == snapshot(tmp_path / "all")
    found = sample(tiny_base, out, "--num-images", "2").output
    assert "0 were drawn now" in found
    assert "holds 4 images besides, of seeds not asked for: 2 to 5" in found
    # Whatever is changed of what the images depend on, nothing is mixed.
    for more in (["--num-steps", "3"], ["--sampler", "DDPM"], ["--set", "sample.timestep_spacing=trailing"]):
        assert "was drawn otherwise" in str(sample(tiny_base, out, "--num-images", "8", *more).exception), more
    config = tiny_base / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace('"beta_end": 0.02', '"beta_end": 0.03'))
    assert "model_sha256" in str(sample(tiny_base, out, "--num-images", "2").exception)
    assert snapshot(out) == snapshot(tmp_path / "all")


# -- run folders
@pytest.mark.parametrize("verb", [["run", "--dry-run"], ["run"], ["finetune"]])
@pytest.mark.parametrize("out", ["base", "base/run", "images/run", "file", "file/run", "others", "others/../base/run"])
def test_a_run_is_not_put_into_an_input_or_over_anything(
    verb: list[str], out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Neither is a model nor holds images: they are not read.
    for name in ("base", "images", "others"):
        Path(name).mkdir()
        Path(name, "notes.txt").write_text("mine")
    Path("file").write_text("mine")
    Path("config.yaml").write_text("base: base\ndata: {source: images}\n")
    before = snapshot(tmp_path)
    found = CliRunner().invoke(app, [verb[0], "config.yaml", "--out", out, *verb[1:]])
    assert isinstance(found.exception, UserError)
    assert "--out" in str(found.exception)
    assert snapshot(tmp_path) == before


# -- the writing itself
def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()

    def fail() -> None:
        with atomic_path(tmp_path / "out") as temporary:
            temporary.mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert snapshot(tmp_path) == {"out": None, "out/old": b""}


def test_a_folder_that_was_moved_aside_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True)
    (place / "out/old").touch()

    def write() -> None:
        replace = os.replace

        def dies_between(source: Any, target: Any) -> None:
            replace(source, target)
            os._exit(9)

        os.replace = dies_between
        with atomic_path(place / "out") as temporary:
            temporary.mkdir()

    assert children.status(children.fork(write)) == 9
    assert not (place / "out").exists()
    remove_leftovers(place)
    assert snapshot(place) == {"out": None, "out/old": b""}


def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.txt") as first:
        first.write_text("first")
        with atomic_path(tmp_path / "a.txt") as second:
            assert first != second
            second.write_text("second")
            remove_leftovers(tmp_path)
        assert (tmp_path / "a.txt").read_text() == "second"
    assert snapshot(tmp_path) == {"a.txt": b"first"}


def append_many(path: Path, name: str) -> None:
    for i in range(10):
        append_record(path, {"metric": f"{name}-{i}", "value": 1})


def test_processes_that_append_to_one_file_lose_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    children.in_processes(4, lambda number: append_many(path, str(number)))
    records = [json.loads(line)["metric"] for line in path.read_text().splitlines()]
    assert sorted(records) == sorted(f"{n}-{i}" for n in range(4) for i in range(10))
    check_output(path, RECORDS)


def test_a_name_as_long_as_names_may_be_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "x")
    assert [len(p.name) for p in tmp_path.iterdir()] == [255]


def test_the_current_folder_is_not_replaced_under_the_users_feet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty/inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty/inside")
    for out in (".", "..", tmp_path / "empty/inside"):
        with pytest.raises(UserError, match="current folder"):
            check_output(Path(out), MERGED_FOLDER)


def test_a_folder_where_no_file_can_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match="Read-only file system"):
        check_output(tmp_path / "out", MERGED_FOLDER)


def test_an_expert_that_changes_nothing_is_told(place: Path) -> None:
    save_file({"q.weight": torch.ones(3, 2), "b": torch.ones(2).half()}, place / "a.safetensors")
    save_file({"q.weight": torch.ones(3, 2), "b": torch.ones(2)}, place / "copy.safetensors")
    save_file({"q.weight": torch.ones(3, 2), "b": torch.zeros(2)}, place / "other.safetensors")
    factors = {"q.lora_down.weight": torch.ones(1, 2), "q.lora_up.weight": torch.zeros(3, 1)}
    save_file(factors, place / "untrained.safetensors")
    for name, is_told in (("copy", True), ("untrained", True), ("other", False)):
        lines = merge_models(
            str(place / "a.safetensors"), [place / f"{name}.safetensors"], Merge(weights=[1]), place / "m.safetensors"
        )
        assert any(f"{name}.safetensors has the base's own tensors" in str(line) for line in lines) == is_told
