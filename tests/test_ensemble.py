"""The ensemble as a module: a stock pipeline draws with it what our sampler draws, with one expert in memory or all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from conftest import WORDS, make_sdxl_unet, make_text_unet, make_unet
from decouple_merge import load_ensemble
from decouple_merge.config import Config, Sample, Text
from decouple_merge.diffusion.routing import RangeRouter
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.provenance import made_from
from decouple_merge.models.base import Base, load_base
from decouple_merge.models.ensemble import TimestepEnsemble
from decouple_merge.models.network import load_network, num_parameters
from decouple_merge.sampling.sampler import Prompts, denoiser, sample_images
from decouple_merge.storage.files import write_json, write_tensors

CPU = torch.device("cpu")
SEEDS = [5, 0, 7]
# Not equal, so that a split into equal parts would be found out.
RANGES = [(0, 3), (3, 25), (25, 40)]


@pytest.fixture
def tiny_base(two_level_base: Path) -> Path:
    return two_level_base


def perturbed(network: nn.Module, seed: int) -> nn.Module:
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=draws)
    return network


@pytest.fixture
def experts(tmp_path: Path) -> list[Path]:
    """Folders of three pixel pipelines."""
    folders = [tmp_path / f"expert-{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        DDPMPipeline(perturbed(make_unet(), i), DDPMScheduler(num_train_timesteps=40)).save_pretrained(folder)
    return folders


@pytest.fixture
def text_experts(tiny_text_base: Path, tmp_path: Path) -> list[Path]:
    """Folders of three networks for the tiny Stable Diffusion pipeline, in half precision."""
    folders = [tmp_path / f"text-expert-{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        perturbed(make_text_unet(), i).to(torch.float16).save_pretrained(folder)  # type: ignore[operator]
    return folders


def as_pixels(images: Any) -> Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round()


def run_stock(pipeline: Any, *args: Any, **kwargs: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return as_pixels(pipeline(*args, generator=generators, output_type="np", **kwargs).images)


def ours(base: Base, ensemble: TimestepEnsemble, prompts: Prompts | None = None, **settings: Any) -> Tensor:
    drawn = sample_images(denoiser(base, ensemble), base, SEEDS, Sample(batch_size=3, **settings), CPU, prompts=prompts)
    return torch.cat(list(drawn))


@pytest.mark.parametrize("one_resident", [False, True])
@pytest.mark.parametrize("kind", [DDIMPipeline, DDPMPipeline])
def test_stock_pixel_pipelines_draw_the_images_of_our_sampler(
    tiny_base: Path, experts: list[Path], kind: Any, one_resident: bool
) -> None:
    base, ensemble = load_base(str(tiny_base)), load_ensemble(tiny_base, experts, RANGES, one_resident)
    pipeline = kind(base.network, base.pipeline.scheduler)
    alone = run_stock(pipeline, len(SEEDS), num_inference_steps=8)
    pipeline.unet = ensemble
    found = run_stock(pipeline, len(SEEDS), num_inference_steps=8)
    expected = ours(base, load_ensemble(tiny_base, experts, RANGES), sampler=kind.__name__[:4], num_steps=8)
    assert (found - expected).abs().max() <= 1
    assert (found - alone).abs().max() > 20


@pytest.mark.parametrize("one_resident", [False, True])
def test_a_stock_text_to_image_pipeline_draws_the_images_of_our_sampler(
    tiny_text_base: Path, text_experts: list[Path], one_resident: bool
) -> None:
    base = load_base(str(tiny_text_base))
    # The pipeline need not load the network whose place is taken, but then reads no size from it.
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_text_base, unet=None)
    pipeline.unet = load_ensemble(tiny_text_base, text_experts, RANGES, one_resident)
    pipeline.to("cpu")
    size = {"height": 16, "width": 16}
    found = run_stock(pipeline, WORDS[:3], num_inference_steps=4, guidance_scale=3.0, **size)
    prompts = Prompts(base.encoders, WORDS[:3], Text(guidance_scale=3), CPU, first_seed=5)  # type: ignore[arg-type]
    # In our sampler seed s takes prompt s - 5, so 5, 0 and 7 ask for the first, the second and the third.
    expected = ours(base, load_ensemble(tiny_text_base, text_experts, RANGES), prompts, sampler="PNDM", num_steps=4)
    assert found.std() > 20
    assert (found - expected).abs().max() <= 1


def test_a_stock_sdxl_pipeline_draws_the_images_of_our_sampler(tiny_sdxl_base: Path, tmp_path: Path) -> None:
    folders = [tmp_path / f"sdxl-expert-{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        perturbed(make_sdxl_unet(), i).save_pretrained(folder)  # type: ignore[operator]
    base = load_base(str(tiny_sdxl_base))
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_sdxl_base)
    pipeline.unet = load_ensemble(tiny_sdxl_base, folders, RANGES, one_resident=True)
    found = run_stock(pipeline, WORDS[:3], num_inference_steps=4, guidance_scale=3.0)
    prompts = Prompts(base.encoders, WORDS[:3], Text(guidance_scale=3), CPU, first_seed=5)  # type: ignore[arg-type]
    ensemble = load_ensemble(tiny_sdxl_base, folders, RANGES)
    expected = ours(base, ensemble, prompts, sampler="EulerDiscrete", num_steps=4)
    assert found.std() > 20
    assert (found - expected).abs().max() <= 1


def test_one_resident_expert_gives_the_same_bits_as_all(tiny_base: Path, experts: list[Path]) -> None:
    base = load_base(str(tiny_base))
    images = [ours(base, load_ensemble(tiny_base, experts, RANGES, one), num_steps=8) for one in (False, True)]
    assert torch.equal(*images)


def test_an_expert_is_read_only_when_t_comes_into_its_range(
    tiny_base: Path, experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    hold = TimestepEnsemble._hold
    monkeypatch.setattr(TimestepEnsemble, "_hold", lambda self, i: (reads.append(i), hold(self, i)))
    base, ensemble = load_base(str(tiny_base)), load_ensemble(tiny_base, experts, RANGES, one_resident=True)
    ours(base, ensemble, num_steps=20)
    assert reads == [2, 1, 0]
    # Two steps, at 20 and 0, never need the last expert; 0 is the one that is held.
    ours(base, ensemble, num_steps=2)
    assert reads == [2, 1, 0, 1, 0]


def test_one_resident_expert_is_as_many_parameters_as_one_network(tiny_base: Path, experts: list[Path]) -> None:
    num = num_parameters(load_base(str(tiny_base)).network)
    assert num_parameters(load_ensemble(tiny_base, experts, RANGES)) == 3 * num
    assert num_parameters(load_ensemble(tiny_base, experts, RANGES, one_resident=True)) == num


MEASURE = """
import sys
from pathlib import Path
import torch
from decouple_merge import load_ensemble

def resident():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
for one_resident in (True, False):
    ensemble = None
    before, peak = resident(), 0
    ensemble = load_ensemble(sys.argv[1], sys.argv[1:], one_resident=one_resident)
    with torch.no_grad():
        for t in range(39, -1, -5):
            ensemble(torch.zeros(1, 1, 8, 8), t)
            peak = max(peak, resident() - before)
    print(peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_one_expert_where_that_is_asked(tmp_path: Path) -> None:
    folders = [tmp_path / f"wide-{i}" for i in range(4)]
    network = make_unet(block_out_channels=(32, 320))
    for folder in folders:
        DDPMPipeline(network, DDPMScheduler(num_train_timesteps=40)).save_pretrained(folder)
    size = 4 * num_parameters(network)
    # What is freed goes back to the system at once, so that each measurement starts with nothing.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, *map(str, folders)]
    measured = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    one, every = (int(line) / size for line in measured.splitlines())
    # The base that was loaded for its architecture is gone when the first expert runs.
    assert 0.9 < one < 1.5
    assert 3.9 < every < 5


def finished_run(config: Config, folder: Path, weights: list[dict[str, Tensor]]) -> Any:
    plan = prepare(config, folder)
    for i, tensors in enumerate(weights):
        write_tensors(plan.run.expert(i) / "model.safetensors", tensors)
        write_json(plan.run.expert(i) / "expert.json", made_from(f"experts/{i}", plan))
    return plan


@pytest.mark.parametrize("ranges", [None, [(0, 10), (10, 40)]])
def test_a_runs_ensemble_is_the_one_that_the_run_scores(
    tiny_config: Callable[..., Config], experts: list[Path], tmp_path: Path, ranges: Any
) -> None:
    weights = [load_network(e) for e in experts[:2]]
    plan = finished_run(tiny_config(finetune={"ranges": ranges}), tmp_path / "run", weights)
    found = ours(plan.base, load_ensemble(tmp_path / "run"), num_steps=8)
    scored = [
        denoiser(plan.base, load_ensemble(tmp_path / "run", one_resident=True)),
        plan.ensemble(weights, CPU),
    ]
    plan.config = tiny_config(finetune={"ranges": ranges}, sample={"one_resident": True})
    scored.append(plan.ensemble(weights, CPU))
    for model in scored:
        drawn = sample_images(model, plan.base, SEEDS, Sample(num_steps=8, batch_size=3), CPU)
        assert torch.equal(torch.cat(list(drawn)), found)
    assert [(r.low, r.high) for r in load_ensemble(tmp_path / "run").router.ranges] == (ranges or [(0, 20), (20, 40)])


def test_a_run_whose_experts_keep_trunk_projections_is_loaded_with_them(
    tiny_config: Callable[..., Config], experts: list[Path], tmp_path: Path
) -> None:
    weights = []
    for folder in experts[:2]:
        tensors = load_network(folder)
        channels = {"down_blocks.0": 8, "down_blocks.1": 16, "mid_block": 16, "up_blocks.0": 16, "up_blocks.1": 8}
        tensors |= {f"{name}.projection.weight": 2 * torch.eye(num) for name, num in channels.items()}
        weights.append(tensors)
    config = tiny_config(finetune={"projection": {"placement": "trunk"}})
    plan = finished_run(config, tmp_path / "run", weights)
    found = ours(plan.base, load_ensemble(tmp_path / "run", one_resident=True), num_steps=4)
    drawn = sample_images(
        plan.ensemble(weights, CPU),
        plan.base,
        SEEDS,
        Sample(num_steps=4),
        CPU,
    )
    assert torch.equal(found, torch.cat(list(drawn)))


def test_it_answers_what_pipelines_read_of_a_network(tiny_text_base: Path, text_experts: list[Path]) -> None:
    network = UNet2DConditionModel.from_pretrained(tiny_text_base / "unet")
    ensemble = load_ensemble(tiny_text_base, text_experts, RANGES, one_resident=True)
    assert dict(ensemble.config).items() >= {"sample_size": 8, "in_channels": 4, "cross_attention_dim": 16}.items()
    assert (ensemble.in_channels, ensemble.dtype, ensemble.device) == (4, torch.float32, network.device)
    assert ensemble.to(torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(AttributeError, match="add_embedding"):
        _ = ensemble.add_embedding


def test_a_timestep_may_be_a_number_a_tensor_or_a_batch(tiny_base: Path, experts: list[Path]) -> None:
    ensemble, x = load_ensemble(tiny_base, experts, RANGES), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = ensemble.networks[1](x, 24).sample
        for t in (24, 24.5, torch.tensor(24), torch.tensor([24]), torch.tensor([24, 24])):
            other = ensemble.networks[1](x, t).sample
            assert torch.equal(ensemble(x, t).sample, other)
            assert torch.equal(ensemble(x, timestep=t, return_dict=False)[0], other)
        assert torch.equal(ensemble(x, torch.tensor([24, 24])).sample, expected)


@pytest.mark.parametrize("one_resident", [False, True])
def test_each_image_of_a_batch_gets_the_network_of_its_own_t(
    tiny_base: Path, experts: list[Path], one_resident: bool
) -> None:
    ensemble, x = load_ensemble(tiny_base, experts, RANGES, one_resident), torch.randn(3, 1, 8, 8)
    t = torch.tensor([2, 30, 3])
    with torch.no_grad():
        found, plain = ensemble(x, t).sample, ensemble(x, t, return_dict=False)[0]
        alone = [ensemble(x, each).sample[i] for i, each in enumerate(t)]
    assert torch.equal(found, torch.stack(alone))
    assert torch.equal(found, plain)
    with pytest.raises(ValueError, match=r"timesteps \(3, 2\) that ask for 2 networks, expected one for each image"):
        ensemble(x, torch.tensor([[2, 3], [2, 2], [3, 3]]))


def test_a_file_of_another_architecture_is_refused(tiny_base: Path, experts: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    DDPMPipeline(make_unet(layers_per_block=2), DDPMScheduler(num_train_timesteps=40)).save_pretrained(other)
    file = other / "unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"safetensors doesn't fit the base: unknown: down_blocks\.0\.resnets\.1"):
        load_ensemble(tiny_base, [experts[0], file])
    weights, same = [load_network(experts[0]), load_network(other)], make_unet()
    with pytest.raises(ValueError, match="network 1 doesn't fit the base"):
        TimestepEnsemble(
            [same, same], RangeRouter([TimestepRange(0, 20), TimestepRange(20, 40)], 40), torch.Tensor.long, weights
        )


def test_wrong_numbers_of_experts_and_ranges_are_refused(tiny_base: Path, experts: list[Path]) -> None:
    with pytest.raises(ValueError, match="3 models for 2 ranges, expected one each"):
        load_ensemble(tiny_base, experts, [(0, 20), (20, 40)])
    with pytest.raises(ValueError, match=r"no range holds \[20, 21\), expected a partition of \[0, 40\)"):
        load_ensemble(tiny_base, experts, [(0, 20), (21, 30), (30, 40)], one_resident=True)


def test_a_folder_that_is_no_run_is_refused(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match=r"base is not a run folder \(no config.yaml\); give one, or the experts"):
        load_ensemble(tiny_base)


def test_a_run_without_finished_experts_is_refused(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    prepare(tiny_config(), tmp_path / "run")
    with pytest.raises(ValueError, match="experts/0 has no finished expert; run deme finetune first"):
        load_ensemble(tmp_path / "run")
    assert json.loads((tmp_path / "run/manifest.json").read_text())["base"]
