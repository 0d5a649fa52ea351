"""An expert as an adapter: low-rank factors, with their magnitudes, biases and whole tensors."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import Merge
from ..errors import UserError
from ..storage.tensors import Entry, TensorFiles
from .adapter_config import AdapterConfig
from .adapter_keys import AdapterKey, other_kind, parse_key, spellings
from .keys import describe
from .originals import module_places, part_of, split_tensors
from .part_names import Stored, store

# A part's key in the file, and what it says of its module.
Parts = dict[str, tuple[str, AdapterKey]]


class Lora:
    """An expert θ_i = θ + scale·B·A (Hu et al. 2021), whose task vector is the product, never A and B apart.

    With magnitudes m it is DoRA, θ_i = m·V/‖V‖ with V = θ + scale·B·A and norms of its rows (Liu et al. 2024, Eq. 5);
    with a middle factor, of a convolution, B·(C∗A). Biases of B are scaled as the product is. Tensors that are stored
    whole stand in the base's place. All of it is what peft's merge does.

    Attributes:
        parts: what changes a module of the base, by the module's path in the base.
        whole: the file's key of a tensor that is stored whole, by its key in the base.
        split: keys of the base whose tensors are OpenCLIP's, and what is in them under names that adapters have.
        notes: lines for the user: what the file has for other parts of a pipeline.
    """

    def __init__(self, files: TensorFiles, path: Path) -> None:
        self.files, self.path = files, path
        self.parts: dict[str, Parts] = {}
        self.whole: dict[str, str] = {}
        self.split: dict[str, list[tuple[str, Stored]]] = {}
        self.kept: list[str] = []
        self.notes: list[str] = []

    def whole_sha256(self, tensors: str) -> str:
        """Add to the hash of the tensors what else the expert is made of: its config, in a file or in the header."""
        return self.config.with_sha256(tensors)

    def check_keys(self, base: Mapping[str, Entry], name: str, component: str, settings: Merge) -> None:
        """Find for every key what it changes in the base.

        Args:
            component: what the base is of a pipeline; empty for a network or a file.

        Raises:
            ValueError: names the keys that change nothing there, whose factors don't fit, or that are of another kind.
        """
        if other := other_kind(self.files.entries):
            raise UserError(
                f"{name}: {other[1]} is of {other[0]}, expected a LoRA: merge it with the library that trained it, and "
                "give the result"
            )
        self.config = AdapterConfig(self.files, self.path)
        self.split = split_tensors(base)
        within = {n: replace(base[k], shape=s.shape(base[k].shape)) for k, held in self.split.items() for n, s in held}
        base = {k: entry for k, entry in base.items() if k not in self.split} | within
        unknown = self._place_keys(base, component)
        found = describe({"unknown": [f"{target} (of {key})" for key, target in unknown.items()]})
        if unknown and settings.extra_keys != "drop":
            raise UserError(f"{name} doesn't fit the base: {found}; expected a LoRA of this base, or --extra-keys drop")
        if unknown:
            self.notes.append(f"{name}: --extra-keys drop of {found}")
        if not self.parts and not self.whole:
            raise UserError(f"{name}: nothing of it is for {component or 'the network'}; " + "; ".join(self.notes))
        self.config.check_covers({key.prefix for parts in self.parts.values() for _, key in parts.values()})
        for module, parts in self.parts.items():
            self._check_parts(base, module, parts, name)
        for key, whole in self.whole.items():
            if self.files.entries[whole].shape != base[key].shape:
                raise UserError(
                    f"{name}: {whole} has shape {self.files.entries[whole].shape}, expected {base[key].shape} as {key}"
                )

    def _place_keys(self, base: Mapping[str, Entry], component: str) -> dict[str, str]:
        """Sort the keys by the base's modules; returns those that have no place, with what they would change."""
        keys = {name: parse_key(name) for name in self.files.entries}
        # A file for Wan 2.2's second transformer may say no more than transformer, as one for the only network does.
        asked, plain = component, not any(key.component == component for key in keys.values())
        component = part_of(component) if plain else component
        places = {k: v for k, v in module_places(base.keys(), component).items() if not asked or k[0] == component}
        components, elsewhere, unknown = {c for c, _ in places}, dict[str, list[str]](), dict[str, str]()
        for name, key in keys.items():
            owner = key.component or component
            if owner not in components and f"{key.prefix}{key.module}.weight" not in base:
                elsewhere.setdefault(owner, []).append(name)
                continue
            stem, _, kind = key.module.rpartition(".") if key.part == "whole" else (key.module, "", "weight")
            module = _find(base, places, key, owner, stem)
            target = f"{module}.{kind}"
            if module is None or target not in base:
                unknown[name] = f"{stem}.{kind}"
            elif key.part == "whole":
                self.whole[target] = name
            elif key.part in (parts := self.parts.setdefault(module, {})):
                raise UserError(f"{self.path}: {parts[key.part][0]} and {name} both change {target}")
            else:
                parts[key.part] = name, key
        target = asked or "the network"
        self.notes = [
            f"{self.path}: {len(names)} tensors for {owner}, {names[0]} among them, are not merged into {target}"
            for owner, names in elsewhere.items()
        ]
        return unknown

    def _check_parts(self, base: Mapping[str, Entry], module: str, parts: Parts, name: str) -> None:
        table = "table_up" in parts or "table_down" in parts
        kinds = ("table_up", "table_down") if table else ("up", "down")
        key = f"{name}: {next(iter(parts.values()))[0]}"
        if missing := [k for k in kinds if k not in parts]:
            count = "no factor" if len(missing) > 1 else "only one factor"
            raise UserError(f"{key}: with {count} for {module}.weight, expected {' and '.join(missing)} too")
        if extra := [k for k in parts if table and k not in (*kinds, "alpha")]:
            raise UserError(f"{name}: {parts[extra[0]][0]}: a LoRA of an embedding with {extra[0]} is not supported")
        shapes = {k: self.files.entries[parts[k][0]].shape for k in parts}
        if table:
            shapes = {"up": shapes["table_up"][::-1], "down": shapes["table_down"][::-1]}
        target = base[f"{module}.weight"].shape
        if problem := _misfit(target, shapes):
            found = ", ".join(f"{parts[k][0]} {self.files.entries[parts[k][0]].shape}" for k in parts if k != "alpha")
            raise UserError(f"{name}: {problem}; found {found}, expected factors of {module}.weight {target}")
        if "bias" in parts and f"{module}.bias" not in base:
            raise UserError(f"{name}: {parts['bias'][0]} has no place, expected a base with {module}.bias")
        if "magnitude" not in parts and self.config.wants_magnitudes(parts[kinds[0]][1].prefix):
            raise UserError(f"{name}: {self.config.place} says use_dora, expected a magnitude for {module}")
        if "magnitude" in parts and not _fits_magnitude(target, shapes["magnitude"], parts["magnitude"][0]):
            raise UserError(
                f"{name}: {parts['magnitude'][0]} has shape {shapes['magnitude']}, expected a number for each of the "
                f"{target[0]} rows of {module}.weight"
            )
        for tensor in (base[f"{module}.weight"], *(self.files.entries[k] for k, _ in parts.values())):
            if not tensor.dtype.is_floating_point and tensor.name not in {parts[k][0] for k in parts if k == "alpha"}:
                raise UserError(f"{name}: {tensor.name} is {tensor.dtype}, expected a floating type")
        self._scale(module, kinds[1])

    def _scale(self, module: str, down: str) -> float:
        parts = self.parts[module]
        key, said = parts[down]
        shape = self.files.entries[key].shape
        alpha = None
        if "alpha" in parts:
            stored = self.files[parts["alpha"][0]]
            if stored.numel() != 1:
                raise UserError(f"{self.path}: {parts['alpha'][0]} has {stored.numel()} numbers, expected one")
            alpha = float(stored)
        return self.config.scale(said.prefix, said.module, shape[1 if down == "table_down" else 0], alpha)

    def tensor(self, key: str, base: Tensor) -> Tensor:
        """Compute the expert's version of a tensor, in float32 or wider where it has factors for it."""
        if key not in self.split:
            return self._changed(key, base)
        held = self.split[key]
        return store([s for _, s in held], [self._changed(name, s.read(base)) for name, s in held], base.shape)

    def _changed(self, key: str, base: Tensor) -> Tensor:
        start = self.files[self.whole[key]] if key in self.whole else base
        module, _, kind = key.rpartition(".")
        parts = self.parts.get(module, {})
        wide = torch.promote_types(base.dtype, torch.float32)

        def read(part: str) -> Tensor:
            return self.files[parts[part][0]].to(wide)

        if kind == "bias" and "bias" in parts:
            return torch.add(start.to(wide), read("bias"), alpha=self._scale(module, "down"))
        if kind != "weight" or not parts:
            return start
        if "table_up" in parts:
            product, scale = read("table_up").T @ read("table_down").T, self._scale(module, "table_down")
        else:
            down, scale = read("down").flatten(1), self._scale(module, "down")
            if "mid" in parts:
                # C∗A: A has a kernel of one pixel, so that the sum is over its channels alone.
                down = torch.einsum("rsk,si->rik", read("mid").flatten(2), down).flatten(1)
            product = read("up").flatten(1) @ down
        changed = torch.add(start.to(wide), product.view(base.shape), alpha=scale)
        if "magnitude" not in parts:
            return changed
        rows = changed.flatten(1)
        return (rows * (read("magnitude").view(-1, 1) / rows.norm(dim=1, keepdim=True))).view(base.shape)


def _find(
    base: Mapping[str, Entry], places: Mapping[tuple[str, str], set[str]], key: AdapterKey, owner: str, module: str
) -> str | None:
    """Find the one module of the base that a key means; None where there is none, or more than one."""
    names = spellings(module)
    for name in (key.prefix + module, *names):
        if any(f"{name}.{kind}" in base for kind in ("weight", "bias")):
            return name
    found = [places[owner, name.replace(".", "_")] for name in names if (owner, name.replace(".", "_")) in places]
    return next((next(iter(modules)) for modules in found if len(modules) == 1), None)


def _misfit(target: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Say why factors don't give a tensor of a shape; None where they do."""
    up, down = shapes["up"], shapes["down"]
    if min(len(up), len(down)) < 2 or len(target) < 2:
        return "a factor is no matrix"
    if 0 in (*up, *down):
        return "a factor is of rank 0"
    # What lies between them: B takes what it writes, and A writes what it takes.
    outer, inner = shapes["mid"][:2] if "mid" in shapes else (up[1], up[1])
    if target[:2] != (up[0], down[1]) and target[:2] in ((down[0], up[1]), (down[1], up[0])):
        return "the factors look swapped"
    if (outer, inner) != (up[1], down[0]):
        return "the factors are of different ranks"
    kernel, points = (shapes["mid"][2:], (*up[2:], *down[2:])) if "mid" in shapes else (down[2:], up[2:])
    if (up[0], down[1]) != target[:2] or set(points) - {1} or _kernel(kernel) != _kernel(target[2:]):
        return "the factors don't fit the tensor"
    return "the bias doesn't fit the tensor" if shapes.get("bias", target[:1]) != target[:1] else None


def _kernel(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Leave out a kernel of one pixel: the factor of such a convolution may be a matrix."""
    return sizes if set(sizes) - {1} else ()


def _fits_magnitude(target: tuple[int, ...], found: tuple[int, ...], key: str) -> bool:
    rows, ones = target[0], (1,) * (len(target) - 2)
    # LyCORIS has two kinds, and that of the columns can't be told from peft's of a convolution by its shape.
    known = {(rows,), (rows, 1, *ones)} | ({(1, rows, *ones)} if ones and not key.endswith("dora_scale") else set())
    return found in known
