"""What every family must do with a tiny pipeline of its own: load, predict, project, export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decouple_merge.config import Lora
from decouple_merge.diffusion.process import Flow
from decouple_merge.models.base import Base, load_base
from decouple_merge.models.export import export_pipeline
from decouple_merge.models.families import FAMILIES
from decouple_merge.models.lora import attach_lora, lora_factors
from decouple_merge.models.network import new_network, predict
from decouple_merge.models.parts import load_text_encoders
from decouple_merge.models.projection import projection_parameters

EACH = list(dict.fromkeys(FAMILIES.values()))


@pytest.fixture(params=EACH, ids=lambda family: type(family).__name__)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    """A tiny base of each family."""
    return load_base(str(request.param.save_tiny(tmp_path / "base")))


def inputs(base: Base, num: int = 2) -> dict[str, Tensor]:
    """Make what a denoiser is told of its texts or classes."""
    if base.encoders is None:
        return {}
    if base.encoders.classes:
        return {"class_labels": torch.arange(num)}
    texts = load_text_encoders(base.encoders, torch.device("cpu"))
    condition = base.family.encode_texts(texts, ["red", "blue"])
    if name := base.family.sizes_input:
        condition[name] = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * num)
    return condition


def noisy(base: Base) -> Tensor:
    return torch.randn(2, *base.shape, generator=torch.Generator().manual_seed(0))


def test_its_tiny_pipeline_is_of_it_and_predicts_in_the_shape_of_x(base: Base) -> None:
    assert type(base.pipeline).__name__ in base.family.pipelines
    assert FAMILIES[type(base.pipeline).__name__] is base.family
    x, condition = noisy(base), inputs(base)
    found = predict(base, base.network, x, 3, **condition)
    assert found.shape == x.shape
    # A number stands for one timestep each, and images don't meet.
    assert torch.equal(found, predict(base, base.network, x, torch.tensor([3, 3]), **condition))
    first = predict(base, base.network, x[:1], 3, **{name: value[:1] for name, value in condition.items()})
    torch.testing.assert_close(first, found[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", ["folded", "trunk"])
def test_every_projection_changes_nothing_at_first_and_reaches_the_output(base: Base, placement: str) -> None:
    if placement == "trunk" and not base.family.trunk_channels(base.network):
        with pytest.raises(ValueError, match="placement is trunk"):
            new_network(base, "trunk")
        return
    # Of two denoisers each says its part.
    t = torch.tensor([3, base.num_train_timesteps - 1])
    network, x, condition = new_network(base, placement).eval().requires_grad_(False), noisy(base), inputs(base)
    before = predict(base, network, x, t, **condition)
    # A product with the identity may lie otherwise in memory, and be summed in another order.
    torch.testing.assert_close(before, predict(base, base.network, x, t, **condition), rtol=1e-5, atol=1e-6)
    matrices = projection_parameters(network)
    assert len(matrices) == len(base.family.output_layers(network))
    for matrix in matrices:
        kept = matrix.clone()
        matrix.mul_(2)
        assert not torch.equal(predict(base, network, x, t, **condition), before)
        matrix.copy_(kept)


def test_its_attention_layers_take_adapters_under_the_components_name(base: Base) -> None:
    pytest.importorskip("peft", reason="peft isn't installed")
    network = new_network(base)
    attach_lora(network, Lora(rank=2), "key")
    factors = lora_factors(network, base.family, {})
    assert factors
    parts = base.family.parted(network)
    assert {key.split(".")[0] for key in factors} == parts.keys()


def test_what_is_exported_is_a_base_of_it_with_the_weights(base: Base, tmp_path: Path) -> None:
    weights = {key: value + 0.01 for key, value in base.network.state_dict().items()}
    export_pipeline(base, weights, tmp_path / "out", None, None)
    again = load_base(str(tmp_path / "out"))
    assert again.family is base.family
    assert all(torch.equal(value, weights[key]) for key, value in again.network.state_dict().items())
    indices = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("base", "out")]
    assert indices[0] == indices[1]


def with_size(folder: Path, component: str, size: Any) -> str:
    path = folder / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
    return str(folder)


@pytest.mark.parametrize("family", [f for f in EACH if f.component == "unet"], ids=lambda family: type(family).__name__)
def test_a_size_of_two_equal_numbers_is_one_and_stays_as_it_was(family: Any, tmp_path: Path) -> None:
    base = load_base(with_size(family.save_tiny(tmp_path / "base"), "unet", [8, 8]))
    assert base.shape[1:] == (8, 8)
    assert base.image_size == (16 if family.is_latent else 8)
    export_pipeline(base, base.network.state_dict(), tmp_path / "out", None, None)
    assert json.loads((tmp_path / "out/unet/config.json").read_text())["sample_size"] == [8, 8]


@pytest.mark.parametrize("size", [[8, 16], None, [8, 8, 8]])
def test_a_size_that_is_no_square_is_refused(size: Any, tmp_path: Path) -> None:
    folder = FAMILIES["DDPMPipeline"].save_tiny(tmp_path / "base")
    with pytest.raises(ValueError, match=r"sample_size is .*, expected one integer, or two that are equal: square"):
        load_base(with_size(folder, "unet", size))


def test_an_unknown_pipeline_is_refused_before_it_is_loaded_and_every_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(ValueError, match="is a LDMPipeline; supported is a diffusers pipeline of a ") as caught:
        load_base(str(tmp_path))
    assert all(pipeline in str(caught.value) for pipeline in FAMILIES)


# What stock pipelines give the network as its timestep, as noise levels, and the sign of what they take from it
# (diffusers' pipelines, read; the families must say the same by themselves).
LEVELS = {
    "StableDiffusion3Pipeline": (lambda given: given / 1000, 1),
    "FluxPipeline": (lambda given: given, 1),
    "ZImagePipeline": (lambda given: 1 - given, -1),
    "WanPipeline": (lambda given: given / 1000, 1),
}
# Of the data that the ideal network knows: values of this deviation, independent of each other.
DEVIATION = 0.5


class Ideal(nn.Module):
    """The best denoiser of independent Gaussian values, called as a stock network: E[x0 | x_t] in closed form."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base, self.config = base, base.network.config

    def estimate(self, x: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        signal, sigma = (v.view(-1, *[1] * (x.dim() - 1)).to(x) for v in (signal, sigma))
        variance = DEVIATION**2
        x0 = signal * variance * x / (signal**2 * variance + sigma**2)
        return x0, (x - signal * x0) / sigma

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        is_list = isinstance(x, list)
        x = torch.stack(x) if is_list else x
        process = self.base.process
        if isinstance(process, Flow):
            level, sign = LEVELS[type(self.base.pipeline).__name__]
            sigma = level(t.double())
            x0, noise = self.estimate(x, 1 - sigma, sigma)
            output = sign * (noise - x0)
        else:
            alpha_bar = process.alphas_cumprod[t.long()]
            x0, output = self.estimate(x, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
            assert process.prediction_type == "epsilon"
        return (list(output),) if is_list else (output,)


def test_the_estimate_of_x0_is_nearer_at_little_noise_than_at_much(base: Base) -> None:
    """A reversed time or sign gives another x0 than the best one, whose error is known for every noise level."""
    draws = torch.Generator().manual_seed(0)
    process, shape = base.process, (2, *base.shape)
    x0, noise = DEVIATION * torch.randn(shape, generator=draws), torch.randn(shape, generator=draws)
    errors = []
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        t = torch.full((2,), share * process.num_train_timesteps)
        t = t if isinstance(process, Flow) else t.long()
        x_t = process.mix(x0, noise, t)
        found = process.x0_of(x_t, predict(base, Ideal(base), x_t, t, **inputs(base)), t)
        snr = float(process.snr(t)[0])
        errors.append(float((found - x0).square().mean()))
        assert errors[-1] == pytest.approx(1 / (1 / DEVIATION**2 + snr), rel=0.35)
    assert errors == sorted(errors)
    assert errors[0] < 0.5 * errors[-1]
