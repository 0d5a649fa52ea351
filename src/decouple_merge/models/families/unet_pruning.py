"""A UNet2DModel made narrower: which channels of which tensors are one, and a stock network of those that are kept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from diffusers import UNet2DModel
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UserError

# Blocks that run their resnets, each with its attention, and then a resampler: the walk below is theirs.
BLOCKS = (
    *("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "UNetMidBlock2D"),
    *("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
)
# A sinusoid has a sine and a cosine, and one frequency says nothing of time.
MIN_WIDTH = 4
# Over which the sinusoids are fitted: schedules of less see a part of them.
NUM_TIMESTEPS = 1000
# Of the singular values of sinusoids: below, a fit would follow rounding.
RANK_TOLERANCE = 1e-6


@dataclass(eq=False)
class Channels:
    """Channels that are one: a feature map's, wherever it is written, normalised or read.

    Attributes:
        num: of them.
        num_parts: equal consecutive parts, of which equally many are kept: the groups of the norms.
        unit: so many are kept or removed together: an attention head's.
        scores: their importance, by channel.
        kept: their indices, rising.
    """

    num: int
    num_parts: int = 1
    unit: int = 1
    scores: Tensor = field(default_factory=lambda: torch.zeros(()))
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


# A tensor's key, its dimension, and whose channels lie along it, one after the other.
Carrier = tuple[str, int, tuple[Channels, ...]]


def widths_of(network: Any, keep: float) -> list[int]:
    """Say how many channels each level has where a share is kept: whole multiples of the norms' groups, the nearest.

    Raises:
        UserError: the network has blocks or sinusoids of another kind, a level would have fewer channels than the norms
            have groups, or than a head of attention, or two levels would become equally wide.
    """
    config, widths = network.config, list(network.config.block_out_channels)
    blocks = [*network.down_blocks, *([network.mid_block] if network.mid_block else []), *network.up_blocks]
    others = sorted({type(block).__name__ for block in blocks} - set(BLOCKS))
    if others or config.time_embedding_type != "positional" or config.resnet_time_scale_shift == "spatial":
        found = others[0] if others else "time_embedding_type " + config.time_embedding_type
        raise UserError(f"a network with {found} can't be pruned; expected the blocks {', '.join(BLOCKS)}, positional")
    groups = config.norm_num_groups
    kept = [groups * math.floor(keep * width / groups + 0.5) for width in widths]
    least = [max(groups, MIN_WIDTH, *_head_widths(network, i)) for i in range(len(widths))]
    for width, new, needed in zip(widths, kept, least, strict=True):
        if new < needed <= width:
            raise UserError(
                f"keep is {keep:g}, which leaves {new} of a level's {width} channels, expected at least {needed}, for "
                f"{groups} groups of the norms and heads of {config.attention_head_dim}: keep {needed / width:.2g}"
            )
    for (one, new), (other, now) in pairwise(zip(widths, kept, strict=True)):
        if one != other and new == now:
            raise UserError(
                f"keep is {keep:g}, which leaves {new} channels of levels with {one} and {other}, between which a "
                "convolution would vanish: keep more, or less"
            )
    return kept


def _head_widths(network: Any, level: int) -> list[int]:
    """List the width of an attention head where a level has some."""
    blocks = [network.down_blocks[level], network.up_blocks[-1 - level]]
    if network.mid_block and level == len(network.down_blocks) - 1:
        blocks.append(network.mid_block)
    has_some = any(getattr(block, "attentions", None) and block.attentions[0] is not None for block in blocks)
    return [network.config.attention_head_dim] if has_some and network.config.attention_head_dim else []


def narrow_network(network: Any, keep: float) -> Any:
    """Make the untrained network whose levels are narrower; its time embedding stays as wide.

    Raises:
        UserError: as ``widths_of``.
    """
    widths, config = widths_of(network, keep), dict(network.config)
    if widths != list(config["block_out_channels"]):
        width = config["time_embedding_dim"] or 4 * config["block_out_channels"][0]
        config |= {"block_out_channels": widths, "time_embedding_dim": width}
    # What it lists diffusers would take for its own defaults again.
    for key in ("_use_default_values", "_name_or_path"):
        config.pop(key, None)
    with torch.random.fork_rng(devices=[]):
        made: Any = UNet2DModel.from_config(config)
    return made.eval()


@torch.no_grad()
def fill_narrow(network: Any, narrow: Any, products: Mapping[str, Tensor]) -> None:
    """Give a narrower network the channels of another that matter most to a loss.

    The importance of a channel is Σ_tensors |Σ g·θ| over its slice of every tensor that carries it, g the gradient of
    the loss: to first order what the loss changes by when the slice is zero (Molchanov et al. 2019; Fang et al. 2023).
    Of every group of a norm equally many channels are kept, so that each stays in its group.

    Args:
        products: g·θ of every parameter, under its key.
    """
    spaces: dict[int, tuple[Channels, int]] = {}
    carriers, targets = _Walk(network).carriers, _Walk(narrow).carriers
    assert [c[:2] for c in carriers] == [c[:2] for c in targets]
    for (key, dim, parts), (_, _, new_parts) in zip(carriers, targets, strict=True):
        rows = products[key].double().movedim(dim, 0)
        found = rows.reshape(len(rows), -1).sum(1).abs()
        for part, new, score in zip(parts, new_parts, found.split([part.num for part in parts]), strict=True):
            part.scores = part.scores + score
            spaces[id(part)] = part, new.num
    for part, num in spaces.values():
        part.kept = kept_channels(part.scores, num, part.num_parts, part.unit)
    tensors = dict(network.state_dict())
    for key, dim, parts in carriers:
        starts = [sum(part.num for part in parts[:i]) for i in range(len(parts))]
        places = torch.cat([start + part.kept for start, part in zip(starts, parts, strict=True)])
        tensors[key] = tensors[key].index_select(dim, places)
    _rescale_heads(network, narrow, tensors)
    tensors["time_embedding.linear_1.weight"] = _refitted(network, narrow)
    narrow.load_state_dict(tensors)


def kept_channels(
    scores: Float[Tensor, " num"], num_kept: int, num_parts: int = 1, unit: int = 1
) -> Int[Tensor, " kept"]:
    """Choose the channels with the highest scores: of each of some equal parts equally many, in whole units."""
    if num_kept == len(scores):
        return torch.arange(num_kept)
    by_unit = scores.view(num_parts, -1, unit).sum(2)
    num = num_kept // num_parts // unit
    places = by_unit.sort(dim=1, descending=True, stable=True).indices[:, :num].sort(1).values
    units = (places + torch.arange(num_parts)[:, None] * by_unit.shape[1]).flatten()
    return (units[:, None] * unit + torch.arange(unit)).flatten()


class _Walk:
    """Goes through a network as its forward pass does, and notes whose channels each tensor carries."""

    def __init__(self, network: Any) -> None:
        self.network, self.config = network, network.config
        self.carriers: list[Carrier] = []
        first = self.channels(self.config.block_out_channels[0])
        self.layer("conv_in", (first,))
        here, skips = first, [first]
        for i, block in enumerate(network.down_blocks):
            written = self.block(f"down_blocks.{i}", block, here, [()] * len(block.resnets))
            skips, here = [*skips, *written], written[-1]
        if network.mid_block is not None:
            here = self.middle(network.mid_block, here)
        for i, block in enumerate(network.up_blocks):
            num = len(block.resnets)
            skips, taken = skips[:-num], skips[-num:]
            here = self.block(f"up_blocks.{i}", block, here, [(skip,) for skip in reversed(taken)])[-1]
        self.layer("conv_norm_out", (here,))
        self.carriers.append(("conv_out.weight", 1, (here,)))

    def channels(self, num: int) -> Channels:
        return Channels(num, self.config.norm_num_groups)

    def layer(self, name: str, written: tuple[Channels, ...], read: tuple[Channels, ...] = ()) -> None:
        self.carriers += [(f"{name}.weight", 0, written), (f"{name}.bias", 0, written)]
        if read:
            self.carriers.append((f"{name}.weight", 1, read))

    def resnet(self, name: str, module: Any, read: tuple[Channels, ...]) -> Channels:
        inner = self.channels(module.conv1.out_channels)
        # An identity adds what it reads to what it writes: both are the same channels.
        written = read[0] if module.conv_shortcut is None else self.channels(module.conv2.out_channels)
        self.layer(f"{name}.norm1", read)
        self.layer(f"{name}.conv1", (inner,), read)
        # A scale and a shift of each, one behind the other.
        self.layer(f"{name}.time_emb_proj", (inner,) * (2 if module.time_embedding_norm == "scale_shift" else 1))
        self.layer(f"{name}.norm2", (inner,))
        self.layer(f"{name}.conv2", (written,), (inner,))
        if module.conv_shortcut is not None:
            self.layer(f"{name}.conv_shortcut", (written,), read)
        return written

    def attention(self, name: str, module: Any, read: Channels) -> None:
        inner = Channels(module.inner_dim, 1, self.config.attention_head_dim or 1)
        if module.group_norm is not None:
            self.layer(f"{name}.group_norm", (read,))
        for part in ("to_q", "to_k", "to_v"):
            self.layer(f"{name}.{part}", (inner,), (read,))
        self.layer(f"{name}.to_out.0", (read,), (inner,))

    def block(self, name: str, module: Any, here: Channels, skips: list[tuple[Channels, ...]]) -> list[Channels]:
        """Walk through a block whose resnets read skips besides; returns what each of its parts writes."""
        written = []
        attentions = getattr(module, "attentions", None)
        for i, (each, skip) in enumerate(zip(module.resnets, skips, strict=True)):
            here = self.resnet(f"{name}.resnets.{i}", each, (here, *skip))
            if attentions:
                self.attention(f"{name}.attentions.{i}", attentions[i], here)
            written.append(here)
        for kind in ("downsamplers", "upsamplers"):
            for i, each in enumerate(getattr(module, kind, None) or []):
                here = self.resampler(f"{name}.{kind}.{i}", each, here)
                written.append(here)
        return written

    def resampler(self, name: str, module: Any, read: Channels) -> Channels:
        if hasattr(module, "conv1"):
            return self.resnet(name, module, (read,))
        if not hasattr(module.conv, "weight"):
            return read
        written = self.channels(module.conv.out_channels)
        self.layer(f"{name}.conv", (written,), (read,))
        return written

    def middle(self, module: Any, here: Channels) -> Channels:
        here = self.resnet("mid_block.resnets.0", module.resnets[0], (here,))
        for i, attention in enumerate(module.attentions):
            if attention is not None:
                self.attention(f"mid_block.attentions.{i}", attention, here)
            here = self.resnet(f"mid_block.resnets.{i + 1}", module.resnets[i + 1], (here,))
        return here


def _rescale_heads(network: Any, narrow: Any, tensors: dict[str, Tensor]) -> None:
    """Undo in the queries what a narrower head's own scale 1/√d would change."""
    modules = dict(narrow.named_modules())
    for name, module in network.named_modules():
        if hasattr(module, "to_q") and modules[name].scale != module.scale:
            for key in (f"{name}.to_q.weight", f"{name}.to_q.bias"):
                tensors[key] = tensors[key] * (module.scale / modules[name].scale)


def _refitted(network: Any, narrow: Any) -> Float[Tensor, "embedded sinusoids"]:
    """Fit the layer that reads the sinusoids of t, whose frequencies follow from their number, to say what it said.

    By least squares over all timesteps, with the smallest weights.
    """
    weight = network.time_embedding.linear_1.weight
    if narrow.time_embedding.linear_1.weight.shape == weight.shape:
        return weight
    t = torch.arange(NUM_TIMESTEPS)
    old, new = network.time_proj(t).double(), narrow.time_proj(t).double()
    fit = torch.linalg.lstsq(new, old @ weight.double().T, rcond=RANK_TOLERANCE, driver="gelsd")
    return fit.solution.T.to(weight)
