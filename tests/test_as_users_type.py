"""Mistakes at the command line: told in one line, and nothing of a run is changed by them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from decouple_merge.cli import main as cli
from decouple_merge.cli.options import chosen
from decouple_merge.config import Config, dump_config
from decouple_merge.errors import UserError
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.seeds import check_seeds

MakeConfig = Callable[..., Config]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def told(*words: object) -> str:
    """What a command that is refused says."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert isinstance(done.exception, UserError), (words, done.output, done.exception)
    return str(done.exception)


@pytest.fixture
def run(tiny_config: MakeConfig, tmp_path: Path) -> Path:
    """A run with finished experts and no merge."""
    config = tiny_config(finetune={"baseline": False, "num_updates": 1, "validate_every": 1})
    list(finetune_experts(prepare(config, tmp_path / "run")))
    return tmp_path / "run"


def test_a_verb_that_is_refused_leaves_the_run_as_it_was(run: Path) -> None:
    before = contents(run)
    assert "run/merged is missing: distil begins with the merged model" in told("distil", run)
    assert "--range is 9, and the range doesn't exist: expected 0 to 1" in told(
        "finetune", run / "config.yaml", "--range", 9, "--out", run
    )
    assert contents(run) == before
    told("finetune", run / "config.yaml", "--range", 9, "--out", run.with_name("new"))
    assert not run.with_name("new").exists()


def test_a_dry_run_of_the_analyses_writes_nothing_and_names_what_costs_nothing(run: Path) -> None:
    before = contents(run)
    done = CliRunner().invoke(cli.app, ["analyze", str(run), "--only", "task-vectors", "--dry-run"])
    assert (done.exit_code, done.output) == (0, "task-vectors: reads what is there\n")
    assert contents(run) == before
    assert "--over finetune.nope: no such setting" in told("analyze", run, run, "--over", "finetune.nope", "--dry-run")


@pytest.mark.parametrize("verb", ["search", "distil", "fisher", "gram", "analyze", "status", "report"])
def test_verbs_of_a_run_say_that_a_folder_is_none(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = told(verb, "nope")
    assert message.startswith("nope (looked for ")
    assert message.endswith("has no config.yaml, expected a run folder: give the folder that deme run wrote")


def test_a_study_and_a_config_are_told_apart() -> None:
    assert "study-fashion is a study, with arms: give it to deme study" in told("run", "study-fashion", "--dry-run")
    assert "is the config of a run, without arms: give it to deme run" in told("study", "fashion-quick", "--dry-run")


def test_any_number_of_seeds_is_checked_at_once() -> None:
    with pytest.raises(UserError, match="the last seed is 999999999999999, expected less than"):
        check_seeds(range(10**15))
    with pytest.raises(UserError, match="the last seed is 4294967296"):
        check_seeds([3, 2**32])
    check_seeds(range(0))
    check_seeds([])


def test_an_address_is_rays() -> None:
    assert chosen(None, None, "auto") == ["executor=ray", "ray.address=auto"]
    with pytest.raises(UserError, match="--address is auto, and --executor local has no cluster: leave one out"):
        chosen(None, "local", "auto")


def test_metrics_are_compared_in_sentences_and_may_stand_apart(tmp_path: Path) -> None:
    record = {"metric": "fd", "num_images": 4, "seeds": [0, 3]}
    lines = [json.dumps(record | {"model": model, "value": value}) for model, value in (("a", 2.0), ("b", 1.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    path = tmp_path / "metrics.jsonl"
    done = CliRunner().invoke(cli.app, ["evaluate", "--compare", f"{path}:a", f"{path}:b"])
    assert done.output.startswith("fd: A 2, B 1, B - A -1 on the same seeds")
    assert "metric is 'nope'" in told(
        "evaluate", tmp_path, "--metrics", "fd_effnetlite0, nope", "--reference", tmp_path
    )


def test_what_a_merge_refuses_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file, value in zip(files, (1.0, float("nan")), strict=True):
        save_file({"a": torch.full((2,), value)}, file)
    merge = ("merge", *files, "--weights", "0.5", "--out", tmp_path / "out.safetensors")
    assert "1.safetensors: a has NaN or infinity; " in told(*merge)
    assert "mend the model, or --set allow_non_finite=true" in told(*merge)
    message = told(*merge, "--method", "fisher")
    assert "fishers names 0 files for 1 experts" in message
    assert "as deme fisher writes them" in message
    assert "nope: there is no such file or folder" in told("merge", files[0], "nope", *merge[3:])


def test_a_shipped_name_is_an_expert_too(tmp_path: Path) -> None:
    merge = ["merge", "fashion-ddpm", "fashion-ddpm", "--weights", "0.5", "--out", str(tmp_path / "out"), "--dry-run"]
    done = CliRunner().invoke(cli.app, merge)
    assert done.exit_code == 0, done.exception


def test_a_closed_standard_output_is_no_fault_of_ours() -> None:
    code = "import sys; sys.stdout = None; import decouple_merge.cli.console"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_is_read_before_what_it_asks_for_is_imported(tmp_path: Path, tiny_config: MakeConfig) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(dump_config(tiny_config()).replace("num_updates", "num_update"))
    code = (
        "import sys; from typer.testing import CliRunner; from decouple_merge.cli import main\n"
        f"done = CliRunner().invoke(main.app, ['run', {str(config)!r}])\n"
        "assert 'num_update' in str(done.exception), done.exception\n"
        "assert 'decouple_merge.experiment' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
