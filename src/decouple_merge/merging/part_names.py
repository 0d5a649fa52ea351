"""How the original code stores a VAE and OpenCLIP, by the names of diffusers and transformers."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A VAE's names in the original code, and diffusers'; in this order.
VAE = {
    r"^(encoder|decoder)\.norm_out\.": r"\1.conv_norm_out.",
    r"\.down\.(\d+)\.block\.": r".down_blocks.\1.resnets.",
    r"\.down\.(\d+)\.downsample\.": r".down_blocks.\1.downsamplers.0.",
    r"\.up_blocks\.(\d+)\.block\.": r".up_blocks.\1.resnets.",
    r"\.up_blocks\.(\d+)\.upsample\.": r".up_blocks.\1.upsamplers.0.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.norm\.": ".mid_block.attentions.0.group_norm.",
    r"\.mid\.attn_1\.([qkv])\.": r".mid_block.attentions.0.to_\1.",
    r"\.mid\.attn_1\.proj_out\.": ".mid_block.attentions.0.to_out.0.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
}
# OpenCLIP's names, and transformers' of a CLIPTextModel without its text_model.
OPEN_CLIP = {
    r"^positional_embedding$": "embeddings.position_embedding.weight",
    r"^token_embedding\.": "embeddings.token_embedding.",
    r"^ln_final\.": "final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"^transformer\.resblocks\.": "encoder.layers.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"\.attn\.": ".self_attn.",
}
FUSED = ".self_attn.in_proj_"
LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """How a file has a tensor.

    Attributes:
        key: the file's, of a tensor that may hold more.
        third: which third of its rows it is; None where it is all.
        transposed: whether rows and columns are exchanged there.
    """

    key: str
    third: int | None = None
    transposed: bool = False

    def shape(self, found: Sequence[int]) -> tuple[int, ...]:
        """Say the shape of the tensor in the shape that the file has; a kernel of one pixel is left out."""
        shape = tuple(found)[::-1] if self.transposed else tuple(found)
        shape = shape if self.third is None else (shape[0] // 3, *shape[1:])
        return shape[:2] if shape[2:] == (1, 1) else shape

    def read(self, found: Tensor) -> Tensor:
        """Take the tensor from what the file has."""
        found = found.T if self.transposed else found
        return found if self.third is None else found.chunk(3)[self.third]


def store(stored: Sequence[Stored], tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Put tensors together to the one of a shape that a file has of them; the inverse of ``Stored.read``."""
    joined = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
    return (joined.T if stored[0].transposed else joined).reshape(tuple(shape))


def vae_keys(keys: Collection[str]) -> dict[str, str]:
    """Translate the keys of the original code's VAE to those of diffusers; empty where they are of something else."""
    ups = [int(found[1]) for key in keys if (found := re.match(r"decoder\.up\.(\d+)\.", key))]
    if not ups:
        return {}

    def translated(key: str) -> str:
        # The original counts the decoder's blocks from the image, and diffusers from the latents.
        key = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{max(ups) - int(m[1])}.", key)
        return _renamed(key, VAE)

    return {key: translated(key) for key in keys}


def is_open_clip(keys: Collection[str]) -> bool:
    """Say whether a text encoder's keys are OpenCLIP's."""
    return any(key.startswith("transformer.resblocks.") for key in keys)


def open_clip_tensors(key: str) -> dict[str, Stored]:
    """Say which tensors of transformers' ``CLIPTextModel`` one of OpenCLIP is; none of the scale of its loss."""
    if key == "logit_scale":
        return {}
    name = _renamed(key, OPEN_CLIP)
    if FUSED in name:
        return {name.replace(FUSED, f".self_attn.{p}_proj."): Stored(key, third) for third, p in enumerate("qkv")}
    return {name: Stored(key, transposed=key == "text_projection")}


def unread(found: Mapping[str, Stored], other: Collection[str]) -> list[str]:
    """List what Stable Diffusion 2 never reads of its text encoder, where the other one lacks it.

    It reads the layer before the last; diffusers leaves out the last and the projection behind it.
    """
    layers, others = ({int(m[1]) for name in names if (m := LAYER.match(name))} for names in (found, other))
    fused = any(stored.third is not None for stored in found.values())
    if not (fused and others and layers - others == {max(layers)}):
        return []
    last = f"encoder.layers.{max(layers)}."
    return [name for name in found if name not in other and (name.startswith(last) or name == "text_projection.weight")]


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        key = re.sub(old, new, key)
    return key
