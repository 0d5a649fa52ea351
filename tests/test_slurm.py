"""The recipe for SLURM in docs/scale.md, as a scheduler reads it and as its jobs start."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from decouple_merge.cli import main as cli
from decouple_merge.config import Config, dump_config

PAGE = Path(__file__).parents[1] / "docs/scale.md"


def program(folder: Path, name: str, code: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env python3\nimport json, os, sys\n{code}\n")
    path.chmod(0o755)


@pytest.fixture
def jobs(tmp_path: Path) -> list[dict[str, str]]:
    """The options of each job that the recipe submits, and its number."""
    log = tmp_path / "jobs.jsonl"
    program(
        tmp_path / "bin",
        "sbatch",
        f"log = {str(log)!r}\nopen(log, 'a').write(json.dumps(sys.argv[1:]) + chr(10))\nprint(len(list(open(log))))",
    )
    (recipe,) = re.findall(r"```sh\n(experts=\$\(sbatch.*?)```", PAGE.read_text(), re.DOTALL)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", recipe], env=os.environ | {"PATH": path}, check=True, capture_output=True)
    found = []
    for number, line in enumerate(log.read_text().splitlines(), start=1):
        words = json.loads(line)
        wrapped = words[words.index("--wrap") + 1]
        options = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word and word != wrapped)
        found.append(options | {"wrap": wrapped, "number": str(number)})
    return found


def started(job: dict[str, str], folder: Path) -> list[list[str]]:
    """What ``deme`` is called with in each task of a job."""
    program(folder / "bin", "deme", "print(json.dumps(sys.argv[1:]))")
    first, _, last = job.get("array", "0-0").partition("-")
    calls = []
    for task in range(int(first), int(last) + 1):
        env = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task)}
        said = subprocess.run(["bash", "-euc", job["wrap"]], env=env, check=True, capture_output=True, text=True)
        calls.append(json.loads(said.stdout))
    return calls


def test_the_jobs_of_the_recipe_end_in_a_merged_model(
    jobs: list[dict[str, str]], tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    assert [job.get("dependency") for job in jobs] == [None, "afterok:1", "afterok:1"]
    config, run = tmp_path / "mine.yaml", tmp_path / "run"
    config.write_text(dump_config(tiny_config(finetune={"num_ranges": 4, "num_updates": 2, "validate_every": 2})))
    for job in jobs:
        for words in started(job, tmp_path):
            names = {"configs/sd14.yaml": str(config), "/shared/sd14": str(run)}
            done = CliRunner().invoke(cli.app, [names.get(word, word) for word in words])
            assert done.exit_code == 0, (words, done.output, done.exception)
        if job["number"] == "1":
            assert all((run / f"experts/{i}/model.safetensors").is_file() for i in range(4))
            assert not (run / "merged").exists()
    assert (run / "merged/model_index.json").is_file()
