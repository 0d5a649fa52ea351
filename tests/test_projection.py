"""Projections change nothing at the identity, fold away exactly, and sit where DeMe's section 3.2 puts them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from conftest import make_text_unet, make_unet
from decouple_merge.config import Config
from decouple_merge.data.sources import load_images
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.models.base import load_base
from decouple_merge.models.families.stable_diffusion import StableDiffusion
from decouple_merge.models.families.unet import UNet
from decouple_merge.models.projection import (
    ChannelProjection,
    attach_projections,
    folded_state_dict,
    projection_parameters,
)
from decouple_merge.models.unet_blocks import output_layer
from decouple_merge.training import loop, parametrisation, trainer

# The architecture of google/ddpm-ema-church-256.
CHURCH: dict[str, Any] = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}


@pytest.fixture
def tiny_base(two_level_base: Path) -> Path:
    return two_level_base


def noisy(num: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(num, 1, size, size, generator=draws), torch.tensor([0, 17, 39])[:num]


def output(network: nn.Module) -> Tensor:
    x, t = noisy()
    with torch.no_grad():
        return network(x, t, return_dict=False)[0]


def projected(placement: str, **changes: Any) -> UNet2DModel:
    network = make_unet(**changes).eval()
    attach_projections(network, UNet(), placement)
    return network


def randomise(network: nn.Module) -> None:
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for matrix in projection_parameters(network):
            matrix += 0.3 * torch.randn(matrix.shape, generator=draws)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("placement", ["folded", "trunk", "none"])
def test_attaching_at_the_identity_changes_no_bit_of_the_output(placement: str) -> None:
    assert torch.equal(output(projected(placement)), output(make_unet().eval()))


@pytest.mark.parametrize("placement", ["folded", "trunk"])
def test_every_projection_reaches_the_output(placement: str) -> None:
    network = projected(placement)
    before = output(network)
    for matrix in projection_parameters(network):
        kept = matrix.detach().clone()
        with torch.no_grad():
            matrix += 0.3 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(2))
        assert not torch.allclose(output(network), before, atol=1e-4)
        matrix.data.copy_(kept)


@pytest.mark.parametrize("attention", [True, False])
def test_folded_weights_in_a_stock_network_give_the_projected_networks_output(attention: bool) -> None:
    changes = {} if attention else {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = projected("folded", **changes)
    randomise(network)
    folded = folded_state_dict(network, {})
    stock = make_unet(**changes).eval()
    assert not torch.allclose(output(stock), output(network), rtol=1e-2)
    assert list(folded.keys() ^ stock.state_dict().keys()) == []
    stock.load_state_dict(folded)
    torch.testing.assert_close(output(stock), output(network), rtol=1e-5, atol=1e-5)


def test_folding_at_the_identity_returns_the_weights_bit_for_bit() -> None:
    stock = make_unet().state_dict()
    folded = folded_state_dict(projected("folded"), {})
    assert all(torch.equal(folded[key], value) for key, value in stock.items())


def test_folding_uses_the_given_parameters_and_leaves_the_network_alone() -> None:
    network = projected("folded")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    doubled = {name: 2 * p.detach() for name, p in network.named_parameters()}
    folded, stock = folded_state_dict(network, doubled), make_unet().state_dict()
    layers = {name for name, m in network.named_modules() if hasattr(m, "parametrizations")}
    assert len(layers) == 5
    for key, value in stock.items():
        # A projected layer doubles twice: in W and in K.
        factor = 4 if key.rpartition(".")[0] in layers else 2
        torch.testing.assert_close(folded[key], factor * value)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_trunk_weights_keep_the_stock_keys_and_one_matrix_a_block() -> None:
    network = projected("trunk")
    state = folded_state_dict(network, {})
    blocks = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert state.keys() - make_unet().state_dict().keys() == {f"{b}.projection.weight" for b in blocks}
    assert make_unet().state_dict().keys() <= state.keys()


def test_trunk_projects_every_block_once_and_leaves_skips_unprojected() -> None:
    network = projected("trunk")
    randomise(network)
    written: dict[str, Tensor] = {}
    received: dict[str, Any] = {}
    # The layers that write each block's output, and the features that down blocks hand to the skips.
    inner = {
        "down_blocks.0": network.down_blocks[0].downsamplers[0],
        "down_blocks.1": network.down_blocks[1].attentions[0],
        "mid_block": network.mid_block.resnets[-1],
        "up_blocks.0": network.up_blocks[0].upsamplers[0],
        "up_blocks.1": network.up_blocks[1].resnets[-1],
    }
    first_resnet: list[Tensor] = []
    network.down_blocks[0].resnets[0].register_forward_hook(lambda m, a, out: first_resnet.append(out))
    for name, layer in inner.items():
        layer.register_forward_hook(lambda m, a, out, name=name: written.__setitem__(name, out))
    for name in inner:
        block = network.get_submodule(name)
        block.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: received.__setitem__(name, (args, kwargs)), with_kwargs=True
        )
    network.conv_norm_out.register_forward_pre_hook(lambda m, args: received.__setitem__("end", (args, {})))
    output(network)

    def trunk_input(name: str) -> Tensor:
        args, kwargs = received[name]
        return args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))

    order = [*inner, "end"]
    for name, following in itertools.pairwise(order):
        matrix = network.get_submodule(name).projection.weight
        expected = torch.einsum("dc,nchw->ndhw", matrix, written[name])
        torch.testing.assert_close(trunk_input(following), expected, rtol=1e-4, atol=1e-5)
    skips = [s for n in ("up_blocks.1", "up_blocks.0") for s in (*received[n][0], *received[n][1].values())]
    skips = [t for s in skips if isinstance(s, tuple) for t in s]
    assert len(skips) == 4
    for skip, features in zip(
        skips[1:], [first_resnet[0], written["down_blocks.0"], written["down_blocks.1"]], strict=True
    ):
        assert torch.equal(skip, features)


@pytest.mark.parametrize("placement", ["folded", "trunk"])
def test_church_gains_the_papers_number_of_parameters(placement: str) -> None:
    with torch.device("meta"):
        network = UNet2DModel(**CHURCH)
        assert count(network) == 113_673_219
        attach_projections(network, UNet(), placement)
    assert count(network) == 113_673_219 + 1_638_400


def test_output_layer_is_the_downsamplers_convolution() -> None:
    block = make_unet().down_blocks[0]
    assert output_layer(block) is block.downsamplers[0].conv


def test_output_layer_is_the_upsamplers_convolution() -> None:
    block = make_unet().up_blocks[0]
    assert output_layer(block) is block.upsamplers[0].conv


def test_output_layer_of_a_block_that_ends_in_attention_is_the_attentions_linear_layer() -> None:
    block = make_unet().down_blocks[1]
    assert block.downsamplers is None
    assert output_layer(block) is block.attentions[-1].to_out[0]


def test_output_layer_of_the_mid_block_is_its_last_convolution() -> None:
    for add_attention in (True, False):
        block = make_unet(add_attention=add_attention).mid_block
        assert output_layer(block) is block.resnets[-1].conv2


def test_output_layer_of_an_identity_shortcut_resnet_is_on_the_residual_branch() -> None:
    block = make_unet(block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2).down_blocks[1]
    assert block.resnets[-1].conv_shortcut is None
    assert output_layer(block) is block.resnets[-1].conv2


def test_output_layer_is_the_last_convolution_of_a_resampling_resnet() -> None:
    network = make_unet(
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")
    )
    block = network.down_blocks[0]
    assert output_layer(block) is block.downsamplers[0].conv2
    x, t = noisy()
    network.eval()
    before = network(x, t, return_dict=False)[0]
    attach_projections(network, UNet(), "folded")
    assert torch.equal(network(x, t, return_dict=False)[0], before)


# The architecture of CompVis/stable-diffusion-v1-4.
STABLE_DIFFUSION: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# Pairs of down and up blocks of a UNet2DConditionModel; the first down block has a downsampler, the second has none.
BLOCKS = {
    "transformer": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
    "resnet": ("DownBlock2D", "UpBlock2D"),
    "attention": ("AttnDownBlock2D", "AttnUpBlock2D"),
    "resampling resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    "cross attention": ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"),
}


def text_output(network: nn.Module) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    x, text = torch.randn(3, 4, 8, 8, generator=draws), torch.randn(3, 5, 16, generator=draws)
    with torch.no_grad():
        return network(x, torch.tensor([0, 17, 39]), encoder_hidden_states=text, return_dict=False)[0]


@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_folding_is_exact_for_every_block_of_a_text_conditional_network(kind: str, linear: bool) -> None:
    down, up = BLOCKS[kind]
    changes = {"down_block_types": (down,) * 2, "up_block_types": (up,) * 2, "use_linear_projection": linear}
    stock, network = make_text_unet(**changes).eval(), make_text_unet(**changes).eval()
    before = text_output(stock)
    attach_projections(network, StableDiffusion(), "folded")
    assert torch.equal(text_output(network), before)
    randomise(network)
    projected_output = text_output(network)
    assert not torch.allclose(projected_output, before, rtol=1e-2)
    folded = folded_state_dict(network, {})
    assert folded.keys() == stock.state_dict().keys()
    stock.load_state_dict(folded)
    assert torch.equal(text_output(stock), projected_output)


@pytest.mark.parametrize("linear", [False, True])
def test_output_layer_of_a_block_that_ends_in_a_transformer_is_the_transformers_last(linear: bool) -> None:
    network = make_text_unet(use_linear_projection=linear)
    block = network.up_blocks[1]
    assert output_layer(block) is block.attentions[-1].proj_out
    assert output_layer(network.down_blocks[0]) is network.down_blocks[0].downsamplers[0].conv
    assert output_layer(network.up_blocks[0]) is network.up_blocks[0].upsamplers[0].conv
    assert output_layer(network.mid_block) is network.mid_block.resnets[-1].conv2


@pytest.mark.parametrize("placement", ["folded", "trunk"])
def test_every_projection_of_a_text_conditional_network_reaches_the_output(placement: str) -> None:
    network = make_text_unet().eval()
    attach_projections(network, StableDiffusion(), placement)
    before = text_output(network)
    matrices = projection_parameters(network)
    assert len(matrices) == 5
    for matrix in matrices:
        kept = matrix.detach().clone()
        with torch.no_grad():
            matrix += 0.3 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(2))
        assert not torch.allclose(text_output(network), before, atol=1e-4)
        matrix.data.copy_(kept)


@pytest.mark.parametrize("placement", ["folded", "trunk"])
def test_stable_diffusion_gains_the_papers_number_of_parameters(placement: str) -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel(**STABLE_DIFFUSION)
        assert count(network) == 859_520_964
        attach_projections(network, StableDiffusion(), placement)
    assert count(network) == 859_520_964 + 9_216_000


def test_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="'skip', expected folded, trunk or none"):
        attach_projections(make_unet(), UNet(), "skip")


def test_kernel_and_bias_share_one_matrix() -> None:
    network = projected("folded")
    assert len(projection_parameters(network)) == len({id(p) for p in projection_parameters(network)}) == 5
    assert len({id(m) for m in network.modules() if isinstance(m, ChannelProjection)}) == 5


@pytest.mark.parametrize("placement", ["folded", "trunk"])
def test_learning_rate_scale_moves_only_the_matrices(
    placement: str, tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    base = load_base(config.base)
    images = load_images(config.data, base.channels, base.image_size)
    whole = TimestepRange(0, 40)
    after: list[dict[str, Tensor]] = []

    def capture(network: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        after.append({k: v.detach().clone() for k, v in network.named_parameters()})
        return folded_state_dict(network, parameters)

    monkeypatch.setattr(parametrisation, "folded_state_dict", capture)
    for scale in (1.0, 0.25):
        projection = {"placement": placement, "learning_rate_scale": scale}
        changes = {"num_updates": 1, "learning_rate": 0.01, "weight_decay": 0, "global_prob": 0}
        config = tiny_config(finetune=changes | {"projection": projection})
        task = trainer.Task("t", whole, (whole,))
        for _ in loop.train(base, images, config.data, task, config.finetune, 0, tmp_path / str(scale)):
            pass
    full, scaled = after
    matrices = [name for name in full if name.endswith("projection.weight")]
    assert len(matrices) == 5
    for name, value in full.items():
        if name not in matrices:
            assert torch.equal(scaled[name], value)
            continue
        step = value - torch.eye(len(value))
        assert step.abs().max() > 0.009
        torch.testing.assert_close(scaled[name] - torch.eye(len(value)), 0.25 * step, rtol=0, atol=3e-7)
