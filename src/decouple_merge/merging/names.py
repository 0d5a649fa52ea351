"""The two names of a tensor of Stable Diffusion's U-Nets: diffusers', and that of the original code."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..storage.layouts import DENOISER

# What holds the parts of a pipeline in a file of the original layout.
PREFIXES = {
    "model.diffusion_model.": "denoiser",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
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


def part_of(component: str) -> str:
    """Say which part of a pipeline a component is: denoiser, whatever a pipeline calls it, or its own name."""
    return "denoiser" if not component or DENOISER.fullmatch(component) else component


def _parts(keys: Iterable[str], component: str) -> dict[tuple[str, str], list[str]]:
    """Sort keys by their prefix and the part of a pipeline that it tells; without one they are of ``component``.

    Returns:
        The keys without their prefixes. What a file of the original layout has besides is of the part ``rest``.
    """
    parts: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        prefix = next((p for p in PREFIXES if key.startswith(p)), "")
        parts.setdefault((prefix, PREFIXES.get(prefix, component)), []).append(key.removeprefix(prefix))
    if len(parts) > 1 and ("", component) in parts:
        parts["", "rest"] = parts.pop(("", component))
    return parts


def module_places(keys: Collection[str], component: str) -> dict[tuple[str, str], set[str]]:
    """List under which names an adapter may mean a module of the base.

    Args:
        keys: the base's.
        component: what the base is of a pipeline; parts of a file in the original layout are told by their names.

    Returns:
        (component, name with ``_`` in place of dots) to the modules, of which there should be one.
    """
    places: dict[tuple[str, str], set[str]] = {}
    for (prefix, part), names in _parts(keys, component).items():
        others = original_keys(names) | diffusers_keys(names)
        for name in names:
            for alias in {name, others.get(name, name)}:
                module = alias.rpartition(".")[0].replace(".", "_")
                places.setdefault((part, module), set()).add(prefix + name.rpartition(".")[0])
    return places


@dataclass(frozen=True)
class Pairs:
    """The keys of a base and an expert in two layouts.

    Attributes:
        base: by diffusers' names, the keys of the part that both have.
        expert: the same of the expert.
        rest: what the expert has for other parts.
    """

    base: dict[str, str]
    expert: dict[str, str]
    rest: list[str]


def pair_keys(base: Collection[str], expert: Collection[str], component: str) -> Pairs | None:
    """Pair the keys of Stable Diffusion in the original layout with those in diffusers', and CLIP's of any age.

    Args:
        component: what the base is of a pipeline: denoiser, text_encoder, …

    Returns:
        None where both are in one layout.
    """
    if _layout(base) == _layout(expert):
        return None

    def names(keys: Collection[str]) -> dict[str, str]:
        for (prefix, part), found in _parts(keys, component).items():
            if part == component:
                others = diffusers_keys(found)
                return {others.get(name, name).removeprefix("text_model."): prefix + name for name in found}
        return {}

    theirs = names(expert)
    return Pairs(names(base), theirs, [k for k in expert if k not in set(theirs.values())])


def _layout(keys: Collection[str]) -> str | None:
    """Say what all that tells a layout begins with; None for that of diffusers, and of transformers since version 5."""
    starts = ("model.diffusion_model.", "input_blocks.0.0.", "text_model.")
    return next((start for start in starts if any(key.startswith(start) for key in keys)), None)
