"""Experts of data in place of timesteps, and an error weighed by frequency."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from decouple_merge.config import Config, Data
from decouple_merge.data.batches import training_batches
from decouple_merge.data.sources import load_images
from decouple_merge.data.split import split
from decouple_merge.diffusion.losses import finetune_losses, per_sample_mse, spectral_mse, spectral_weights
from decouple_merge.errors import UserError
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.workflow import run


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Save 24 grey images in two folders; those of ``dark`` are black."""
    for name, grey in (("dark", 0), ("light", 255)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            Image.fromarray(np.full((8, 8), grey, np.uint8)).save(tmp_path / f"images/{name}/{number}.png")
    return tmp_path / "images"


def test_a_training_sees_images_of_its_classes_alone(folders: Path) -> None:
    data = Data(source=str(folders), num_held_out=4, classes=("light",))
    images = load_images(data, 1, 8)
    batches = list(training_batches(images, data, 5, 0, 0, 6))
    assert all(bool((batch == 255).all()) for batch in batches)  # type: ignore[operator]
    everything = split(images, Data(source=str(folders), num_held_out=4))
    found = split(images, data)
    assert found.held_out == everything.held_out
    assert {images.class_names[i] for i in found.held_out} == {"dark", "light"}
    assert len(found.trained) == 10


def test_fashion_mnists_classes_have_their_names_and_hold_out_nothing_else() -> None:
    plain, boots = (Data(num_held_out=64, classes=classes) for classes in (None, ("ankle boot", "bag")))
    images = load_images(plain, 1, 28)
    names = images.class_names
    assert names[:3] == ["ankle boot", "T-shirt", "T-shirt"]
    assert split(images, boots).held_out == split(images, plain).held_out
    assert {names[i] for i in split(images, boots).trained} == {"ankle boot", "bag"}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("grey",), "data.classes has 'grey', which no image has that is trained on; expected some of dark, light"),
        ((), "too_short|at least 1 item"),
    ],
)
def test_classes_that_are_not_there_are_refused(classes: tuple[str, ...], message: str, folders: Path) -> None:
    images = load_images(Data(source=str(folders)), 1, 8)
    with pytest.raises(ValueError, match=message):
        split(images, Data(source=str(folders), num_held_out=4, classes=classes))


def test_data_without_classes_are_refused_before_any_compute(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"data.classes names classes, and the data has none"):
        prepare(tiny_config(data={"classes": ["a"]}), tmp_path / "run")


def test_the_soup_of_two_experts_of_classes_is_their_mean(
    tiny_config: Callable[..., Config], folders: Path, tmp_path: Path
) -> None:
    data = {"source": str(folders), "num_held_out": 4}
    one: dict[str, Any] = {"num_ranges": 1, "baseline": False, "global_prob": 0.0}
    for name in ("dark", "light"):
        list(finetune_experts(prepare(tiny_config(data=data | {"classes": [name]}, finetune=one), tmp_path / name)))
    experts = [str(tmp_path / name / "experts/0") for name in ("dark", "light")]
    search = {"checkpoints": experts, "strategy": "uniform", "method": "linear", "num_finalists": 0}
    config = tiny_config(data=data, search=search, finetune={"baseline": False}, evaluate={"num_images": 6})
    list(run(config, tmp_path / "soup"))
    assert not (tmp_path / "soup/experts").exists()
    merged = load_file(tmp_path / "soup/merged/unet/diffusion_pytorch_model.safetensors")
    dark, light = (load_file(Path(expert) / "model.safetensors") for expert in experts)
    assert any(not torch.equal(dark[key], light[key]) for key in dark)
    for key in merged:
        torch.testing.assert_close(merged[key], (dark[key] + light[key]) / 2, rtol=1e-5, atol=1e-6)
    models = {json.loads(line)["model"] for line in (tmp_path / "soup/metrics.jsonl").read_text().splitlines()}
    assert models == {"pretrained", "merged"}


def test_weights_of_one_are_the_plain_error_and_of_white_noise_the_mean_stays() -> None:
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, 3, 12, 10, generator=draws)
    torch.testing.assert_close(spectral_mse(a, b, spectral_weights(12, 10, 0.0)), per_sample_mse(a, b))
    weights = spectral_weights(12, 10, 1.0)
    assert weights.mean().item() == pytest.approx(1)
    assert spectral_mse(a, b, weights).mean().item() == pytest.approx(per_sample_mse(a, b).mean().item(), rel=0.03)


@pytest.mark.parametrize(("cycles", "axis"), [(1, 0), (3, 1)])
def test_a_wave_counts_as_its_frequency_says(cycles: int, axis: int) -> None:
    angle = 2 * torch.pi * cycles * torch.arange(16) / 16
    wave = torch.cos(angle).expand(16, 16) if axis else torch.cos(angle)[:, None].expand(16, 16)
    found = spectral_mse(wave[None, None], torch.zeros(1, 1, 16, 16), spectral_weights(16, 16, 2.0))
    rho = torch.fft.fftfreq(16)[:, None] ** 2 + torch.fft.fftfreq(16) ** 2
    rho[0, 0] = (1 / 16) ** 2
    assert found.item() == pytest.approx(0.5 * (cycles / 16) ** 2 / rho.mean().item(), rel=1e-4)


def test_both_terms_of_the_loss_have_the_weights() -> None:
    output, target, teacher = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    spectrum = spectral_weights(8, 8, 1.0)
    total, denoising, consistency = finetune_losses(output, target, teacher, 0.5, None, spectrum)
    torch.testing.assert_close(denoising, spectral_mse(output, target, spectrum))
    torch.testing.assert_close(consistency, spectral_mse(output, teacher, spectrum))
    torch.testing.assert_close(total, denoising + 0.5 * consistency)


def test_a_training_with_the_weights_differs_and_is_recorded(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    weights = []
    for power in (0.0, 1.0):
        settings = {"spectrum_power": power, "num_ranges": 1, "baseline": False}
        folder = tmp_path / str(power)
        list(finetune_experts(prepare(tiny_config(finetune=settings), folder)))
        assert json.loads((folder / "experts/0/expert.json").read_text())["training"]["spectrum_power"] == power
        weights.append(load_file(folder / "experts/0/model.safetensors"))
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
