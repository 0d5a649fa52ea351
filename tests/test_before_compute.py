"""What can never end well is refused before anything is computed, and says where it looked."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

from conftest import make_unet
from decouple_merge.cli.main import _users_mistake
from decouple_merge.config import Config, Data, Sample
from decouple_merge.data.sources import open_source
from decouple_merge.errors import UserError
from decouple_merge.experiment.dry_run import describe
from decouple_merge.experiment.plan import check
from decouple_merge.models.base import load_base
from decouple_merge.models.network import load_network
from decouple_merge.sampling.checks import check_sample
from decouple_merge.storage.hub import pipeline_folder
from decouple_merge.storage.reading import read_text
from test_lost import zero_snr

OWN_CACHE = True
WEIGHTS = "diffusion_pytorch_model.safetensors"


def spoiled(base: Path, folder: Path, number: float) -> Path:
    """Copy a base and put a number into the middle of one tensor."""
    shutil.copytree(base, folder)
    file = folder / "unet" / WEIGHTS
    tensors = load_file(file)
    tensors["conv_out.weight"].view(-1)[5] = number
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_where_a_model_is_opened(
    number: float, tiny_base: Path, tmp_path: Path
) -> None:
    base = spoiled(tiny_base, tmp_path / "spoiled", number)
    with pytest.raises(UserError, match=r"^base '.*/spoiled': conv_out\.weight has NaN or infinity, expected finite"):
        load_base(str(base))
    with pytest.raises(UserError, match=r"/spoiled: conv_out\.weight has NaN or infinity"):
        load_network(base)


@pytest.mark.parametrize(
    ("settings", "is_defined"),
    [
        (Sample(num_steps=5, timestep_spacing="trailing"), False),
        (Sample(sampler="DDPM", num_steps=1000), False),
        (Sample(num_steps=5, timestep_spacing="leading"), True),
        (Sample(sampler="EulerDiscrete", num_steps=5, timestep_spacing="trailing"), True),
    ],
)
def test_a_sampler_that_starts_where_epsilon_says_nothing_is_refused_before_training(
    settings: Sample, is_defined: bool, tmp_path: Path
) -> None:
    base = load_base(str(zero_snr(tmp_path / "base")))
    if is_defined:
        check_sample(base, settings)
        return
    with pytest.raises(UserError, match=rf"predicts ε.* {settings.sampler or 'DDIM'} with {settings.num_steps} steps"):
        check_sample(base, settings)
    schedule = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"prediction_type": "v_prediction"}))
    check_sample(load_base(str(tmp_path / "base")), settings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"finetune": {"batch_size": 2000}},
            r"^batch_size is 2000, which takes 1\.54 MB .* has 1\.00 MB",
        ),
        ({"sample": {"batch_size": 3000}, "evaluate": {"num_images": 2500}}, r"^sample\.batch_size is 2500"),
        ({"data": {"num_workers": 1}}, r"^data\.num_workers is 1,"),
    ],
)
def test_what_is_more_than_memory_holds_is_refused(
    changed: dict[str, dict[str, int]],
    message: str,
    tiny_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("decouple_merge.executors.devices.memory_of", lambda device: 10**6)
    check(tiny_config(sample={"batch_size": 3000}), tmp_path / "run")
    with pytest.raises(UserError, match=message):
        check(tiny_config(**changed), tmp_path / "run")


def test_a_relative_path_that_is_not_there_says_what_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sought = str(tmp_path / "a" / "b")
    for look in (
        lambda: pipeline_folder("./a/b"),
        lambda: load_network(Path("a/b")),
        lambda: open_source(Data(source="a/b")),
        lambda: read_text(Path("a/b"), "advice"),
    ):
        with pytest.raises(UserError, match=rf"\(looked for {sought}\)"):
            look()
    with pytest.raises(UserError) as found:
        read_text(Path(sought), "advice")
    assert str(found.value).count(sought) == 1


def test_a_cache_folder_that_can_not_be_is_named_by_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEME_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").touch()
    for path in ("file", "file/cache", "file/cache/locks"):
        line = _users_mistake(NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(tmp_path / path)))
        assert line is not None
        assert line.endswith(
            f"the cache folder is {tmp_path}/file/cache: set DEME_CACHE to a folder that can be written"
        )
    other = _users_mistake(NotADirectoryError(errno.ENOTDIR, "no", str(tmp_path / "other")))
    assert other is not None
    assert "DEME_CACHE" not in other


def test_a_dry_run_says_nothing_of_experts_that_are_not_trained(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_config(finetune={"keep_every": 1}, search={"over": "baseline-checkpoints"})
    lines = list(describe(config, tmp_path / "run"))
    assert not [line for line in lines if "expert" in line]
    assert any("expert 0: " in line for line in describe(tiny_config(), tmp_path / "run"))


def test_metrics_that_see_no_such_channels_are_refused(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    network = make_unet(in_channels=4, out_channels=4)
    DDPMPipeline(network, DDPMScheduler(num_train_timesteps=40)).save_pretrained(tmp_path / "four")
    config = tiny_config(base=str(tmp_path / "four"))
    with pytest.raises(UserError, match=r"fd_effnetlite0 is measured on images in grey or colour, and .*four draws 4"):
        check(config, tmp_path / "run")
