"""UNet2DModel with num_class_embeds: told a class in training and drawing, without a null class."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image
from torch import Tensor, nn

from conftest import make_unet
from decouple_merge import load_ensemble, pretrain, sample_model
from decouple_merge.config import Config, Sample, Text
from decouple_merge.data.batches import training_batches
from decouple_merge.experiment import workflow
from decouple_merge.experiment.plan import check, prepare
from decouple_merge.experiment.results import Row
from decouple_merge.models.base import Base, load_base
from decouple_merge.sampling.sampler import Prompts, denoiser, sample_images
from decouple_merge.storage.files import read_records
from decouple_merge.training import trainer

CPU = torch.device("cpu")
SEEDS = [5, 6, 7]
CLASSES = ["2", "0", "1"]
MakeConfig = Callable[..., Config]

pytestmark = pytest.mark.usefixtures("every_record")


def save(folder: Path, **changes: Any) -> Path:
    network = make_unet(**({"num_class_embeds": 3} | changes))
    pipeline: Any = DDPMPipeline(network, DDPMScheduler(num_train_timesteps=40))
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Eighteen grey 8×8 images in three sub-folders."""
    for i in range(18):
        folder = tmp_path / "images" / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def class_config(labelled: Path, tmp_path: Path) -> MakeConfig:
    folder = save(tmp_path / "base")

    def make(**sections: Any) -> Config:
        values: dict[str, Any] = {
            "base": str(folder),
            "data": {"source": str(labelled), "num_held_out": 4, "caption_dropout": 0},
            "finetune": {
                "num_ranges": 2,
                "num_updates": 2,
                "batch_size": 4,
                "learning_rate": 1e-2,
                "validate_every": 2,
                "tracker": "none",
            },
            "sample": {"num_steps": 3, "batch_size": 4},
            "text": {"guidance_scale": 1},
            "search": {"num_trials": 4, "num_images": 6, "gradient_batches": 2, "num_finalists": 0},
            "evaluate": {"metrics": ["kd_effnetlite0"], "num_images": 6, "num_seed_sets": 1, "num_sample_images": 2},
        }
        for section, changes in sections.items():
            values[section] = {**values[section], **changes} if isinstance(changes, dict) else changes
        return Config.model_validate(values)

    return make


def by_hand(network: Any, labels: list[int]) -> Tensor:
    """Draw with DDIM in 4 steps as the network's own documentation has it: class_labels beside x and t."""
    scheduler: Any = DDIMScheduler.from_config(DDPMScheduler(num_train_timesteps=40).config)
    scheduler.set_timesteps(4)
    x = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t, class_labels=torch.tensor(labels)).sample, t, x).prev_sample
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round()


def draw(base: Base, model: Any = None, classes: list[str] = CLASSES) -> Tensor:
    assert base.encoders is not None
    prompts = Prompts(base.encoders, classes, Text(guidance_scale=1), CPU, first_seed=5)
    settings = Sample(num_steps=4, batch_size=3)
    model = model or denoiser(base, base.network)
    return torch.cat(list(sample_images(model, base, SEEDS, settings, CPU, prompts=prompts))).float()


def test_images_are_of_the_classes_asked_for(tmp_path: Path) -> None:
    base = load_base(str(save(tmp_path / "base")))
    assert (base.shape, base.channels, base.image_size) == ((1, 8, 8), 1, 8)
    assert torch.equal(draw(base), by_hand(base.network, [2, 0, 1]))
    assert not torch.equal(draw(base), draw(base, classes=["1"]))


def test_the_ensemble_is_told_the_class(tmp_path: Path) -> None:
    folder = save(tmp_path / "base")
    ensemble = load_ensemble(folder, [folder, folder])
    base = load_base(str(folder))
    assert torch.equal(draw(base, denoiser(base, ensemble)), draw(base))


def test_the_whole_job(class_config: MakeConfig, tmp_path: Path) -> None:
    config, folder = class_config(), tmp_path / "run"
    events = list(workflow.run(config, folder))
    assert {"pretrained", "ensemble", "merged"} <= {e.model for e in events if isinstance(e, Row)}
    merged: Any = DiffusionPipeline.from_pretrained(folder / "merged")
    assert type(merged) is DDPMPipeline
    record = json.loads((folder / "merged/merge.json").read_text())
    values = {tuple(r["weights"]): r["value"] for r in read_records(folder / "search/trials.jsonl")}
    assert values[tuple(record["weights"])] == min(values.values())
    # The exported network draws what ours does, by class.
    unet = UNet2DModel.from_pretrained(folder / "merged", subfolder="unet")
    base = load_base(str(folder / "merged"))
    assert torch.equal(draw(base), by_hand(unet, [2, 0, 1]))
    assert "class_labels=torch.tensor([0])" in (folder / "merged/README.md").read_text()
    # The run's ensemble draws as the command does, in the order of the data's own classes.
    sample_model(str(folder), tmp_path / "drawn", 2, 0, Sample(num_steps=3))
    for name in ("0.png", "1.png"):
        ours, shown = (
            np.asarray(Image.open(at / name)).astype(int) for at in (tmp_path / "drawn", folder / "samples/ensemble")
        )
        assert abs(ours - shown).max() <= 1


@pytest.mark.parametrize("flip", [False, True])
def test_training_gives_each_image_its_class_and_the_teacher_the_same(
    class_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: bool
) -> None:
    plan, seen = prepare(class_config(data={"flip": flip}), tmp_path / "run"), []
    predict = trainer.predict

    def spy(base: Base, network: nn.Module, x: Tensor, t: Any, **condition: Tensor) -> Tensor:
        seen.append(condition["class_labels"])
        return predict(base, network, x, t, **condition)

    monkeypatch.setattr(trainer, "predict", spy)
    list(workflow.finetune_experts(plan, 0))
    for teachers, students in (seen[:2], seen[2:4]):
        assert torch.equal(teachers, students)
    batch: Any = next(training_batches(plan.images, plan.config.data, 14, 0, 0, 1))
    stacked: Any = plan.images.stack(range(len(plan.images)))
    own = {image.numpy().tobytes() for image in stacked.images}
    known = {
        view.numpy().tobytes(): int(label)
        for image, label in zip(stacked.images, stacked.condition["class_labels"], strict=True)
        for view in (image, image.flip(-1))
    }
    assert [known[image.numpy().tobytes()] for image in batch.images] == batch.condition["class_labels"].tolist()
    assert any(image.numpy().tobytes() not in own for image in batch.images) == flip


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"text": {"guidance_scale": 2}}, r"text.guidance_scale is 2, .* null class, .* UNet2DModel .*: set it to 1"),
        ({"data": {"caption_dropout": 0.1}}, r"data.caption_dropout is 0.1, .* UNet2DModel .* has none: set it to 0"),
    ],
)
def test_what_needs_a_null_class_is_refused_before_any_compute(
    class_config: MakeConfig, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(class_config(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_class_that_the_base_does_not_have_is_refused(
    class_config: MakeConfig, labelled: Path, tmp_path: Path
) -> None:
    (labelled / "2").rename(labelled / "3")
    (labelled / "4").mkdir()
    (labelled / "0" / "0.png").rename(labelled / "4" / "0.png")
    with pytest.raises(ValueError, match=r"of which 3, 4 are no classes of the base; .* below 3, or 3 sub-folders"):
        check(class_config(), tmp_path / "run")
    base = load_base(str(save(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"no class '3'; expected a number below 3$"):
        draw(base, classes=["3"])
    with pytest.raises(ValueError, match=r"text.guidance_scale is 7.5"):
        sample_model(
            str(tmp_path / "other"), tmp_path / "out", 1, 0, Sample(num_steps=2), Text(prompts=_prompts(tmp_path))
        )


def _prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("1\n")
    return folder / "prompts.txt"


def test_classes_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", num_class_embeds=None, class_embed_type="timestep")
    with pytest.raises(ValueError, match="its unet has class_embed_type 'timestep', expected none: classes"):
        load_base(str(folder))


def test_a_class_conditional_base_is_made_from_nothing(labelled: Path, tmp_path: Path) -> None:
    model = dict(make_unet(num_class_embeds=3).config)
    model = {k: v for k, v in model.items() if not k.startswith("_")}
    training = {"num_updates": 2, "batch_size": 4, "validate_every": 2, "tracker": "none"}
    config = Config.model_validate(
        {
            "base": "nothing",
            "data": {"source": str(labelled), "num_held_out": 4, "caption_dropout": 0},
            "text": {"guidance_scale": 1},
            "pretrain": {"model": model, "scheduler": {"num_train_timesteps": 40}, **training},
        }
    )
    list(pretrain(config, tmp_path / "run"))
    base = load_base(str(tmp_path / "run/pipeline"))
    assert base.encoders is not None
    assert torch.equal(draw(base), by_hand(base.network, [2, 0, 1]))
