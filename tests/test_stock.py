"""Bases as they are found in the world: odd files, samplers for other models, folders that may not be written."""

import inspect
import json
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from decouple_merge.config import Sample, Text
from decouple_merge.errors import UserError
from decouple_merge.models.base import load_base, stored_dtype
from decouple_merge.models.families.flux import save_flux
from decouple_merge.models.families.sd3 import save_sd3
from decouple_merge.models.families.wan import save_wan
from decouple_merge.models.parts import texts_to_encode
from decouple_merge.models.skipping import skipping
from decouple_merge.sampling.checks import check_sample
from decouple_merge.storage.files import copy_folder
from decouple_merge.storage.hub import pipeline_folder

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def half(base: Path) -> Path:
    """Put a variant in half precision beside a base's weights."""
    tensors = {key: value.half() for key, value in load_file(base / WEIGHTS).items()}
    path = base / "unet/diffusion_pytorch_model.fp16.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return path


def test_a_base_is_stored_as_the_files_that_diffusers_takes(tiny_base: Path) -> None:
    half(tiny_base)
    assert stored_dtype(tiny_base) == load_base(str(tiny_base)).dtype == torch.float32


def test_a_base_of_a_variant_alone_is_told_what_to_rename(tiny_base: Path) -> None:
    half(tiny_base)
    (tiny_base / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"unet has weights of the variant fp16 alone, .* take .fp16 out of the names"):
        load_base(str(tiny_base))
    half_file = tiny_base / "unet/diffusion_pytorch_model.fp16.safetensors"
    half_file.rename(tiny_base / WEIGHTS)
    assert load_base(str(tiny_base)).dtype == torch.float16


@pytest.mark.parametrize(
    "sampler",
    ["RePaint", "KarrasVe", "ScoreSdeVe", "EDMEuler", "CMStochasticIterative", "IPNDM", "CogVideoXDDIM", "DDIMInverse",
     "DPMSolverMultistepInverse", "DDPMWuerstchen", "Helios"],
)  # fmt: skip
# diffusers hands tensors to numpy as numpy will not have them.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_samplers_for_other_models_are_refused_in_a_line(tiny_base: Path, sampler: str) -> None:
    with pytest.raises(UserError, match=f"^sampler {sampler}Scheduler "):
        check_sample(load_base(str(tiny_base)), Sample(sampler=sampler, num_steps=4))


@pytest.mark.parametrize(
    "sampler", ["DDPM", "PNDM", "EulerDiscrete", "HeunDiscrete", "UniPCMultistep", "DEISMultistep"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_samplers_of_the_bases_noise_are_taken(tiny_base: Path, sampler: str) -> None:
    check_sample(load_base(str(tiny_base)), Sample(sampler=sampler, num_steps=8))


def with_scheduler(base: Path, scheduler: object) -> Path:
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.register_modules(scheduler=scheduler)
    pipeline.save_pretrained(base)
    return base


def test_a_shift_that_was_another_classs_is_not_read(tmp_path: Path) -> None:
    stale = FlowMatchEulerDiscreteScheduler(shift=1.0).config
    own = UniPCMultistepScheduler.from_config(
        stale, flow_shift=12.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    base = load_base(str(with_scheduler(save_wan(tmp_path / "wan"), own)))
    assert base.pipeline.scheduler.config["shift"] == 1.0
    assert base.process.shift == 12.0
    # Its first two timesteps are one, rounded: it begins at the first all the same.
    check_sample(base, Sample(sampler=None, num_steps=200))


def test_a_hub_that_fails_in_whatever_way_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class TimeoutOfOthersError(Exception):
        pass

    def download(name: str) -> str:
        raise TimeoutOfOthersError

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(UserError, match=r"^'no/where' is no path here.* from the hub \(TimeoutOfOthersError\)"):
        pipeline_folder("no/where")


def test_a_copy_of_what_may_not_be_written_may_be(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "part").mkdir(parents=True)
    for name in ("README.md", "part/config.json", "part/left.bin"):
        (source / name).write_text(name)
        (source / name).chmod(0o444)
    for folder in (source / "part", source):
        folder.chmod(0o555)
    copy_folder(source, tmp_path / "target", lambda at, names: {n for n in names if n.endswith(".bin")})
    found = {p.relative_to(tmp_path / "target").as_posix(): p for p in (tmp_path / "target").rglob("*")}
    assert found.keys() == {"README.md", "part", "part/config.json"}
    assert all(path.stat().st_mode & stat.S_IWUSR for path in (*found.values(), tmp_path / "target"))
    source.chmod(0o755)
    shutil.rmtree(source, ignore_errors=True)


def test_pipelines_that_give_noise_levels_take_a_schedule() -> None:
    kind = skipping(FlowMatchEulerDiscreteScheduler, [0, 2, 3], 4)
    assert {"sigmas", "mu"} <= inspect.signature(kind.set_timesteps).parameters.keys()
    scheduler, stock = kind(use_dynamic_shifting=True), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    levels = np.linspace(1.0, 0.25, 4)
    for each in (scheduler, stock):
        each.set_timesteps(sigmas=levels, mu=0.7)
    assert torch.equal(scheduler.timesteps, stock.timesteps[[0, 2, 3]])
    with pytest.raises(UserError, match="found 3 steps, expected num_inference_steps=4"):
        scheduler.set_timesteps(sigmas=levels[:3], mu=0.7)


def test_a_text_encoder_that_the_index_leaves_out_is_not_there(tmp_path: Path) -> None:
    folder = save_sd3(tmp_path / "sd3")
    assert (folder / "text_encoder_3").is_dir()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    encoders = load_base(str(folder)).encoders
    assert encoders is not None
    assert encoders.text_encoders == ["text_encoder", "text_encoder_2"]


def test_a_negative_prompt_that_nothing_is_guided_away_from_is_refused(tmp_path: Path) -> None:
    encoders = load_base(str(save_flux(tmp_path / "flux"))).encoders
    assert encoders is not None
    with pytest.raises(UserError, match=r"negative_prompt is 'blurry', which .* isn't guided away from: leave it out"):
        texts_to_encode(encoders, ["a cat"], Text(negative_prompt="blurry"))
