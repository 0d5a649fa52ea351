"""Files of Stable Diffusion in the original layout beside models in diffusers': whose tensors are whose."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ..storage.layouts import DENOISER
from ..storage.tensors import Entry
from .names import diffusers_keys, original_keys
from .part_names import Stored, is_open_clip, open_clip_tensors, unread, vae_keys

# What holds the parts of a pipeline in a file of the original layout.
PREFIXES = {
    "model.diffusion_model.": "denoiser",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
# What all begins with that tells a layout, beside those.
STARTS = ("input_blocks.0.0.", "encoder.down.", "transformer.resblocks.", "text_model.")
# Numbers 0, 1, … that transformers once saved with a text encoder.
COUNTERS = "embeddings.position_ids"


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
    """The tensors of a part of a base and an expert, by the names of diffusers and transformers.

    Attributes:
        base: how the base has them.
        expert: how the expert has them.
    """

    base: dict[str, Stored]
    expert: dict[str, Stored]

    def compare(self, base: Mapping[str, Entry], expert: Mapping[str, Entry]) -> dict[str, list[str]]:
        """List the keys that are missing, unknown or of another shape, each in its own file's words."""

        def is_another(name: str) -> bool:
            mine, theirs = self.base[name], self.expert[name]
            return mine.shape(base[mine.key].shape) != theirs.shape(expert[theirs.key].shape)

        return {
            "missing": _once(s.key for name, s in self.base.items() if name not in self.expert),
            "unknown": _once(s.key for name, s in self.expert.items() if name not in self.base),
            "of another shape": _once(
                s.key for name, s in self.base.items() if name in self.expert and is_another(name)
            ),
        }

    def by_key(self) -> dict[str, list[tuple[Stored, Stored | None]]]:
        """Say for a key of the base what is in it, in order, and how the expert has that; None where it lacks it."""
        found: dict[str, list[tuple[Stored, Stored | None]]] = {}
        for name, stored in self.base.items():
            found.setdefault(stored.key, []).append((stored, self.expert.get(name)))
        return found


def pair_keys(base: Collection[str], expert: Collection[str], component: str) -> Pairs | None:
    """Pair the tensors of Stable Diffusion in the original layout with those in diffusers', and CLIP's of any age.

    Args:
        component: what is merged of a pipeline: unet, text_encoder, …; empty for a network or a file, where the base's
            names tell it.

    Returns:
        None where both are in one layout, and all of both is merged.
    """
    layouts = [_layout(base), _layout(expert)]
    if layouts[0] == layouts[1] and not (component and layouts[0] in PREFIXES):
        return None
    part = part_of(component) if component else _part_in(base)
    mine, theirs = _tensors(base, part), _tensors(expert, part)
    for one, other in ((mine, theirs), (theirs, mine)):
        for name in unread(one, other):
            del one[name]
    return Pairs(mine, theirs)


def _part_in(keys: Collection[str]) -> str:
    """Say which part of a pipeline a network is; of a file with several it is the denoiser."""
    if _layout(keys) in PREFIXES:
        return "denoiser"
    if any(key.startswith(("encoder.down.", "encoder.down_blocks.")) for key in keys):
        return "vae"
    texts = ("text_model.", "transformer.resblocks.", "encoder.layers.0.self_attn.")
    return "text_encoder" if any(key.startswith(texts) for key in keys) else "denoiser"


def _tensors(keys: Collection[str], part: str) -> dict[str, Stored]:
    """Find the tensors of a part by the names of diffusers and transformers, and how they are stored."""
    found: dict[str, Stored] = {}
    for (prefix, owner), names in _parts(keys, part).items():
        if owner != part:
            continue
        if is_open_clip(names):
            tensors = {name: stored for key in names for name, stored in open_clip_tensors(key).items()}
        else:
            others = diffusers_keys(names) | vae_keys(names)
            tensors = {others.get(key, key).removeprefix("text_model."): Stored(key) for key in names}
        found |= {n: Stored(prefix + s.key, s.third, s.transposed) for n, s in tensors.items() if n != COUNTERS}
    return found


def split_tensors(keys: Collection[str]) -> dict[str, list[tuple[str, Stored]]]:
    """Say under which keys an adapter may mean what OpenCLIP has in one tensor, or transposed.

    Returns:
        Key of the base to the keys of what is in it, in order: the file's prefix and a name of transformers.
    """
    found: dict[str, list[tuple[str, Stored]]] = {}
    for (prefix, _), names in _parts(keys, "").items():
        for key in names if is_open_clip(names) else ():
            for name, stored in open_clip_tensors(key).items():
                whose = Stored(prefix + key, stored.third, stored.transposed)
                within = name if name.startswith("text_projection") else f"text_model.{name}"
                found.setdefault(whose.key, []).append((prefix + within, whose))
    return found


def _layout(keys: Collection[str]) -> str | None:
    """Say what all that tells a layout begins with; None for that of diffusers, and of transformers since version 5."""
    return next((start for start in (*PREFIXES, *STARTS) if any(key.startswith(start) for key in keys)), None)


def _once(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(keys))
