"""Class-conditional bases: stock diffusers' DiTPipeline, its learned variance left out, its classes as prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import make_dit, save_dit
from decouple_merge import load_ensemble
from decouple_merge.config import Config, Data, Lora, Sample, Text, load_config
from decouple_merge.data.captions import load_captions
from decouple_merge.data.sources import load_images
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.experiment import finetuning, workflow
from decouple_merge.experiment.dry_run import describe
from decouple_merge.experiment.memory import estimate
from decouple_merge.experiment.plan import check, prepare
from decouple_merge.experiment.planned import Plan
from decouple_merge.experiment.results import Row
from decouple_merge.models.base import Base, load_base
from decouple_merge.models.families.dit import DiT
from decouple_merge.models.lora import attach_lora, lora_factors, unadapted_state_dict
from decouple_merge.models.network import new_network, num_parameters, predict
from decouple_merge.models.projection import attach_projections, folded_state_dict, projection_parameters
from decouple_merge.sampling.sampler import Prompts, denoiser, sample_images
from decouple_merge.searching.learned import DenoisingLoss
from decouple_merge.storage.files import read_records
from decouple_merge.training import trainer
from decouple_merge.training.gradient import noisy_batch

CPU = torch.device("cpu")
SEEDS = [5, 6, 7]
CLASSES = ["goldfish", "2", "Tinca tinca"]
NUMBERS = [1, 2, 0]
MakeConfig = Callable[..., Config]


pytestmark = pytest.mark.usefixtures("every_record")


@pytest.fixture
def base(tiny_dit_base: Path) -> Base:
    return load_base(str(tiny_dit_base))


def save_images(folder: Path, names: list[str], num: int) -> Path:
    """Write ``num`` colour images of 16×16 into each of some sub-folders."""
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for j in range(num):
            pixels = np.random.default_rng(100 * i + j).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{j}.png")
    return folder


@pytest.fixture
def dit_config(tiny_dit_base: Path, tmp_path: Path) -> MakeConfig:
    images = save_images(tmp_path / "images", ["goldfish", "shark", "7"], 6)

    def make(**sections: Any) -> Config:
        values: dict[str, Any] = {
            "base": str(tiny_dit_base),
            "data": {"source": str(images), "num_held_out": 4},
            "finetune": {
                "num_ranges": 2,
                "num_updates": 2,
                "batch_size": 4,
                "learning_rate": 1e-2,
                "weight_decay": 0,
                "validate_every": 2,
                "tracker": "none",
                "baseline": False,
            },
            "sample": {"num_steps": 3, "batch_size": 4},
            "text": {"guidance_scale": 4.0},
            "search": {"num_trials": 4, "num_images": 6, "gradient_batches": 2, "num_finalists": 0},
            "evaluate": {"metrics": ["kd_effnetlite0"], "num_images": 6, "num_seed_sets": 1, "num_sample_images": 2},
        }
        for section, changes in sections.items():
            values[section] = {**values[section], **changes}
        return Config.model_validate(values)

    return make


def stock(folder: Path, labels: list[int], seeds: list[int], scheduler: Any = None, **arguments: Any) -> Tensor:
    pipeline: Any = DiTPipeline.from_pretrained(folder)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return run_stock(pipeline, labels, seeds, **arguments)


def run_stock(pipeline: Any, labels: list[int], seeds: list[int], **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(labels, generator=generators, output_type="np", **arguments).images
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round()


def draw(base: Base, model: Any = None, classes: list[str] = CLASSES, sampler: str = "DDIM", **text: Any) -> Tensor:
    assert base.encoders is not None
    prompts = Prompts(base.encoders, classes, Text(**text), CPU, first_seed=5)
    settings = Sample(sampler=sampler, num_steps=4, batch_size=3)
    return torch.cat(
        list(sample_images(model or denoiser(base, base.network), base, SEEDS, settings, CPU, prompts=prompts))
    )


def test_the_denoiser_is_the_transformer(base: Base, tmp_path: Path) -> None:
    assert base.family.component == "transformer"
    assert (base.shape, base.channels, base.image_size) == ((4, 8, 8), 3, 16)
    assert (base.pipeline.vae, base.process.prediction_type, base.num_train_timesteps) == (None, "epsilon", 40)
    half = load_base(str(save_dit(tmp_path / "half", make_dit().to(torch.float16))))  # type: ignore[arg-type]
    assert half.dtype == torch.float16
    assert next(half.network.parameters()).dtype == torch.float32


def test_a_pipeline_under_the_networks_older_name_is_the_same(tiny_dit_base: Path, base: Base) -> None:
    for path, change in (
        (tiny_dit_base / "model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        (tiny_dit_base / "transformer/config.json", {"_class_name": "Transformer2DModel"}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load_base(str(tiny_dit_base)).sha256 == base.sha256


def test_a_learned_variance_is_left_out_of_the_prediction(base: Base) -> None:
    x, labels = torch.randn(3, *base.shape), torch.tensor([0, 7, 1000])
    expected = base.network(x, torch.full((3,), 12), labels).sample
    assert expected.shape == (3, 8, 8, 8)
    for t in (12, torch.tensor(12), torch.full((3,), 12)):
        assert torch.equal(predict(base, base.network, x, t, class_labels=labels), expected[:, :4])


@pytest.mark.parametrize(
    ("sampler", "scheduler", "guidance"),
    [("DDIM", None, 4.0), ("DDIM", None, 1.0), ("DPMSolverMultistep", DPMSolverMultistepScheduler, 2.5)],
)
def test_images_are_those_of_the_stock_pipeline(
    tiny_dit_base: Path, base: Base, sampler: str, scheduler: Any, guidance: float
) -> None:
    expected = stock(tiny_dit_base, NUMBERS, SEEDS, scheduler, guidance_scale=guidance, num_inference_steps=4)
    found = draw(base, sampler=sampler, guidance_scale=guidance)
    assert expected.std() > 20
    assert (found - expected).abs().max() <= 1
    others = draw(base, classes=["900"], sampler=sampler, guidance_scale=guidance)
    assert (others.int() - found.int()).abs().max() > 1


def test_a_network_without_variance_and_with_few_classes_is_the_stock_one_too(tmp_path: Path) -> None:
    folder = save_dit(tmp_path / "base", make_dit(out_channels=4, num_embeds_ada_norm=3))
    expected = stock(folder, NUMBERS, SEEDS, guidance_scale=1.0, num_inference_steps=4)
    assert (draw(load_base(str(folder)), guidance_scale=1.0) - expected).abs().max() <= 1
    # The stock pipeline can't guide it: it takes 1000 for the null class. Ours is the row after the classes'.
    guided = draw(load_base(str(folder)), guidance_scale=4.0)
    assert (guided - expected).abs().max() > 1


def test_a_class_may_be_what_guidance_leads_away_from(base: Base) -> None:
    away, null = draw(base, negative_prompt="900"), draw(base)
    assert not torch.equal(away, null)


def test_the_ensemble_takes_the_transformers_place_in_a_stock_pipeline(tiny_dit_base: Path, tmp_path: Path) -> None:
    folders = [tmp_path / f"expert-{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        network = make_dit()
        with torch.no_grad():
            for p in network.parameters():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        save_dit(folder, network)
    pipeline: Any = DiTPipeline.from_pretrained(tiny_dit_base)
    pipeline.transformer = load_ensemble(tiny_dit_base, folders, one_resident=True)
    found = run_stock(pipeline, NUMBERS, SEEDS, guidance_scale=4.0, num_inference_steps=4)
    ensemble = load_ensemble(tiny_dit_base, folders)
    expected = draw(
        load_base(str(tiny_dit_base)), denoiser(load_base(str(tiny_dit_base)), ensemble), guidance_scale=4.0
    )
    assert (found - expected).abs().max() <= 1


def test_the_whole_job(dit_config: MakeConfig, tmp_path: Path) -> None:
    config, folder = dit_config(), tmp_path / "run"
    events = list(workflow.run(config, folder))
    assert events[0] == "latents: 18 of 18 computed"
    assert [e.model for e in events if isinstance(e, Row)] == ["pretrained", "ensemble", "merged"]
    # The merged network is base + Σ w_i (expert_i - base).
    record = json.loads((folder / "merged/merge.json").read_text())
    start, merged = (
        load_file(f / "transformer/diffusion_pytorch_model.safetensors") for f in (Path(config.base), folder / "merged")
    )
    experts = [load_file(folder / f"experts/{i}/model.safetensors") for i in range(2)]
    for key, value in start.items():
        expected = value + sum(w * (e[key] - value) for w, e in zip(record["weights"], experts, strict=True))
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)
    values = {tuple(r["weights"]): r["value"] for r in read_records(folder / "search/trials.jsonl")}
    assert values[tuple(record["weights"])] == min(values.values()) <= values[(0.0, 0.0)]
    # Stock diffusers draws the run's images, of its classes.
    labels = [{"goldfish": 1, "shark": 2, "7": 7}[p] for p in check(config, folder).prompts[:2]]
    theirs = stock(folder / "merged", labels, [0, 1], guidance_scale=4.0, num_inference_steps=3)
    for seed in (0, 1):
        ours = torch.from_numpy(np.asarray(Image.open(folder / f"samples/merged/{seed}.png")).copy()).permute(2, 0, 1)
        assert (theirs[seed] - ours).abs().max() <= 1
    card = (folder / "merged/README.md").read_text()
    assert "pipeline(class_labels=[0], num_inference_steps=50)" in card
    # The variance has no loss: its rows of the last layer are the base's, where those of ε moved.
    rows = [w["proj_out_2.weight"].view(2, 2, 8, 16) for w in (start, experts[0])]
    assert torch.equal(rows[0][:, :, 4:], rows[1][:, :, 4:])
    assert (rows[0][:, :, :4] - rows[1][:, :, :4]).abs().min() > 0


def test_the_shipped_config_plans_and_trains_a_tiny_pipeline(dit_config: MakeConfig, tmp_path: Path) -> None:
    base, images = dit_config().base, dit_config().data.source
    tiny = {"base": base, "data.source": images, "data.num_held_out": 4, "data.num_workers": 0}
    tiny |= {"finetune.num_updates": 1, "finetune.batch_size": 4, "finetune.tracker": "none", "sample.num_steps": 3}
    path = Path(__file__).parents[1] / "configs/dit.yaml"
    config = load_config(path, [f"{key}={value}" for key, value in tiny.items()])
    lines = list(describe(config, tmp_path / "run"))
    assert "prompts: 18, guidance 1.5" in lines
    assert any(line.startswith("experts: 4 x 1 updates of 32 images on [0, ") for line in lines)
    list(finetuning.finetune_experts(prepare(config, tmp_path / "run"), 1))
    expert = load_file(tmp_path / "run/experts/1/model.safetensors")
    start = load_base(base).network.state_dict()
    assert {k: v.shape for k, v in expert.items()} == {k: v.shape for k, v in start.items()}
    assert any(not torch.equal(expert[k], v) for k, v in start.items())


def test_the_memory_it_needs_is_known_before_it_is_loaded(dit_config: MakeConfig) -> None:
    for sample, held in (({}, 2), ({"one_resident": True}, 1)):
        config = dit_config(sample=sample)
        stages = {stage.name: stage.parts for stage in estimate(config)}
        size = 4 * num_parameters(load_base(config.base).network)
        assert stages["drawing, the ensemble"][f"{held} of 2 networks in fp32"] == held * size
        assert size <= stages["finetuning an expert"]["network"] < 1.1 * size
        assert "encoding texts" not in stages


def opened(config: Config, folder: Path) -> Plan:
    plan = prepare(config, folder)
    list(plan.images.fill())  # type: ignore[attr-defined]
    return plan


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_gives_each_image_its_class_or_the_null_class_and_the_teacher_the_same(
    dit_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    plan, seen = opened(dit_config(data={"caption_dropout": dropout}), tmp_path / "run"), []
    original = trainer.predict

    def spy(base: Any, network: nn.Module, x: Tensor, t: Any, **condition: Tensor) -> Tensor:
        seen.append(condition["class_labels"])
        return original(base, network, x, t, **condition)

    monkeypatch.setattr(trainer, "predict", spy)
    list(finetuning.finetune_experts(plan, 0))
    # Of two updates, teacher and student each; what follows is validation.
    for teachers, students in (seen[:2], seen[2:4]):
        assert torch.equal(teachers, students)
    labels = torch.cat(seen[:4])
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) <= {1, 2, 7, 1000}
    assert (1000 in labels) == (dropout > 0)


def test_blocks_drop_no_labels_of_their_own_in_training(base: Base) -> None:
    x, labels = torch.randn(64, *base.shape), torch.arange(64)
    network = new_network(base).train()
    assert torch.equal(
        predict(base, network, x, 3, class_labels=labels), predict(base, base.network, x, 3, class_labels=labels)
    )


def test_gradient_checkpointing_changes_no_gradient(base: Base) -> None:
    x, labels, gradients = torch.randn(2, *base.shape), torch.tensor([3, 1000]), []
    for is_checkpointed in (False, True):
        network: Any = new_network(base).train()
        if is_checkpointed:
            network.enable_gradient_checkpointing()
        predict(base, network, x, 3, class_labels=labels).square().sum().backward()
        gradients.append(network.transformer_blocks[0].ff.net[2].weight.grad)
    assert torch.equal(*gradients)


def test_the_gradient_of_the_merging_weights_is_that_of_the_loss_without_variance(
    dit_config: MakeConfig, base: Base, tmp_path: Path
) -> None:
    draws = torch.Generator().manual_seed(0)
    expert = {k: v + 0.02 * torch.randn(v.shape, generator=draws) for k, v in base.network.state_dict().items()}
    images = opened(dit_config(), tmp_path / "run").images.stack(range(6))
    batch = noisy_batch(base, images, TimestepRange(0, 40), draws)
    loss, at = DenoisingLoss(base, [expert], CPU), torch.tensor([[0.5]], dtype=torch.float64)
    value, gradient = loss(at, batch)
    slope = (loss(at + 1e-2, batch)[0] - loss(at - 1e-2, batch)[0]) / 2e-2
    torch.testing.assert_close(gradient.item(), slope, rtol=2e-2, atol=1e-5)
    base.network.load_state_dict(loss.merge(at))
    found = predict(base, base.network, batch.x_t, batch.t, **batch.condition)
    assert value == pytest.approx((found - batch.target).square().mean().item(), rel=1e-5)


def test_folded_projections_change_nothing_at_first_and_fold_away_exactly(base: Base) -> None:
    x, labels = torch.randn(2, *base.shape), torch.tensor([1, 2])
    network: Any = new_network(base, "folded").eval()
    assert len(projection_parameters(network)) == 2
    assert torch.equal(
        predict(base, network, x, 3, class_labels=labels), predict(base, base.network, x, 3, class_labels=labels)
    )
    draws = torch.Generator().manual_seed(0)
    matrices = [torch.eye(16) + 0.3 * torch.randn(16, 16, generator=draws) for _ in range(2)]
    hooked = new_network(base).eval()
    with torch.no_grad():
        for w, matrix in zip(projection_parameters(network), matrices, strict=True):
            w.copy_(matrix)
    # P(F) = W·F on what the feed-forward branch of each block writes, its bias included.
    for block, matrix in zip(hooked.transformer_blocks, matrices, strict=True):  # type: ignore[arg-type]
        block.ff.register_forward_hook(lambda m, args, out, w=matrix: out @ w.T)
    found = predict(base, network, x, 3, class_labels=labels)
    torch.testing.assert_close(found, predict(base, hooked, x, 3, class_labels=labels), rtol=1e-4, atol=1e-5)
    assert (found - predict(base, base.network, x, 3, class_labels=labels)).abs().max() > 0.01
    folded = folded_state_dict(network, dict(network.named_parameters()))
    assert folded.keys() == base.network.state_dict().keys()
    plain = new_network(base).eval()
    plain.load_state_dict(folded)
    assert torch.equal(predict(base, plain, x, 3, class_labels=labels), found)


def test_trunk_projections_are_refused_before_any_compute(dit_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"placement is trunk, the paper's layout .* DiTTransformer2DModel; expected"):
        check(dit_config(finetune={"projection": {"placement": "trunk"}}), tmp_path / "run")
    with pytest.raises(ValueError, match="placement is trunk"):
        attach_projections(make_dit(), DiT(), "trunk")


def test_adapters_are_of_the_transformer(base: Base) -> None:
    network = new_network(base)
    attach_lora(network, Lora(rank=2), "key")
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_B" in name:
                p += 0.1
    values = dict(network.named_parameters())
    factors = lora_factors(network, base.family, values)
    assert {k.split(".")[0] for k in factors} == {"transformer"}
    name = "transformer_blocks.1.attn1.to_q"
    product = factors[f"transformer.{name}.lora_B.weight"] @ factors[f"transformer.{name}.lora_A.weight"]
    expected = base.network.state_dict()[f"{name}.weight"] + product
    assert torch.equal(unadapted_state_dict(network, values)[f"{name}.weight"], expected)


def captions(source: Path | str, classes: dict[str, int], **data: Any) -> list[str]:
    settings = Data(source=str(source), **data)
    return load_captions(load_images(settings, 3, 16), settings, classes)


def test_sub_folders_are_classes_by_name_or_number(base: Base, tmp_path: Path) -> None:
    assert base.encoders is not None
    assert base.encoders.classes is not None
    found = captions(save_images(tmp_path / "named", ["12", "goldfish", "tench"], 2), base.encoders.classes)
    assert [base.encoders.classes[c] for c in found] == [12, 12, 1, 1, 0, 0]


def test_as_many_sub_folders_as_classes_are_these_in_order(tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", ["n03", "n01", "n02"], 1)
    assert captions(images, {"0": 0, "1": 1, "2": 2, "": 3, "cat": 0}) == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"found 3 sub-folders, of which n01, n02, n03 are no classes of the base; ex"):
        captions(images, {"0": 0, "1": 1, "": 2})


def test_images_outside_the_sub_folders_are_refused(base: Base, tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", ["1"], 2)
    (images / "1/0.png").rename(images / "loose.png")
    with pytest.raises(ValueError, match=r"1 images are in no class, loose\.png among them; expected sub-folders na"):
        captions(images, base.encoders.classes)  # type: ignore[arg-type,union-attr]


def test_metadata_and_columns_hold_classes_too(base: Base, tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", ["a"], 2)
    lines = [{"file_name": "a/0.png", "class": 3}, {"file_name": "a/1.png", "class": "goldfish"}]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    classes = base.encoders.classes  # type: ignore[union-attr]
    assert captions(images, classes, caption_column="class") == ["3", "goldfish"]  # type: ignore[arg-type]
    pixels = [np.zeros((16, 16, 3), np.uint8), np.ones((16, 16, 3), np.uint8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p) for p in pixels], "label": [1, 0]}, features=features
    )
    rows.save_to_disk(tmp_path / "rows")
    assert captions(f"datasets:{tmp_path / 'rows'}", classes, caption_column="label") == ["1", "0"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            {"negative_prompt": "goldfsh"},
            r"no class 'goldfsh'; expected a number below 1000, or a name such as 'goldfish'",
        ),
        (
            {"prompts": "1\n1000\n"},
            r"no class '1000'; expected a number below 1000, or a name such as 'tench', 'Tinca t",
        ),
    ],
)
def test_prompts_that_are_no_classes_are_refused_before_any_compute(
    dit_config: MakeConfig, tmp_path: Path, text: dict[str, str], message: str
) -> None:
    if "prompts" in text:
        (tmp_path / "prompts.txt").write_text(text["prompts"])
        text = {"prompts": str(tmp_path / "prompts.txt")}
    with pytest.raises(ValueError, match=message):
        check(dit_config(text=text), tmp_path / "run")


def test_a_vae_of_other_latents_is_refused(tmp_path: Path) -> None:
    folder = save_dit(tmp_path / "base", make_dit(in_channels=3, out_channels=6))
    with pytest.raises(ValueError, match="vae writes latents of 4 channels, its transformer reads 3; give parts"):
        load_base(str(folder))


def test_a_flow_of_no_family_is_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    index = {
        "_class_name": "SanaPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is a SanaPipeline; supported is .* DiTPipeline"):
        load_base(str(tmp_path))
