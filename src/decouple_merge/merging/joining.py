"""Two denoisers that take turns, as Wan 2.2's, merged into one."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..errors import UserError
from ..storage.layouts import denoisers
from ..storage.reading import read_record
from ..storage.tensors import TensorFiles

# By which pipelines say when a denoiser has its turn.
TURNS = ("boundary_ratio",)
# Below this cosine two sets of weights have no origin in common: independent ones are about 1/√n apart from 0.
UNRELATED = 0.1


def joined_denoisers(base: Path, experts: Sequence[Path]) -> dict[str, Path]:
    """Find the denoisers of a pipeline that are to become one: where the experts are all of them, each once.

    Returns:
        Their folders by name, the first of them what the merge will be; empty where anything else is merged.
    """
    parts = denoisers(base)
    is_all = len(parts) > 1 and {p.resolve() for p in experts} == {p.resolve() for p in parts.values()}
    return parts if is_all and len(experts) == len(parts) else {}


def describe_joined(parts: Mapping[str, Path], networks: Mapping[str, TensorFiles]) -> Iterator[str]:
    """Say what becomes of the denoisers, and how near their weights are.

    Args:
        networks: by the names of the parts.
    """
    first, *others = parts
    for other in others:
        found = cosine(networks[first], networks[other])
        yield (
            f"{first} and {other} become one; the cosine of their weights is {found:.4f}; {first} is the base of task "
            "vectors, so that its own weight has no effect"
        )
        if found < UNRELATED:
            yield (
                f"warning: {first} and {other} have nothing in common, a cosine near 0 is that of networks which were "
                "trained apart: their mean is of no use"
            )


def cosine(one: TensorFiles, other: TensorFiles) -> float:
    """Compute the cosine of two networks' matrices and kernels; biases and scales of norms are alike in all networks.

    Raises:
        UserError: they aren't of one architecture.
    """
    shapes = [{key: entry.shape for key, entry in files.entries.items()} for files in (one, other)]
    if shapes[0] != shapes[1]:
        key = next(k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k))
        raise UserError(
            f"the denoisers are of two architectures: {key} is {shapes[0].get(key, 'missing')} in one and "
            f"{shapes[1].get(key, 'missing')} in the other; expected equal ones"
        )
    sums = [0.0, 0.0, 0.0]
    for key, entry in one.entries.items():
        if len(entry.shape) > 1 and entry.dtype.is_floating_point:
            a, b = (files[key].float().flatten() for files in (one, other))
            products = [torch.dot(x, y).double().item() for x, y in ((a, b), (a, a), (b, b))]
            sums = [s + p for s, p in zip(sums, products, strict=True)]
    return sums[0] / max(math.sqrt(sums[1] * sums[2]), 1e-30)


def leave_out(folder: Path, names: Sequence[str]) -> None:
    """Remove denoisers from a copied pipeline that has them, and from its model_index.json."""
    if not names:
        return
    path = folder / "model_index.json"
    index = read_record(path, "copy the pipeline again")
    there = [name for name in names if index.get(name) not in (None, [None, None])]
    if there:
        for name in there:
            shutil.rmtree(folder / name, ignore_errors=True)
        index |= {name: [None, None] for name in there} | {name: None for name in TURNS if name in index}
        path.write_text(json.dumps(index, indent=2) + "\n")
