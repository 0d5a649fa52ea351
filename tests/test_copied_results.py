"""A run's files at a URL: whole ones, only what changed, and what can't be written is found before any compute."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from decouple_merge.config import Config
from decouple_merge.errors import UserError
from decouple_merge.experiment import workflow
from decouple_merge.experiment.plan import check, prepare
from decouple_merge.storage.copies import check_url, copy_changed


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}/run" if request.param == "memory" else f"file://{tmp_path}/copy/run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name in ("config.yaml", "experts/0/model.safetensors", "metrics.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files(url: str) -> dict[str, str]:
    filesystem, root = fsspec.url_to_fs(url)
    return {p.removeprefix(root).lstrip("/"): filesystem.cat_file(p).decode() for p in filesystem.find(root)}


def test_all_files_are_there_and_only_what_changed_is_copied_again(run: Path, url: str) -> None:
    assert sorted(copy_changed(run, url)) == ["config.yaml", "experts/0/model.safetensors", "metrics.jsonl"]
    assert files(url) == {n: n for n in ("config.yaml", "experts/0/model.safetensors", "metrics.jsonl")}
    assert list(copy_changed(run, url)) == []
    (run / "metrics.jsonl").write_text("two lines")
    assert list(copy_changed(run, url)) == ["metrics.jsonl"]
    assert files(url)["metrics.jsonl"] == "two lines"


def test_what_is_gone_there_is_copied_again_and_what_is_gone_here_is_removed(run: Path, url: str) -> None:
    list(copy_changed(run, url))
    filesystem, root = fsspec.url_to_fs(url)
    filesystem.rm_file(f"{root}/config.yaml")
    with filesystem.open(f"{root}/of-another.txt", "wb") as file:
        file.write(b"x")
    (run / "metrics.jsonl").unlink()
    assert list(copy_changed(run, url)) == ["config.yaml"]
    assert sorted(files(url)) == ["config.yaml", "experts/0/model.safetensors", "of-another.txt"]


def test_nothing_in_the_making_is_copied(run: Path, url: str) -> None:
    for name in (".deme-x.tmp/model.safetensors", "experts/0/state/1", "shares/a/0.safetensors", "x.lock"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    list(copy_changed(run, url))
    assert sorted(files(url)) == ["config.yaml", "experts/0/model.safetensors", "metrics.jsonl"]


def test_a_copy_that_breaks_off_leaves_no_half_file_and_goes_on_later(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/copy"

    def break_off(source: Any, target: Any, size: int) -> None:
        target.write(source.read(3))
        if "metrics" in source.name:
            raise OSError("the network is gone\nfor now")

    with monkeypatch.context() as patch:
        patch.setattr("decouple_merge.storage.copies.shutil.copyfileobj", break_off)
        with pytest.raises(
            UserError, match=rf"^results is {url}, which can't be written \(the network is gone\); check"
        ):
            list(copy_changed(run, url))
    assert not (tmp_path / "copy/metrics.jsonl").exists()
    list(copy_changed(run, url))
    assert files(url)["metrics.jsonl"] == "metrics.jsonl"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3x://bucket", r"fsspec can't open s3x:// \(.*s3x.*\); install its package, such as s3fs for s3"),
        ("bucket/run", r"results is 'bucket/run', expected a URL, such as s3://bucket/run"),
        ("file:///{run}/copy", r"which lies in .*, or that in it: give another place"),
        ("file:///{run}/..", r"which lies in .*, or that in it: give another place"),
    ],
)
def test_a_place_that_is_none_is_refused_before_any_compute(
    url: str, message: str, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    out = tmp_path / "here/run"
    with pytest.raises(UserError, match=message) as caught:
        check(tiny_config(results=url.format(run=str(out)[1:])), out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_place_that_can_not_be_written_stops_a_run_before_its_trainings(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "blocked").write_text("a file")
    config = tiny_config(results=f"file://{tmp_path}/blocked/run")
    with pytest.raises(UserError, match="which can't be written"):
        list(workflow.run(config, tmp_path / "run"))
    assert not (tmp_path / "run/experts").exists()


def test_between_stages_a_lost_connection_is_a_warning(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    plan = prepare(tiny_config(results=f"file://{tmp_path}/copy"), tmp_path / "run")
    assert list(workflow.copy_results(plan)) == [f"results: 3 files copied to file://{tmp_path}/copy"]
    os.rename(tmp_path / "copy", tmp_path / "moved")
    (tmp_path / "copy").write_text("a file")
    (line,) = workflow._or_later(workflow.copy_results(plan))
    assert line.startswith(f"warning: results is file://{tmp_path}/copy, which can't be written")


def test_a_run_may_lie_beside_its_copy(tmp_path: Path) -> None:
    check_url(f"file://{tmp_path}/copy", tmp_path / "run")
