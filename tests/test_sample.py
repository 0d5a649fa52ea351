"""Sampling: image i depends on seed i alone, DDIM is diffusers' own, the ensemble dispatches on t."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor, nn

from conftest import make_unet
from decouple_merge.config import Config, Sample
from decouple_merge.data.images import to_model
from decouple_merge.diffusion.routing import RangeRouter
from decouple_merge.diffusion.timesteps import TimestepRange, range_index
from decouple_merge.models.base import Base, load_base
from decouple_merge.models.ensemble import TimestepEnsemble
from decouple_merge.sampling.sampler import Denoiser, denoiser, sample_images, sampling_copy

CPU = torch.device("cpu")
SEEDS = [5, 2**31, 0, 17, 3, 99, 1]
SAMPLERS = ["DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "PNDM", "HeunDiscrete",
            "UniPCMultistep"]  # fmt: skip


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base))


def draw(base: Base, seeds: list[int], model: Denoiser | None = None, **settings: Any) -> Tensor:
    settings = {"num_steps": 4, "batch_size": 4, **settings}
    batches = sample_images(model or denoiser(base, base.network), base, seeds, Sample(**settings), CPU)
    return torch.cat(list(batches))


def with_scheduler(folder: Path, **scheduler: Any) -> Base:
    DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=40, **scheduler)).save_pretrained(folder)
    return load_base(str(folder))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_come_in_the_order_of_their_seeds_whatever_that_is(base: Base, sampler: str) -> None:
    images = draw(base, SEEDS, sampler=sampler)
    assert images.shape == (7, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert len({tuple(i.flatten().tolist()) for i in images}) == 7
    assert torch.equal(draw(base, SEEDS[::-1], sampler=sampler).flip(0), images)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_moves_no_value_by_more_than_rounding(base: Base, sampler: str, batch_size: int) -> None:
    expected = draw(base, SEEDS, sampler=sampler)
    found = draw(base, SEEDS, sampler=sampler, batch_size=batch_size)
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("sampler", ["DDIM", "DDPM"])
def test_appended_seeds_change_no_bit_of_earlier_images(base: Base, sampler: str) -> None:
    expected = draw(base, SEEDS[:5], sampler=sampler)
    assert torch.equal(draw(base, SEEDS, sampler=sampler)[:5], expected)


def test_images_do_not_depend_on_the_global_random_state(base: Base) -> None:
    torch.manual_seed(1)
    first = draw(base, SEEDS, sampler="DDPM")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draw(base, SEEDS, sampler="DDPM"), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_steps", [1, 5, 40])
def test_ddim_is_diffusers_own_pipeline(base: Base, num_steps: int) -> None:
    pipeline = DDIMPipeline(base.network, DDIMScheduler.from_config(base.pipeline.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    drawn = pipeline(len(SEEDS), generators, num_inference_steps=num_steps, output_type="np").images
    expected = (torch.from_numpy(drawn).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)
    found = draw(base, SEEDS, num_steps=num_steps, batch_size=7)
    assert expected.float().std() > 20
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("sampler", ["DDIM", "DDPM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete"])
def test_the_network_is_called_once_a_step_and_batch(base: Base, sampler: str) -> None:
    shapes: list[tuple[int, ...]] = []

    def model(x: Tensor, t: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return denoiser(base, base.network)(x, t)

    draw(base, SEEDS, model, sampler=sampler, num_steps=6, batch_size=4)
    # Seven images are two batches, the second of them filled up.
    assert shapes == [(4, 1, 8, 8)] * 12


def test_few_images_make_no_larger_batch_than_needed(base: Base) -> None:
    sizes: list[int] = []

    def model(x: Tensor, t: Any) -> Tensor:
        sizes.append(len(x))
        return denoiser(base, base.network)(x, t)

    draw(base, SEEDS[:3], model, batch_size=256)
    assert set(sizes) == {3}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sampler", ["DDIM", "DDPM"])
def test_an_oracle_of_any_prediction_type_yields_its_image(tmp_path: Path, prediction_type: str, sampler: str) -> None:
    base = with_scheduler(tmp_path / "oracle", prediction_type=prediction_type)
    pixels = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x0 = to_model(pixels)

    def oracle(x: Tensor, t: Any) -> Tensor:
        signal = float(base.process.alphas_cumprod[int(t)])
        noise = (x - math.sqrt(signal) * x0) / math.sqrt(1 - signal)
        velocity = math.sqrt(signal) * noise - math.sqrt(1 - signal) * x0
        return {"epsilon": noise, "sample": x0.expand_as(x), "v_prediction": velocity}[prediction_type]

    images = draw(base, SEEDS, oracle, sampler=sampler, num_steps=10)
    assert (images.int() - pixels.int()).abs().max() <= 1


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_bases_of_other_prediction_types_are_diffusers_own_too(tmp_path: Path, prediction_type: str) -> None:
    base = with_scheduler(tmp_path / "other", prediction_type=prediction_type)
    pipeline = DDIMPipeline(base.network, DDIMScheduler.from_config(base.pipeline.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    drawn = pipeline(len(SEEDS), generators, num_inference_steps=5, output_type="np").images
    expected = (torch.from_numpy(drawn).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)
    assert (draw(base, SEEDS, num_steps=5).int() - expected.int()).abs().max() <= 1


def test_timestep_spacing_of_the_settings_overrides_the_bases(base: Base) -> None:
    visited: dict[str | None, list[int]] = {}
    for spacing in (None, "leading", "trailing", "linspace"):
        visited[spacing] = []

        def model(x: Tensor, t: Any, seen: list[int] = visited[spacing]) -> Tensor:
            seen.append(int(t))
            return denoiser(base, base.network)(x, t)

        draw(base, [0], model, timestep_spacing=spacing)
    assert visited[None] == visited["leading"] == [30, 20, 10, 0]
    assert visited["trailing"] == [39, 29, 19, 9]
    assert visited["linspace"] == [39, 26, 13, 0]


class Recorder(nn.Module):
    """An expert that notes the timesteps it is called for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[float] = []

    def forward(self, x: Tensor, t: Any, return_dict: bool = False) -> Any:
        self.seen.append(float(t))
        return self.network(x, t, return_dict=return_dict)


RANGES = [TimestepRange(0, 3), TimestepRange(3, 25), TimestepRange(25, 40)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [4, 7])
def test_the_ensemble_runs_the_expert_whose_range_holds_t(base: Base, sampler: str, num_steps: int) -> None:
    single = Recorder(base.network)
    draw(base, [0], denoiser(base, single), sampler=sampler, num_steps=num_steps)
    experts = [Recorder(base.network) for _ in RANGES]
    draw(
        base,
        [0],
        denoiser(base, TimestepEnsemble(experts, RangeRouter(RANGES, 40), base.timestep_of)),
        sampler=sampler,
        num_steps=num_steps,
    )
    for index, expert in enumerate(experts):
        assert expert.seen == [t for t in single.seen if RANGES[index].low <= int(t) < RANGES[index].high]
    assert sum(len(e.seen) for e in experts) == len(single.seen) >= num_steps


def test_the_ensemble_does_not_dispatch_on_the_steps_index(base: Base) -> None:
    """Two steps visit t = 20 and 0: the middle and the first expert, and never the last."""
    experts = [Recorder(base.network) for _ in RANGES]
    draw(base, [0], denoiser(base, TimestepEnsemble(experts, RangeRouter(RANGES, 40), base.timestep_of)), num_steps=2)
    assert [e.seen for e in experts] == [[0.0], [20.0], []]


def test_different_experts_make_a_different_image(base: Base) -> None:
    torch.manual_seed(1)
    other = make_unet()
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1 * torch.randn_like(p)
    both = TimestepEnsemble(
        [base.network, other], RangeRouter([TimestepRange(0, 20), TimestepRange(20, 40)], 40), base.timestep_of
    )
    mixed = draw(base, SEEDS, denoiser(base, both))
    assert not torch.equal(mixed, draw(base, SEEDS))
    assert not torch.equal(mixed, draw(base, SEEDS, denoiser(base, other)))


@pytest.mark.parametrize("sampler", ["DDIM", "DDPM", "HeunDiscrete"])
def test_an_ensemble_of_equal_experts_is_the_single_model_bit_for_bit(base: Base, sampler: str) -> None:
    copies = [sampling_copy(base.network, Sample(), CPU) for _ in RANGES]
    found = draw(
        base,
        SEEDS,
        denoiser(base, TimestepEnsemble(copies, RangeRouter(RANGES, 40), base.timestep_of)),
        sampler=sampler,
    )
    assert torch.equal(found, draw(base, SEEDS, sampler=sampler))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([TimestepRange(0, 20), TimestepRange(21, 40)], r"range 1 starts at 21, expected 20"),
        ([TimestepRange(0, 20), TimestepRange(19, 40)], r"range 1 starts at 19, expected 20"),
        ([TimestepRange(0, 20), TimestepRange(20, 39)], r"ends at 39, expected 40"),
        ([TimestepRange(0, 20), TimestepRange(20, 41)], r"range 1 is \[20, 41\), expected a non-empty part"),
        ([TimestepRange(20, 40), TimestepRange(0, 20)], r"range 0 starts at 20, expected 0"),
        ([TimestepRange(0, 40)], r"2 networks for the 1 of the router"),
    ],
)
def test_ranges_that_are_no_partition_are_refused(base: Base, ranges: list[TimestepRange], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimestepEnsemble([base.network, base.network], RangeRouter(ranges, 40), base.timestep_of)


def test_a_timestep_outside_every_range_is_named() -> None:
    with pytest.raises(ValueError, match="timestep 40 is in none of the ranges"):
        range_index(RANGES, 40)


def test_sampling_copies_leave_the_network_alone(base: Base) -> None:
    network = base.network.train()
    copied = sampling_copy(network, Sample(precision="bf16"), CPU)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network.training
    assert not copied.training


def test_bf16_images_are_near_float32s_and_the_scheduler_stays_in_float32(base: Base) -> None:
    copied = sampling_copy(base.network, Sample(precision="bf16"), CPU)
    dtypes: set[torch.dtype] = set()

    def model(x: Tensor, t: Any) -> Tensor:
        prediction = denoiser(base, copied)(x, t)
        dtypes.update((x.dtype, prediction.dtype))
        return prediction

    found, expected = draw(base, SEEDS, model), draw(base, SEEDS)
    assert dtypes == {torch.float32}
    assert 0 < (found.float() - expected.float()).abs().mean() < 4


def test_an_unknown_sampler_is_refused_with_the_known_ones(base: Base) -> None:
    with pytest.raises(ValueError, match=r"sampler is 'Ddim', expected one of .*DDIM, .*UniPCMultistep"):
        draw(base, [0], sampler="Ddim")


def test_more_steps_than_timesteps_are_refused(base: Base) -> None:
    with pytest.raises(ValueError, match="sampler DDIMScheduler with 41 steps"):
        draw(base, [0], num_steps=41)


def test_search_seeds_that_alias_report_seeds_are_refused() -> None:
    """Torch's CPU generator keeps 32 bits of a seed, so 2³² draws the noise of 0 again."""
    first, second = (torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (0, 2**32))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="seed"):
        Config.model_validate({"search": {"first_seed": 2**32}})
