"""Narrower networks: what is kept is what matters, and is what it was; the result is stock."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from conftest import make_text_unet, make_unet
from decouple_merge.config import Config, Merge
from decouple_merge.diffusion.process import VP
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.errors import UserError
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.pruning import prune_base
from decouple_merge.merging.recipes import merge_models
from decouple_merge.models.base import Base, load_base
from decouple_merge.models.costs import num_macs
from decouple_merge.models.families.stable_diffusion import StableDiffusion
from decouple_merge.models.families.unet import UNet
from decouple_merge.models.families.unet_pruning import _Walk, fill_narrow, kept_channels, narrow_network
from decouple_merge.seeds import generator
from decouple_merge.training.gradient import noisy_batch
from decouple_merge.training.importance import taylor_products

ATTENTION = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
KINDS: dict[str, dict[str, Any]] = {
    "heads": {"block_out_channels": (8, 16, 24)},
    "one head, identities": {"block_out_channels": (8, 16, 16), "attention_head_dim": None, "layers_per_block": 2},
    "resnets resample": {
        **{"block_out_channels": (8, 16, 32), "resnet_time_scale_shift": "scale_shift"},
        **{"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D")},
        **{"up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"), "downsample_type": "resnet"},
    },
    "classes, no attention in the middle": {
        **{"block_out_channels": (8, 16, 32), "num_class_embeds": 3, "add_attention": False},
        **{"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3},
    },
}


@pytest.fixture
def tiny_base(two_level_base: Path) -> Path:
    return two_level_base


def drawn(network: Any, t: int = 7) -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = None if network.config["num_class_embeds"] is None else torch.tensor([0, 2])
    with torch.no_grad():
        found: Tensor = network(x, torch.tensor(t), class_labels=labels, return_dict=False)[0]
    return found


def random_network(**changes: Any) -> Any:
    """A network of which no tensor is an identity: norms scale and shift, too."""
    network: Any = make_unet(**{"sample_size": 8, **changes})
    network.eval()
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws))
    return network


def stretched(tensor: Tensor, dim: int, unit: int, is_dead: bool) -> Tensor:
    """Put behind every unit of a dimension its twin, or zeros."""
    units = tensor.unflatten(dim, (-1, unit)).unsqueeze(dim + 1)
    twins = torch.cat([units, torch.zeros_like(units) if is_dead else units], dim + 1)
    return twins.flatten(dim, dim + 2)


def plant_twins(small: Any, wide: Any) -> dict[str, Tensor]:
    """Give a network of twice the width the small one's weights; returns products that name the first of two."""
    tensors: dict[str, Tensor] = dict(small.state_dict())
    products = {key: torch.ones_like(tensor) for key, tensor in tensors.items()}
    for key, dim, parts in _Walk(small).carriers:
        # Who is in no group and no head of its own is of the one head that all channels are.
        is_head = parts[0].num_parts == 1 and parts[0].unit == 1
        is_query = is_head and ".to_q." in key and dim == 0
        tensors[key] = stretched(tensors[key], dim, parts[0].unit, dim == 1 or is_query) * (2**0.5 if is_query else 1)
        products[key] = stretched(products[key], dim, parts[0].unit, True)
    # Twice as many frequencies: every other one is the small network's.
    name = "time_embedding.linear_1.weight"
    tensors[name] = stretched(tensors[name], 1, 1, True)
    wide.load_state_dict(tensors)
    return products


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_and_its_twin_say_what_the_channel_says(kind: str) -> None:
    """Of a wide network whose every channel stands twice, of which one alone is read, the narrow one is what is read.

    Norms see the same mean and variance with twins and without, as they wouldn't with channels of zeros.
    """
    small = random_network(**{**ATTENTION, **KINDS[kind]})
    wide: Any = make_unet(
        **{"sample_size": 8, **ATTENTION, **KINDS[kind]}
        | {"block_out_channels": [2 * width for width in small.config["block_out_channels"]]}
        | {"time_embedding_dim": 4 * small.config["block_out_channels"][0]}
    )
    products = plant_twins(small, wide)
    narrow = narrow_network(wide, 0.5)
    fill_narrow(wide, narrow, products)
    assert list(narrow.config["block_out_channels"]) == list(small.config["block_out_channels"])
    torch.testing.assert_close(drawn(wide), drawn(small), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn(narrow), drawn(small), rtol=1e-4, atol=1e-4)


def base_of(network: Any) -> Base:
    return Base(UNet(), None, network, VP(torch.linspace(0.999, 0.01, 40), "epsilon"), "")


IMAGES = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
OWN, CPU = TimestepRange(10, 20), torch.device("cpu")


def test_channels_of_zeros_go_first() -> None:
    network = random_network(block_out_channels=(8, 16))
    tensors = network.state_dict()
    for key, dim, parts in _Walk(network).carriers:
        for part, rows in zip(parts, tensors[key].movedim(dim, 0).split([p.num for p in parts]), strict=True):
            # The second half of every group of the norms, and of the heads.
            rows.unflatten(0, (part.num_parts, 2, -1))[:, 1].zero_()
    narrow = narrow_network(network, 0.5)
    fill_narrow(network, narrow, taylor_products(base_of(network), OWN, [IMAGES], 0, CPU))
    for key, dim, _ in _Walk(narrow).carriers:
        slices = narrow.state_dict()[key].movedim(dim, 0)
        assert (slices.reshape(len(slices), -1).abs().sum(1) > 0).all(), key


def test_products_are_what_the_loss_gains_by_scaling_a_tensor() -> None:
    network = random_network(block_out_channels=(4, 8)).double()
    base, key = base_of(network), "down_blocks.1.resnets.0.conv1.weight"
    products = taylor_products(base, OWN, [IMAGES[:3], IMAGES[3:]], 5, CPU)
    batches = [noisy_batch(base, b, OWN, generator(5, "importance", i)) for i, b in enumerate(IMAGES.split(3))]

    def loss(scale: float) -> float:
        tensors = network.state_dict() | {key: scale * network.state_dict()[key]}
        with torch.no_grad():
            outputs = [functional_call(network, tensors, (b.x_t, b.t))[0] for b in batches]
        return sum(float((o - b.target).square().mean()) for o, b in zip(outputs, batches, strict=True)) / 2

    assert float(products[key].sum()) == pytest.approx((loss(1.001) - loss(0.999)) / 0.002, rel=1e-4)


def test_equally_many_are_kept_of_each_group_and_heads_stay_whole() -> None:
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert kept_channels(scores, 4, num_parts=2).tolist() == [0, 1, 6, 7]
    assert kept_channels(scores, 4, unit=2).tolist() == [0, 1, 2, 3]
    assert kept_channels(scores, 2, num_parts=2, unit=1).tolist() == [0, 7]
    assert kept_channels(torch.tensor([1.0, 9, 5, 6]), 2, unit=2).tolist() == [2, 3]


def test_operations_are_those_of_layers_and_of_attention() -> None:
    network, total = random_network(block_out_channels=(8, 16)), 0

    def count(module: Any, args: Any, output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    drawn(network)
    # Four attentions of 16 channels, at half the size: logits, and values weighed by them.
    num = sum(hasattr(module, "to_q") for module in network.modules())
    assert num == 4
    expected = total + num * 2 * 16 * 16 * 16
    assert num_macs(base_of(network)) == expected


def test_a_pruned_pipeline_is_stock_and_is_finetuned_and_merged_as_any(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_config()
    assert list(prune_base(config, 1, 0.5, tmp_path / "half", 1))[1] == "channels: [8, 16] before, [4, 8] after"
    assert not list(tmp_path.glob("unused"))
    stock = DDPMPipeline.from_pretrained(tmp_path / "half").unet
    costs = json.loads((tmp_path / "half" / "prune.json").read_text())["costs"]["pruned"]
    assert costs["parameters"] == sum(p.numel() for p in stock.parameters())
    changed = {"consistency_weight": 0, "num_updates": 2, "baseline": False}
    run = prepare(tiny_config(base=str(tmp_path / "half"), finetune=changed), tmp_path / "run")
    list(finetune_experts(run, 1))
    expert = tmp_path / "run" / "experts" / "1"
    list(merge_models(str(tmp_path / "half"), [expert], Merge(weights=[1.0]), tmp_path / "expert"))
    found = load_base(str(tmp_path / "expert")).network.state_dict()
    assert all(torch.equal(found[k], v) for k, v in load_file(expert / "model.safetensors").items())
    assert not all(torch.equal(found[k], v) for k, v in stock.state_dict().items())


def test_a_base_that_keeps_all_is_the_base_to_the_bit(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config()
    list(prune_base(config, 0, 1.0, tmp_path / "all", 1))
    old, new = (load_base(str(name)) for name in (config.base, tmp_path / "all"))
    assert (old.sha256, dict(old.network.config)) == (
        new.sha256,
        {**new.network.config} | {"_name_or_path": config.base + "/unet"},
    )
    assert torch.equal(drawn(old.network), drawn(new.network))


@pytest.mark.parametrize(
    ("changes", "keep", "message"),
    [
        ({}, 0.2, r"keep is 0.2, which leaves 0 of a level's 8 channels, expected at least 4.*keep 0.5"),
        ({"attention_head_dim": 16}, 0.5, "leaves 8 of a level's 16 channels, expected at least 16.*heads of 16"),
        (
            {"block_out_channels": (8, 12), "attention_head_dim": 4},
            *(0.45, "leaves 4 channels of levels with 8 and 12, between which a convolution would vanish"),
        ),
        ({"time_embedding_type": "fourier"}, 0.5, "time_embedding_type fourier can't be pruned"),
        (
            {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2},
            *(0.5, "SkipDownBlock2D can't be pruned; expected the blocks DownBlock2D"),
        ),
    ],
)
def test_a_width_that_has_no_network_is_refused(changes: dict[str, Any], keep: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        narrow_network(make_unet(**changes), keep)


def test_what_cant_be_pruned_is_refused_before_compute(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a UNet2DConditionModel can't be pruned; expected the UNet2DModel"):
        StableDiffusion().narrow(make_text_unet(), 0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    for index, keep, out, message in (
        (0, 1.5, "new", "keep is 1.5, expected a share"),
        (0, 0.0, "new", "keep is 0, expected a share"),
        (2, 0.5, "new", "range 2 doesn't exist, expected 0 to 1"),
        (0, 0.5, "mine", "holds note.txt; expected a new path, or an earlier result, a folder of deme prune"),
    ):
        with pytest.raises(UserError, match=message):
            next(prune_base(tiny_config(), index, keep, tmp_path / out))
