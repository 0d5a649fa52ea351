"""Which sampler draws where none is named, and whether its steps fall where ranges were cut for."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from decouple_merge.config import Config, Protocol, Sample, Text
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.experiment.dry_run import describe
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.models.base import load_base
from decouple_merge.models.families.sd3 import save_sd3
from decouple_merge.models.schedulers import make_scheduler, sampler_of
from decouple_merge.sampling.folder import sample_model
from decouple_merge.sampling.shares import steps_of, unlike_shares

QUARTERS = [TimestepRange(low, low + 250) for low in range(0, 1000, 250)]


def test_a_flow_is_drawn_by_its_own_sampler_and_others_by_ddim(tiny_base: Path, tmp_path: Path) -> None:
    flow, vp = load_base(str(save_sd3(tmp_path / "sd3"))), load_base(str(tiny_base))
    assert sampler_of(flow, None) == "FlowMatchEulerDiscrete"
    assert sampler_of(vp, None) == "DDIM"
    assert sampler_of(flow, "UniPCMultistep") == "UniPCMultistep"
    assert isinstance(make_scheduler(flow, None, 4, None), FlowMatchEulerDiscreteScheduler)


def test_a_table_of_timesteps_refuses_the_samplers_of_flows(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="EulerDiscreteScheduler is for flow matching, and the base has a table"):
        make_scheduler(load_base(str(tiny_base)), "FlowMatchEulerDiscrete", 4, None)


def test_a_run_and_deme_sample_need_no_sampler_of_a_flow(text_config: Callable[..., Config], tmp_path: Path) -> None:
    config = text_config(base=str(save_sd3(tmp_path / "sd3")), sample={"sampler": None})
    lines = list(describe(config, tmp_path / "run"))
    assert any("images a model, FlowMatchEulerDiscrete 3" in line for line in lines)
    (tmp_path / "prompts.txt").write_text("red cat\n")
    text = Text(prompts=tmp_path / "prompts.txt", guidance_scale=1)
    assert sample_model(str(tmp_path / "sd3"), tmp_path / "out", settings=Sample(num_steps=2), text=text) == [0]


@pytest.mark.parametrize("sampler", [None, "UniPCMultistep", "DPMSolverMultistep", "FlowMatchHeunDiscrete"])
@pytest.mark.parametrize("num_steps", [4, 10, 50])
def test_the_samplers_of_a_flow_share_their_steps_as_ranges_are_cut(
    sampler: str | None, num_steps: int, tmp_path: Path
) -> None:
    base = load_base(str(save_sd3(tmp_path / "sd3")))
    settings = Sample(sampler=sampler, num_steps=num_steps)
    ranges = base.process.split(4)
    assert list(unlike_shares(base, ranges, settings)) == []
    # Equal quarters of σ aren't equal shares, and are cut for what they are.
    assert list(unlike_shares(base, QUARTERS, settings)) == []


def test_steps_that_fall_elsewhere_than_the_schedule_says_are_told(tmp_path: Path) -> None:
    base = load_base(str(save_sd3(tmp_path / "sd3", use_karras_sigmas=True)))
    settings = Sample(num_steps=40)
    counts = steps_of(base, base.process.split(4), settings)
    assert max(counts) > 21
    (line,) = unlike_shares(base, base.process.split(4), settings)
    assert f"has {max(counts)} of 40 steps, 10 expected" in line


def test_another_shift_than_in_training_is_told_or_refused_before_images_are_drawn(
    text_config: Callable[..., Config], tmp_path: Path
) -> None:
    folder = save_sd3(tmp_path / "sd3")

    def finetuned(name: str, **ranges: object) -> Path:
        config = text_config(
            base=str(folder),
            finetune={"num_updates": 1, "baseline": False, "consistency_weight": 0.0, **ranges},
            sample={"sampler": None, "num_steps": 2},
            text={"guidance_scale": 1.0},
            search={"num_trials": 1, "num_images": 2, "gradient_batches": 0, "num_finalists": 0},
            evaluate={"num_images": 2, "num_seed_sets": 1, "num_sample_images": 1, "metrics": ["kd_effnetlite0"]},
        )
        list(finetune_experts(prepare(config, tmp_path / name)))
        return tmp_path / name

    cut, default = finetuned("cut", ranges={"unit": "sigma", "edges": [0.9]}), finetuned("default")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift": 20.0}))
    lines: list[str] = []
    settings = Sample(num_steps=40)
    assert sample_model(str(cut), tmp_path / "out", 1, settings=settings, say=lines.append) == [0]
    # At shift 3 a quarter of the steps is above σ = 0.9, at shift 20 two thirds.
    assert len(lines) == 1
    assert re.search(r"\[900, 1000\) has 2[78] of 40 steps, 10 expected", lines[0])
    scoring = Protocol(metrics=["kd_effnetlite0"], num_images=4, sample=settings)
    assert next(evaluate_model(str(cut), None, scoring)) == lines[0]
    message = r"was finetuned on the timesteps \[0, 750\), and its range is \[0, 952\.381\)"
    with pytest.raises(ValueError, match=message):
        sample_model(str(default), tmp_path / "other", 1, settings=settings)
