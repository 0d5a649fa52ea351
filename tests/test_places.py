"""Where a run works: from any folder, without its data, under any name, in any repository, without shared memory."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from decouple_merge.cli.main import app
from decouple_merge.config import Config, Sample, Text, dump_config, load_config, validate
from decouple_merge.config.paths import FilePath, Name
from decouple_merge.data.sources import located_source
from decouple_merge.errors import UserError
from decouple_merge.executors import run_all
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.located import located
from decouple_merge.experiment.plan import prepare
from decouple_merge.sampling.folder import sample_model
from decouple_merge.searching.study import open_storage, open_study
from decouple_merge.storage import provenance


def relative(config: Config, start: Path) -> Config:
    """Name base and data from a folder on."""
    data = config.data.model_copy(update={"source": str(Path(config.data.source).relative_to(start))})
    return config.model_copy(update={"base": str(Path(config.base).relative_to(start)), "data": data})


def test_a_run_with_relative_paths_goes_on_from_another_folder(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = relative(tiny_config(finetune={"baseline": False, "num_updates": 2}), tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["finetune", "config.yaml", "--out", "runs/a", "--range", "0"]).exit_code == 0
    # The same again is the same run, whether its config is the user's or its own.
    assert CliRunner().invoke(app, ["finetune", "config.yaml", "--out", "runs/a", "--range", "0"]).exit_code == 0
    (tmp_path / "else/where").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "else/where")
    run = "../../runs/a"
    found = CliRunner().invoke(app, ["finetune", f"{run}/config.yaml", "--out", run])
    assert found.exit_code == 0, found.exception
    assert CliRunner().invoke(app, ["fisher", run, "--num-batches", "1"]).exit_code == 0
    assert (
        CliRunner().invoke(app, ["sample", run, "--out", "s", "--num-images", "1", "--num-steps", "2"]).exit_code == 0
    )


def test_a_run_whose_base_is_gone_says_where_it_was(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    prepare(config, tmp_path / "run")
    shutil.move(config.base, tmp_path / "moved")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    found = CliRunner().invoke(app, ["sample", str(tmp_path / "elsewhere"), "--out", "s", "--num-images", "1"])
    assert isinstance(found.exception, UserError)
    assert f"{config.base} doesn't exist; check the path, which for a run stands in its config.yaml" in str(
        found.exception
    )


def names_of_places(model: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """List the keys of a config that hold paths, and whether they hold several."""
    marks = [get_args(kind)[1] for kind in (FilePath, Name)]
    for key, field in model.model_fields.items():
        for annotation in (field.annotation, *get_args(field.annotation)):
            if hasattr(annotation, "model_fields"):
                yield from names_of_places(annotation, f"{prefix}{key}.")
            elif any(mark in (field.metadata, *field.metadata, *get_args(annotation)) for mark in marks):
                yield prefix + key, get_args(field.annotation) != () and "list" in str(field.annotation)


@pytest.mark.parametrize("left_out", ["distil.", "search.checkpoints"])
def test_every_path_of_a_config_is_made_absolute(
    left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    places = dict(names_of_places(Config))
    assert places.keys() >= {"base", "data.source", "data.path", "text.prompts", "search.checkpoints"}
    assert places.keys() >= {"evaluate.inception_weights", "evaluate.dinov2", "evaluate.clip"}
    # The two don't go together.
    places = {key: is_list for key, is_list in places.items() if not key.startswith(left_out)}
    overrides = [f"{key}={['here'] if is_list else 'here'}" for key, is_list in places.items()]
    for section in [key.removesuffix(".similarity") for key in places if key.endswith(".similarity")]:
        overrides.append(f"{section}.clusters=gradient")
        overrides += [f"{section}.method=ant_uw"] if section.endswith("balancing") else []
    overrides.append("finetune.global_prob=1")
    config = located(validate(Config, {}, "here", overrides))
    assert "here\n" in dump_config(validate(Config, {}, "here", overrides))
    text = dump_config(config)
    assert text.count(f"{tmp_path}/here") == len(places)
    assert text.count("here") == text.count(f"{tmp_path}/here")
    monkeypatch.chdir(tmp_path / "here")
    assert located(config) == config


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("images", "images"),
        ("images/../images", "images/../images"),
        ("webdataset:images", "images"),
        ("webdataset:images/{00..12}.tar", "images/{00..12}.tar"),
        ("datasets:images", "images"),
        ("link", "link"),
        ("fashion-mnist", None),
        ("datasets:cifar10", None),
        ("nothing", None),
    ],
)
def test_a_source_is_located(name: str, path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A folder of this name doesn't hide the known set.
    for folder in ("images", "fashion-mnist"):
        Path(folder).mkdir()
    Path("link").symlink_to("images")
    prefix = name[: name.index(":") + 1] if ":" in name else ""
    assert located_source(name) == (name if path is None else f"{prefix}{tmp_path / path}")


def test_names_on_the_hub_stay_names() -> None:
    config = validate(Config, {"base": "CompVis/stable-diffusion-v1-4"}, "here")
    assert located(config) == config


def test_a_text_run_is_sampled_without_its_data(text_config: Callable[..., Config], tmp_path: Path) -> None:
    few = Sample(num_steps=2)
    (tmp_path / "prompts.txt").write_text("sun\nred cat\n")
    for prompts in (None, str(tmp_path / "prompts.txt")):
        changes = {"finetune": {"num_updates": 1, "baseline": False}, "text": {"prompts": prompts}}
        config, run = text_config(**changes), tmp_path / f"run-{prompts is None}"
        plan = prepare(config, run)
        list(finetune_experts(plan))
        sample_model(str(run), tmp_path / "with", 2, settings=few)
        gone = [Path(config.data.source), *([Path(prompts)] if prompts else [])]
        for path in gone:
            shutil.move(path, f"{path}-away")
        assert sample_model(str(run), tmp_path / "with", 2, settings=few) == []
        assert len(sample_model(str(run), tmp_path / "without", 2, settings=few)) == 2
        given = tmp_path / "other.txt"
        given.write_text("one cat\n")
        assert len(sample_model(str(run), tmp_path / "given", 1, settings=few, text=Text(prompts=given))) == 1
        for path in gone:
            shutil.move(f"{path}-away", path)
        for folder in ("with", "without", "given"):
            shutil.rmtree(tmp_path / folder)


@pytest.mark.parametrize("name", ["a b", "what?", "x#1", "50%20", "é ü", "a?b=c&d", "file:x", "'q'"])
def test_a_study_lies_in_its_run_whatever_the_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for _ in range(2):
        study = open_study(open_storage(folder / "study.jsonl"), "screen")
        study.set_user_attr("seen", True)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert {p.name for p in folder.iterdir()} == {"study.jsonl", "study.lock"}
    assert study.user_attrs == {"seen": True}


def git(folder: Path, *arguments: str) -> str:
    options = ["-c", "user.name=x", "-c", "user.email=x@x"]
    done = subprocess.run(["git", "-C", folder, *options, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_code_and_not_of_what_is_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "project/.venv/lib/decouple_merge/storage/provenance.py"
    package.parent.mkdir(parents=True)
    shutil.copy(provenance.__file__, package)
    monkeypatch.setattr(provenance, "__file__", str(package))
    assert provenance.git_commit.__wrapped__() is None
    git(tmp_path / "project", "init")
    (tmp_path / "project/own.txt").touch()
    git(tmp_path / "project", "add", "own.txt")
    git(tmp_path / "project", "commit", "-m", "theirs")
    assert provenance.git_commit.__wrapped__() is None
    # As in a hook of theirs.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "project/.git"))
    assert provenance.git_commit.__wrapped__() is None
    monkeypatch.delenv("GIT_DIR")
    git(package.parents[1], "init")
    git(package.parents[1], "add", ".")
    git(package.parents[1], "commit", "-m", "ours")
    assert provenance.git_commit.__wrapped__() == git(package.parents[1], "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "project/.git"))
    assert provenance.git_commit.__wrapped__() == git(package.parents[1], "--git-dir=.git", "rev-parse", "HEAD")


def sums(tensors: dict[str, Tensor], number: int) -> Iterator[float]:
    tensors["a"].add_(number)
    yield tensors["a"].sum().item()


def test_workers_get_tensors_without_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor goes through shared memory")

    for kind in [k for k in ForkingPickler._extra_reducers if k.__module__.startswith("torch")]:
        monkeypatch.setitem(ForkingPickler._extra_reducers, kind, refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared = {"a": torch.ones(1000)}
    assert sorted(run_all(sums, [(shared, 1), (shared, 2)], 2)) == [2000.0, 3000.0]
    # What a worker does with its copy is its own, and nothing is left.
    assert shared["a"].sum() == 1000
    # The server of the workers has a socket there, as long as it lives.
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("pymp-")] == []


def test_the_config_of_a_run_has_no_relative_path(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    prepare(tiny_config(), tmp_path / "run")
    config = load_config(tmp_path / "run/config.yaml")
    assert located(config) == config
