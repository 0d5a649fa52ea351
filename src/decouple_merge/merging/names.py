"""The two names of a tensor of Stable Diffusion's U-Nets: diffusers', and that of the original code."""

import re
from collections.abc import Collection, Iterable

OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_keys(keys: Collection[str]) -> dict[str, str]:
    """Translate the keys of diffusers' ``UNet2DConditionModel`` to those of the original code.

    Returns:
        Each key of a U-Net and its other name; empty where the keys are of another network.
    """
    layers = _numbers(keys, r"down_blocks\.0\.resnets\.(\d+)\.")
    if not layers:
        return {}
    blocks = max(_numbers(keys, r"down_blocks\.(\d+)\.")) + 1
    attending = _numbers(keys, r"up_blocks\.(\d+)\.attentions\.")
    return _translated(keys, _module_names(blocks, max(layers) + 1, attending))


def diffusers_keys(keys: Collection[str]) -> dict[str, str]:
    """Translate the keys of the original code's U-Net to those of diffusers; see ``original_keys``."""
    downsamplers = _numbers(keys, r"input_blocks\.(\d+)\.0\.op\.")
    if not downsamplers:
        return {}
    blocks, layers = len(downsamplers) + 1, min(downsamplers) - 1
    attending = {i // (layers + 1) for i in _numbers(keys, r"output_blocks\.(\d+)\.1\.(?!conv\.)")}
    names = _module_names(blocks, layers, attending)
    return _translated(keys, {original: name for name, original in names.items()})


def _numbers(keys: Iterable[str], pattern: str) -> set[int]:
    return {int(found[1]) for key in keys if (found := re.match(pattern, key))}


def _module_names(num_blocks: int, num_layers: int, attending: Collection[int]) -> dict[str, str]:
    """Pair the names of all modules; the original counts layers through, samplers among them.

    Args:
        attending: the blocks on the way up that have attention, behind which their upsampler is counted.
    """
    names = dict(OUTER)
    for b in range(num_blocks):
        for j in range(num_layers + 1):
            place = b * (num_layers + 1) + j
            names[f"down_blocks.{b}.resnets.{j}"] = f"input_blocks.{place + 1}.0"
            names[f"down_blocks.{b}.attentions.{j}"] = f"input_blocks.{place + 1}.1"
            names[f"up_blocks.{b}.resnets.{j}"] = f"output_blocks.{place}.0"
            names[f"up_blocks.{b}.attentions.{j}"] = f"output_blocks.{place}.1"
        # The last layer on the way down is the downsampler.
        del names[f"down_blocks.{b}.resnets.{num_layers}"], names[f"down_blocks.{b}.attentions.{num_layers}"]
        names[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{place + 1}.0.op"
        names[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{place}.{2 if b in attending else 1}.conv"
    resnets = [(name, original) for name, original in names.items() if ".resnets." in name]
    for name, original in resnets:
        del names[name]
        names |= {f"{name}.{a}": f"{original}.{b}" for a, b in RESNET.items()}
    return names


def _translated(keys: Iterable[str], names: dict[str, str]) -> dict[str, str]:
    """Translate the keys that begin with a module's name; the longest counts."""
    found = {}
    for key in keys:
        parts = key.split(".")
        for n in range(len(parts) - 1, 0, -1):
            if (module := ".".join(parts[:n])) in names:
                found[key] = ".".join([names[module], *parts[n:]])
                break
    return found
