"""What a merge doesn't merge and an expert has otherwise than the base: other parts of a pipeline, configs."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..storage.layouts import weight_files
from ..storage.reading import file_sha256, read_record
from ..storage.tensors import TensorFiles
from .sources import Sources

ADVICE = "mend it, or fetch the model again"
CONFIGS = ("config.json", "scheduler_config.json")
# What says nothing of how a part computes.
SILENT = ("dtype", "torch_dtype", "transformers_version", "architectures")


def differing_integers(sources: Sources, names: Iterable[Path]) -> Iterator[str]:
    """Say which tensors of integers an expert has otherwise: they can't be added, and the base's stay."""
    numbers = [key for key, entry in sources.base.entries.items() if not entry.dtype.is_floating_point]
    for name, expert in zip(names, sources.experts, strict=True):
        if other := [k for k in numbers if not torch.equal(expert.tensor(k, start := sources.base[k]), start)]:
            yield f"warning: {name}: {', '.join(other)} are of integers and not the base's, which the merge has"


def differences(base: Path, expert: Path, merged: dict[str, Path]) -> Iterator[str]:
    """Say in which configs an expert differs from the base, and which parts have other weights and aren't merged.

    Args:
        merged: the parts that are merged, by name, and where they lie in the base.
    """
    if not (base.is_dir() and expert.is_dir()):
        return
    index, other = base / "model_index.json", expert / "model_index.json"
    if not (index.is_file() and other.is_file()):
        if len(merged) == 1 and not other.is_file():
            yield from _config_differences(next(iter(merged.values())), expert, str(expert))
        return
    parts, others = ({k: v for k, v in read_record(i, ADVICE).items() if isinstance(v, list)} for i in (index, other))
    for part in [k for k in parts if k in others]:
        where = f"{expert / part}"
        if parts[part] != others[part]:
            yield f"warning: {where} is a {others[part][-1]}, the base's a {parts[part][-1]}, which the merge has"
        else:
            yield from _config_differences(base / part, expert / part, where)
        if part not in merged and _have_other_weights(base / part, expert / part):
            yield f"warning: {where} has other weights than the base's, which the merge has: it is not merged"


def _config_differences(base: Path, expert: Path, where: str) -> Iterator[str]:
    for file in CONFIGS:
        if (base / file).is_file() and (expert / file).is_file():
            old, new = _settings(base / file), _settings(expert / file)
            changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            said = ", ".join(f"{k} {new.get(k)!r} ({old.get(k)!r} in the base)" for k in changed[:5])
            if changed:
                more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
                yield f"warning: {where} has {said}{more}; the merge has the base's"


def _settings(path: Path) -> dict[str, Any]:
    return {k: v for k, v in read_record(path, ADVICE).items() if not k.startswith("_") and k not in SILENT}


def _have_other_weights(base: Path, expert: Path) -> bool:
    """Say whether two parts hold other tensors; equal files of a cache are not read."""
    if base.is_dir() != expert.is_dir():
        return base.is_dir() or expert.is_dir()
    try:
        files = [weight_files(p) for p in (base, expert)]
    except UserError:
        # A part without safetensors, such as a tokenizer.
        return False
    if [p.resolve() for p in files[0]] == [p.resolve() for p in files[1]]:
        return False
    try:
        one, two = (TensorFiles(f) for f in files)
    except UserError:
        # Of a kind that can't be added, which these aren't to be.
        return [file_sha256(p) for p in files[0]] != [file_sha256(p) for p in files[1]]
    if {k: e.shape for k, e in one.entries.items()} != {k: e.shape for k, e in two.entries.items()}:
        return True
    return not all(torch.equal(one[k].float(), two[k].float()) for k in one.entries)
