"""Images drawn and scored while a model is trained: the training is the same with them and without."""

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from rich.console import Console

from conftest import make_unet
from decouple_merge.cli import progress
from decouple_merge.config import Config, Evaluate, Finetune, Search
from decouple_merge.diffusion.routing import RangeRouter
from decouple_merge.evaluation.score import score
from decouple_merge.experiment import pretraining, trainings
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.planned import Plan
from decouple_merge.experiment.watch import compared_of, train_watched, training_distance
from decouple_merge.models.ensemble import TimestepEnsemble
from decouple_merge.sampling.sampler import denoiser, sample_images
from decouple_merge.storage.files import read_records, read_tensors
from decouple_merge.training.records import StepRecord
from decouple_merge.training.trainer import Trainer

CPU = torch.device("cpu")
MakeConfig = Callable[..., Config]
WATCHED = {"distance": {"every": 3, "num_images": 5, "num_steps": 2}}


pytestmark = pytest.mark.usefixtures("every_record")


def expert(plan: Plan) -> Iterator[StepRecord]:
    """Train the first expert as a run does."""
    yield from train_watched(plan, trainings.expert_task(plan, 0), plan.config.finetune, plan.run.expert(0))


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora": {"rank": 2}, "projection": {"placement": "none"}}],
    ids=["folded", "lora"],
)
def test_watched_trainings_have_the_weights_average_and_log_of_others_also_when_resumed(
    changes: dict[str, Any], tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dropout draws from the global random state.
    DDPMPipeline(make_unet(dropout=0.2), DDPMScheduler(num_train_timesteps=40)).save_pretrained(tmp_path / "dropout")
    trainers: list[Trainer] = []
    keep = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *a: trainers.append(self) or keep(self, *a))
    plans = {
        name: prepare(tiny_config(base=str(tmp_path / "dropout"), finetune=changes | watched), tmp_path / name)
        for name, watched in (("off", {}), ("on", WATCHED), ("cut", WATCHED))
    }
    list(expert(plans["off"]))
    records = list(expert(plans["on"]))
    assert [r.update for r in records if r.distance is not None] == [3, 6]
    # Checkpoints are at 2 and 4: this training is killed after a measurement, and measures it once more.
    stopped = expert(plans["cut"])
    assert len(list(itertools.islice(stopped, 3))) == 3
    stopped.close()  # type: ignore[attr-defined]
    list(expert(plans["cut"]))
    off, on, _, cut = trainers
    for other in (on, cut):
        for ours, theirs in ((off.parameters, other.parameters), (off.ema.values, other.ema.values)):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    folders = {name: plan.run.expert(0) for name, plan in plans.items()}
    logs = {name: read_records(folder / "log.jsonl") for name, folder in folders.items()}
    assert logs["on"] == logs["cut"]
    assert [{k: v for k, v in r.items() if k != "distance"} for r in logs["on"]] == logs["off"]
    assert [r["distance"] for r in logs["on"]] == [r.distance for r in records if r.distance is not None]
    results = [(folder / "model.safetensors").read_bytes() for folder in folders.values()]
    assert results[0] == results[1] == results[2]


def test_measuring_changes_neither_weights_nor_random_state(tiny_config: MakeConfig, tmp_path: Path) -> None:
    plan = prepare(tiny_config(finetune=WATCHED), tmp_path / "run")
    weights = {k: v.clone() for k, v in plan.base.network.state_dict().items()}
    state = torch.get_rng_state()
    distance = training_distance(plan, plan.ranges[0], plan.config.finetune.distance)  # type: ignore[arg-type]
    assert distance(weights) == distance(weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in plan.base.network.state_dict().items())


def test_the_distance_is_that_of_the_saved_expert_on_its_range_and_the_base_on_the_other(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    plan = prepare(tiny_config(finetune=WATCHED | {"learning_rate": 1e-2}), tmp_path / "run")
    records = list(expert(plan))
    trained = type(plan.base.network).from_config(plan.base.network.config)
    trained.load_state_dict(read_tensors(plan.run.expert(0) / "model.safetensors")[0])
    router = RangeRouter(plan.ranges, 40)
    model = denoiser(plan.base, TimestepEnsemble([trained.eval(), plan.base.network.eval()], router, torch.Tensor.long))
    compared = compared_of(plan, "effnetlite0")

    def scored(model: Any) -> float:
        batches = sample_images(model, plan.base, plan.config.distance_seeds, plan.config.sample, CPU, num_steps=2)
        return score(batches, ["kd_effnetlite0"], [compared])["kd_effnetlite0"]

    assert records[-1].distance == pytest.approx(scored(model), rel=1e-6)
    assert records[-1].distance != pytest.approx(scored(denoiser(plan.base, trained)), rel=1e-3)
    assert records[-1].distance != pytest.approx(scored(denoiser(plan.base, plan.base.network)), rel=1e-3)


def test_a_pretraining_is_watched_too_and_shows_it(tiny_config: MakeConfig, tmp_path: Path) -> None:
    settings = {"num_updates": 4, "batch_size": 4, "validate_every": 2, "tracker": "tensorboard"}
    model = {k: v for k, v in make_unet().config.items() if not k.startswith("_")}
    scheduler = {"num_train_timesteps": 40}
    pretrain = settings | {"model": model, "scheduler": scheduler, "distance": WATCHED["distance"] | {"every": 2}}
    config = Config.model_validate(tiny_config().model_dump() | {"pretrain": pretrain})
    events = list(pretraining.pretrain(config, tmp_path / "run"))
    assert [e.update for e in events if isinstance(e, StepRecord) and e.distance is not None] == [2, 4]
    assert all("distance" in r for r in read_records(tmp_path / "run/training/log.jsonl"))
    shown = io.StringIO()
    progress.show(events, Console(file=shown, width=200))
    assert shown.getvalue().count("  distance ") == 2


def test_seeds_lie_behind_the_searchs_and_not_among_those_reported() -> None:
    watched, search = Finetune(distance={"num_images": 20}), Search(num_images=10, num_final_images=5, first_seed=50)
    config = Config(finetune=watched, search=search, evaluate=Evaluate(num_images=10, first_seed=90))
    assert (config.all_search_seeds, config.distance_seeds) == (range(50, 65), range(65, 85))
    assert len(Config().distance_seeds) == 0
    with pytest.raises(ValueError, match=r"search seeds \[50, 85\) overlap report seeds \[80, "):
        Config(finetune=watched, search=search, evaluate=Evaluate(num_images=10, first_seed=80))


def test_a_distance_between_validations_is_refused() -> None:
    with pytest.raises(ValueError, match=r"distance.every is 700, expected a multiple of validate_every, 500"):
        Finetune(distance={"every": 700})


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        ({"metric": "fid"}, "metric 'fid' needs the TensorFlow Inception weights"),
        ({"metric": "recall_effnetlite0"}, "expected a distance, which is smaller for better images"),
        ({"num_steps": 50}, "sampler DDIMScheduler with 50 steps: .*40"),
    ],
    ids=str,
)
def test_what_can_not_be_measured_is_refused_before_any_training(
    distance: dict[str, Any], message: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(tiny_config(finetune={"distance": {"every": 3} | distance}), tmp_path / "run")
