"""Bases in, stock pipelines out: round trips, the paper's architectures, the shipped configs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import make_unet
from decouple_merge.config import Sample, load_config
from decouple_merge.config.study import load_study
from decouple_merge.experiment import finetuning
from decouple_merge.experiment.plan import prepare
from decouple_merge.models.base import Base, load_base, tensors_sha256
from decouple_merge.models.export import export_pipeline
from decouple_merge.models.network import load_network, new_network
from decouple_merge.sampling.sampler import denoiser, sample_images
from decouple_merge.storage.shipped import find_model

CONFIGS = Path(__file__).parents[1] / "configs"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# The block structure of the paper's bases, at small widths and sizes.
CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
LSUN = CIFAR10 | {
    "block_out_channels": (8, 8, 16, 16, 32, 32),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
PAPER = {"cifar10": CIFAR10, "lsun-church": LSUN, "lsun-bedroom": LSUN}


@pytest.fixture
def tiny_base(two_level_base: Path) -> Path:
    return two_level_base


def save_base(folder: Path, unet: dict[str, Any], **scheduler: Any) -> Path:
    DDPMPipeline(make_unet(**unet), DDPMScheduler(**{"num_train_timesteps": 40, **scheduler})).save_pretrained(folder)
    return folder


def perturbed(base: Base) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {k: v + 0.05 * torch.randn(v.shape, generator=draws) for k, v in base.network.state_dict().items()}


def shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(path, framework="pt") as file:
        return {
            key: (file.get_slice(key).get_dtype(), tuple(file.get_slice(key).get_shape()))
            for key in file.keys()  # noqa: SIM118 - a safetensors file is no dict
        }


def test_export_has_exactly_the_bases_files_keys_shapes_and_dtypes(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base))
    weights = perturbed(base)
    export_pipeline(base, weights, tmp_path / "out", "card", {"weights": [1.0]})
    assert shapes(tmp_path / "out" / WEIGHTS) == shapes(tiny_base / WEIGHTS)
    assert all(torch.equal(v, weights[k]) for k, v in load_file(tmp_path / "out" / WEIGHTS).items())

    def files(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    assert files(tmp_path / "out") - files(tiny_base) == {"README.md", "merge.json"}
    assert files(tiny_base) <= files(tmp_path / "out")
    assert json.loads((tmp_path / "out/merge.json").read_text()) == {"weights": [1.0]}
    index = [json.loads((f / "model_index.json").read_text()) for f in (tiny_base, tmp_path / "out")]
    assert index[0] == index[1]
    schedulers = [(f / "scheduler/scheduler_config.json").read_text() for f in (tiny_base, tmp_path / "out")]
    assert schedulers[0] == schedulers[1]


def test_exporting_the_bases_own_weights_gives_its_bytes_and_changes_nothing_of_it(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = load_base(str(tiny_base))
    export_pipeline(base, base.network.state_dict(), tmp_path / "same", None, None)
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (tiny_base / WEIGHTS).read_bytes()
    export_pipeline(base, perturbed(base), tmp_path / "other", None, None)
    assert tensors_sha256(base.network.state_dict()) == base.sha256
    assert load_base(str(tmp_path / "same")).sha256 == base.sha256 != load_base(str(tmp_path / "other")).sha256
    assert base.pipeline.unet is base.network


def test_equal_exports_write_equal_bytes(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base))
    for name in ("a", "b"):
        export_pipeline(base, perturbed(base), tmp_path / name, "card", {"weights": [1.0]})
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) >= 6
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_export_keeps_the_dtype_of_a_half_precision_base(dtype: torch.dtype, tmp_path: Path) -> None:
    DDPMPipeline(make_unet().to(dtype), DDPMScheduler(num_train_timesteps=40)).save_pretrained(tmp_path / "half")
    base = load_base(str(tmp_path / "half"))
    export_pipeline(base, base.network.state_dict(), tmp_path / "out", None, None)
    assert shapes(tmp_path / "out" / WEIGHTS) == shapes(tmp_path / "half" / WEIGHTS)


def test_export_loads_and_samples_where_our_package_is_not_installed(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base))
    export_pipeline(base, perturbed(base), tmp_path / "out", "card", {"weights": [1.0]})
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "decouple_merge":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import numpy, torch
from diffusers import DDIMScheduler, DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
generators = [torch.Generator().manual_seed(s) for s in range(3)]
images = pipeline(batch_size=3, generator=generators, num_inference_steps=4, output_type="np").images
numpy.save(sys.argv[2], images)
assert not any(m.startswith("decouple_merge") for m in sys.modules)
print(type(pipeline).__name__)
"""
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "out"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "DDPMPipeline"
    exported = load_base(str(tmp_path / "out"))
    settings = Sample(num_steps=4)
    (ours,) = sample_images(denoiser(exported, exported.network), exported, [0, 1, 2], settings, torch.device("cpu"))
    theirs = (np.load(tmp_path / "images.npy").transpose(0, 3, 1, 2) * 255).round()
    assert abs(theirs - ours.numpy()).max() <= 1


@pytest.mark.parametrize("placement", ["none", "folded", "trunk"])
def test_networks_are_made_without_touching_the_global_random_state(placement: str, tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    state = torch.get_rng_state()
    network = new_network(base, placement)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 1, 8, 8)
    network.eval()
    assert torch.equal(network(x, 3, return_dict=False)[0], base.network(x, 3, return_dict=False)[0])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_schedule_is_the_bases_own(tmp_path: Path, prediction_type: str) -> None:
    scheduler = {"num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}
    base = load_base(str(save_base(tmp_path / "base", {}, **scheduler)))
    assert base.process.prediction_type == prediction_type
    assert base.num_train_timesteps == 50
    torch.testing.assert_close(base.process.alphas_cumprod, DDPMScheduler(**scheduler).alphas_cumprod)


def test_a_ddim_pipeline_is_a_base_and_stays_one(tmp_path: Path) -> None:
    DDIMPipeline(make_unet(), DDIMScheduler(num_train_timesteps=40)).save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    export_pipeline(base, base.network.state_dict(), tmp_path / "out", None, None)
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "out")) is DDIMPipeline


def test_trunk_projections_are_written_beside_the_network_and_read_back(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base))
    weights = dict(new_network(base, "trunk").state_dict())
    export_pipeline(base, weights, tmp_path / "out", None, None)
    assert shapes(tmp_path / "out" / WEIGHTS) == shapes(tiny_base / WEIGHTS)
    assert len(load_file(tmp_path / "out/projections.safetensors")) == 5
    read = load_network(tmp_path / "out")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[k], v) for k, v in weights.items())


def test_the_hash_tells_names_shapes_dtypes_and_values_apart() -> None:
    tensors = [
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(())},
        {"a": -torch.zeros(2, 3)},
    ]
    assert len({tensors_sha256(t) for t in tensors}) == 6
    assert tensors_sha256({"a": torch.ones(2), "b": torch.zeros(1)}) == tensors_sha256(
        {"b": torch.zeros(1), "a": torch.ones(2)}
    )
    assert tensors_sha256({"a": torch.arange(6.0).view(2, 3).T}) == tensors_sha256(
        {"a": torch.arange(6.0).view(2, 3).T.contiguous()}
    )


@pytest.mark.parametrize("name", PAPER)
def test_a_model_of_the_papers_block_structure_is_a_base_that_samples(name: str, tmp_path: Path) -> None:
    base = load_base(str(save_base(tmp_path / "base", PAPER[name] | {"norm_num_groups": 4})))
    (images,) = sample_images(denoiser(base, base.network), base, [0, 1], Sample(num_steps=2), torch.device("cpu"))
    assert images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    if path.stem.startswith("study-"):
        assert load_study(path).arms
        return
    config = load_config(path)
    assert (config.pretrain is not None) == path.stem.endswith("-base")


@pytest.mark.parametrize("name", PAPER)
def test_shipped_configs_hold_the_papers_settings(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    settings = config.finetune
    cifar = name == "cifar10"
    assert settings.num_ranges == 4
    assert settings.num_updates == 20_000
    assert settings.global_prob == (0.4 if cifar else 0.3)
    assert settings.learning_rate == (2e-4 if cifar else 5e-5)
    assert (settings.batch_size, settings.accumulation) == ((64, 1) if cifar else (16, 4))
    assert settings.schedule == "constant"
    assert settings.betas == (0.95, 0.999)
    assert settings.consistency_weight == 1
    assert settings.antithetic
    assert (config.sample.sampler, config.sample.num_steps) == ("DDIM", 50)
    assert config.evaluate.num_images == 50_000
    expected = {
        "cifar10": "ddpm-cifar10-32",
        "lsun-church": "ddpm-ema-church-256",
        "lsun-bedroom": "ddpm-ema-bedroom-256",
    }
    assert config.base == f"google/{expected[name]}"


@pytest.mark.parametrize(
    ("name", "config", "most"),
    [
        ("fashion-ddpm", "fashion.yaml", 10e6),
        ("fashion-flow", "fashion-flow.yaml", 10e6),
        ("fashion-ddpm-large", "fashion-large.yaml", 10e6),
        ("emoji-sd", "emoji.yaml", 25e6),
    ],
)
def test_a_shipped_base_is_a_stock_pipeline_of_the_size_that_its_card_says(name: str, config: str, most: float) -> None:
    folder = CONFIGS.parent / "models" / name
    assert load_config(CONFIGS / config).base == name
    assert find_model(name) == folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < most
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    unet: Any = DiffusionPipeline.from_pretrained(folder).unet
    assert f"{unet.num_parameters():,}" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_stable_diffusion_config_holds_the_papers_settings() -> None:
    config = load_config(CONFIGS / "sd14.yaml")
    settings = config.finetune
    assert config.base == "CompVis/stable-diffusion-v1-4"
    assert (settings.num_ranges, settings.global_prob, settings.num_updates) == (4, 0.3, 20_000)
    assert (settings.batch_size, settings.accumulation, settings.learning_rate) == (16, 4, 5e-5)
    assert (config.sample.sampler, config.sample.num_steps, config.text.guidance_scale) == ("PNDM", 50, 7.5)
    assert config.evaluate.num_images == 30_000


@pytest.mark.parametrize("name", PAPER)
def test_shipped_paper_configs_finetune_a_tiny_model_of_their_structure(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", PAPER[name] | {"norm_num_groups": 4})
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    tiny = {
        "base": str(base),
        "num_processes": 1,
        "data.source": str(tmp_path / "images.npz"),
        "data.num_held_out": 4,
        "data.num_workers": 0,
        "finetune.num_updates": 1,
        "finetune.batch_size": 2,
        "finetune.mixed_precision": "fp32",
        "finetune.tracker": "none",
        "sample.num_steps": 2,
        "sample.precision": "fp32",
        "evaluate.metrics": ["fd_effnetlite0"],
        "evaluate.inception_weights": None,
        "search.metric": "fd_effnetlite0",
    }
    overrides = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for key, value in tiny.items()
    ]
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    records = list(finetuning.finetune_experts(prepare(config, tmp_path / "run"), 2))
    assert [r.update for r in records if not isinstance(r, str)] == [1]
    expert = load_file(tmp_path / "run/experts/2/model.safetensors")
    start = load_file(base / WEIGHTS)
    assert {k: v.shape for k, v in expert.items()} == {k: v.shape for k, v in start.items()}
    assert any(not torch.equal(expert[k], v) for k, v in start.items())
