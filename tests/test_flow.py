"""Flow-matching bases: their process, ranges, draws and samplers, on a U-Net whose stock pipeline draws flows too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from conftest import make_unet, save_stable_diffusion
from decouple_merge.config import Config, Finetune, Sample, load_config
from decouple_merge.diffusion.process import Flow
from decouple_merge.diffusion.ranges import cut_ranges, listed_ranges
from decouple_merge.diffusion.routing import RangeRouter
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.experiment import workflow
from decouple_merge.experiment.dry_run import describe
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.pretraining import pretrain
from decouple_merge.models.base import load_base
from decouple_merge.models.ensemble import TimestepEnsemble
from decouple_merge.models.mixture import load_ensemble
from decouple_merge.models.network import new_network
from decouple_merge.models.ranges import ranges_of
from decouple_merge.models.schedulers import make_scheduler
from decouple_merge.sampling.sampler import denoiser, sample_images
from decouple_merge.seeds import generator

SAMPLER = "FlowMatchEulerDiscrete"
CPU = torch.device("cpu")


def save_flow(folder: Path, **scheduler: Any) -> Path:
    pipeline: Any = DDPMPipeline(make_unet(), FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)))
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def flow_base(tmp_path: Path) -> Path:
    """The folder of a tiny flow-matching pipeline of shift 3."""
    return save_flow(tmp_path / "flow-base")


@pytest.fixture
def flow_config(flow_base: Path, tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    def make(**sections: Any) -> Config:
        sample = {"sampler": SAMPLER, "num_steps": 4, **sections.pop("sample", {})}
        return tiny_config(base=str(flow_base), sample=sample, **sections)

    return make


def test_the_stock_pipeline_draws_the_same_images(flow_base: Path) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(flow_base)
    pipeline.set_progress_bar_config(disable=True)
    base = load_base(str(flow_base))
    for seed in (3, 4):
        expected = pipeline(
            num_inference_steps=5, generator=torch.Generator().manual_seed(seed), output_type="np"
        ).images
        model = denoiser(base, base.network)
        found = next(sample_images(model, base, [seed], Sample(sampler=SAMPLER, num_steps=5), CPU))
        assert np.abs(found[0, 0].numpy() - 255 * expected[0, :, :, 0]).max() <= 0.51


def test_a_run_on_a_flow_ends_in_a_stock_pipeline_and_resumes(
    flow_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = flow_config(search={"num_trials": 2, "num_finalists": 0})
    list(workflow.run(config, tmp_path / "run"))
    merged = load_base(str(tmp_path / "run/merged"))
    assert merged.process == Flow(3.0)
    base = load_base(config.base)
    shapes = {key: (value.shape, value.dtype) for key, value in base.network.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in merged.network.state_dict().items()} == shapes
    assert merged.sha256 != base.sha256
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "run/merged")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet = load_ensemble(tmp_path / "run")
    seed, shown = torch.Generator().manual_seed(0), Image.open(tmp_path / "run/samples/ensemble/0.png")
    found = pipeline(generator=seed, num_inference_steps=config.sample.num_steps, output_type="np").images
    assert np.abs(255 * found[0, :, :, 0] - np.asarray(shown)).max() <= 1
    assert load_config(tmp_path / "run/config.yaml") == config


def test_a_dry_run_says_noise_levels_draws_and_steps(flow_config: Callable[..., Config], tmp_path: Path) -> None:
    ranges = {"unit": "sigma", "edges": [0.5, 0.75, 0.9]}
    config = flow_config(finetune={"ranges": ranges}, sample={"num_steps": 20}, search={"num_trials": 20})
    lines = [line for line in describe(config, tmp_path / "run") if "  expert" in line]
    assert len(lines) == 4
    assert "expert 0: σ (or boundary) [0, 0.5), timesteps [0, 500), 13.5% of the training's draws" in lines[0].replace(
        f"{Flow(3.0).share(TimestepRange(0, 500)):.1%}", "13.5%"
    )
    assert "σ (or boundary) [0.9, 1), timesteps [900, 1000)" in lines[3]
    counts = [int(line.split(", ")[-1].split(" ")[0]) for line in lines]
    assert sum(counts) == 20
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_draws_and_the_steps_of_the_sampler_lie_in_the_range_that_is_said(shift: float, tmp_path: Path) -> None:
    base = load_base(str(save_flow(tmp_path / "base", shift=shift)))
    assert base.process == Flow(shift)
    ranges = ranges_of(base, Finetune(num_ranges=4))
    for own in ranges:
        t = base.process.draw(10_000, own, 0.0, generator("flow", int(shift)))
        assert bool(((t >= own.low) & (t < own.high)).all())
    t = base.process.visited(make_scheduler(base, SAMPLER, 1000, None).timesteps)
    counts = [int(((t >= own.low) & (t < own.high)).sum()) for own in ranges]
    # The scheduler shifts its least level a second time, which moves its last steps up.
    assert sum(counts) == 1000
    assert counts == pytest.approx([250] * 4, abs=10)


def test_every_unit_says_the_same_ranges() -> None:
    expected = [TimestepRange(0, 500), TimestepRange(500, 875), TimestepRange(875, 1000)]
    process = Flow(3.0)
    assert cut_ranges(process, "sigma", [0.5, 0.875]) == expected
    assert cut_ranges(process, "boundary", [0.5, 0.875]) == expected
    assert cut_ranges(process, "timestep", [500, 875]) == expected
    assert listed_ranges(process, [(0, 500), (500, 875), (875, 1000)]) == expected


@pytest.mark.parametrize(
    ("unit", "edges"), [("sigma", [0.9, 0.5]), ("sigma", [500]), ("timestep", [0, 500]), ("boundary", [1.0])]
)
def test_edges_that_do_not_rise_between_the_ends_are_refused(unit: str, edges: list[float]) -> None:
    with pytest.raises(ValueError, match=r"finetune.ranges.edges are .*, expected the cuts between ranges, which rise"):
        cut_ranges(Flow(), unit, edges)


def test_a_table_of_timesteps_has_neither_noise_levels_nor_fractions_nor_a_density(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    for finetune, message in (
        (
            {"ranges": {"unit": "sigma", "edges": [0.5]}},
            "unit sigma, which is a flow's, and the base has a table of 40",
        ),
        ({"ranges": [[0, 10.5], [10.5, 40]]}, r"a range is \[0, 10.5\), expected whole timesteps"),
        ({"density": "uniform"}, "density is uniform, which is for flow-matching bases"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(tiny_config(finetune=finetune), tmp_path / "run")
    assert prepare(tiny_config(finetune={"ranges": {"unit": "timestep", "edges": [10]}}), tmp_path / "run").ranges == (
        TimestepRange(0, 10),
        TimestepRange(10, 40),
    )


def test_the_density_of_a_training_is_its_settings(flow_config: Callable[..., Config], tmp_path: Path) -> None:
    assert prepare(flow_config(finetune={"density": "uniform"}), tmp_path / "a").base.process == Flow(3.0, "uniform")
    density = {"name": "logit_normal", "mean": 0.5, "std": 2.0}
    plan = prepare(flow_config(finetune={"density": density}), tmp_path / "b")
    assert plan.base.process == Flow(3.0, "logit_normal", 0.5, 2.0)


def test_the_first_step_is_the_noisiest_experts_and_a_step_on_an_edge_the_upper_ones(flow_base: Path) -> None:
    base = load_base(str(flow_base))
    networks = [new_network(base).requires_grad_(False).eval() for _ in range(2)]
    networks[1].conv_out.bias.fill_(100.0)  # type: ignore[union-attr, operator]
    ranges = [TimestepRange(0, 833.3333), TimestepRange(833.3333, 1000)]
    ensemble = TimestepEnsemble(networks, RangeRouter(ranges, 1000), base.timestep_of)
    x = torch.zeros(1, 1, 8, 8)

    def is_noisiest(t: float) -> bool:
        return float(ensemble(x, torch.tensor(t)).sample.mean()) > 50

    assert [is_noisiest(t) for t in (1000.0, 833.33325, 833.3, 1.0)] == [True, True, False, False]


@pytest.mark.parametrize("sampler", ["UniPCMultistep", "DPMSolverMultistep", "FlowMatchHeunDiscrete"])
def test_other_samplers_share_the_shift_of_the_base(sampler: str, flow_base: Path) -> None:
    base = load_base(str(flow_base))
    scheduler = make_scheduler(base, sampler, 10, None)
    assert scheduler.config.get("shift" if sampler.startswith("Flow") else "flow_shift") == 3.0
    # Halfway of the steps σ is 3/4, not 1/2.
    middle = scheduler.sigmas[len(scheduler.sigmas) // 2]
    assert 0.65 < float(middle) < 0.85
    images = next(sample_images(denoiser(base, base.network), base, [1], Sample(sampler=sampler, num_steps=4), CPU))
    assert images.shape == (1, 1, 8, 8)


def test_a_sampler_of_tables_is_refused_for_a_flow(flow_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DDIMScheduler can't sample a flow, .* FlowMatchEulerDiscreteScheduler"):
        prepare(flow_config(sample={"sampler": "DDIM"}), tmp_path / "run")
    with pytest.raises(ValueError, match="timestep_spacing is leading, and a FlowMatchEulerDiscreteScheduler has none"):
        prepare(flow_config(sample={"timestep_spacing": "leading"}), tmp_path / "run")


def test_a_scheduler_that_the_pipeline_does_not_draw_with_is_refused(tmp_path: Path) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(save_stable_diffusion(tmp_path / "text"))
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "text/scheduler")
    index = tmp_path / "text/model_index.json"
    index.write_text(index.read_text().replace(type(pipeline.scheduler).__name__, "FlowMatchEulerDiscreteScheduler"))
    with pytest.raises(ValueError, match="for flow matching, and no StableDiffusionPipeline draws with one"):
        load_base(str(tmp_path / "text"))
    with pytest.raises(ValueError, match="stochastic_sampling, which is not supported"):
        load_base(str(save_flow(tmp_path / "noisy", stochastic_sampling=True)))
    with pytest.raises(ValueError, match="use_dynamic_shifting, and its pipeline tells it no number of tokens"):
        load_base(str(save_flow(tmp_path / "dynamic", use_dynamic_shifting=True)))


def test_a_flow_base_is_made_from_nothing(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    settings = {
        "model": {k: v for k, v in make_unet().config.items() if not k.startswith("_")},
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
        "num_updates": 4,
        "batch_size": 4,
        "validate_every": 2,
        "tracker": "none",
        "density": "uniform",
    }
    config = Config.model_validate(tiny_config(sample={"sampler": SAMPLER}).model_dump() | {"pretrain": settings})
    list(pretrain(config, tmp_path / "run"))
    base = load_base(str(tmp_path / "run/pipeline"))
    assert base.process == Flow(1.0)
    assert (
        type(DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline").scheduler).__name__ == f"{SAMPLER}Scheduler"
    )
    wrong = config.model_copy(
        update={"pretrain": config.pretrain.model_copy(update={"scheduler": {"_class_name": "X"}})}
    )  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="_class_name is 'X', expected one of DDPMScheduler, FlowMatchEuler"):
        list(pretrain(wrong, tmp_path / "other"))
