"""Merge models of any size: one tensor at a time, from memory-mapped files to a stream."""

import json
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Merge
from ..seeds import stream_seed
from ..storage.files import atomic_path
from ..storage.tensors import (
    DTYPES,
    PROJECTIONS_FILE,
    Layout,
    TensorFiles,
    hash_tensors,
    model_files,
    network_folder,
    num_bytes_of,
    replace_metadata,
    shards,
    weight_files,
    write_stream,
)
from .keys import check_same_keys, is_trunk_projection
from .rules import RULES, Context, Rule, combine

# Tensors computed ahead of the one that is written: reading, arithmetic and writing overlap, and memory stays bounded.
NUM_AHEAD = 2

LORA_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?:unet\.|transformer\.|prior\.)?(?P<module>.+?)\."
    r"(?:(?P<down>lora_A|lora\.down)|(?P<up>lora_B|lora\.up))(?:\.\w+)?\.weight$"
)


@dataclass(frozen=True)
class Progress:
    """How far a merge is, in bytes of output."""

    num_done: int
    num_bytes: int


class Checkpoint:
    """An expert as a whole set of weights."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files

    def tensor(self, key: str, base: Tensor) -> Tensor:
        """Read the expert's version of a tensor; a projection that it doesn't have is the identity."""
        return self.files[key] if key in self.files.entries else base


class Lora:
    """An expert as low-rank factors: θ_i = θ + scale·B·A, whose task vector is the product, never A and B apart.

    Scale is alpha / rank, or alpha / sqrt(rank) where the adapter says ``use_rslora``; without an alpha it is 1.
    """

    def __init__(self, files: TensorFiles, path: Path) -> None:
        self.files = files
        self.factors: dict[str, dict[str, str]] = {}
        for key in files.entries:
            if found := LORA_KEY.match(key):
                side = "down" if found["down"] else "up"
                self.factors.setdefault(f"{found['module']}.weight", {})[side] = key
        halves = [k for k, pair in self.factors.items() if len(pair) != 2]
        if halves:
            raise ValueError(f"{path}: a LoRA with only one factor for {', '.join(halves[:3])}")
        config = path.parent / "adapter_config.json" if path.is_file() else path / "adapter_config.json"
        self.config: dict[str, Any] = json.loads(config.read_text()) if config.is_file() else {}

    def _scale(self, key: str, rank: int) -> float:
        module = key.removesuffix(".weight")
        alphas = [k for k in self.files.entries if k.endswith(".alpha") and k.removesuffix(".alpha").endswith(module)]
        alpha = float(self.files[alphas[0]]) if alphas else self.config.get("lora_alpha", rank)
        for pattern, value in self.config.get("alpha_pattern", {}).items():
            alpha = value if module.endswith(pattern) else alpha
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def tensor(self, key: str, base: Tensor) -> Tensor:
        """Compute the expert's version of a tensor, in float32 where it has factors for it."""
        if key not in self.factors:
            return base
        down, up = (self.files[self.factors[key][side]].float() for side in ("down", "up"))
        product = (up.flatten(1) @ down.flatten(1)).reshape(base.shape)
        return torch.add(base.float(), product, alpha=self._scale(key, down.shape[0]))


Expert = Checkpoint | Lora


class Sources:
    """The opened and checked inputs of a merge.

    Attributes:
        output: key to dtype and shape of what will be written, without projections.
        projections: the same of the projections that experts of the trunk placement carry and the base doesn't.
    """

    def __init__(self, base: Path, experts: list[Path], settings: Merge) -> None:
        self.settings = settings
        self.base = TensorFiles(weight_files(network_folder(base)))
        self.experts = [open_expert(path) for path in experts]
        self.rule: Rule = RULES[settings.method]
        if len(settings.weights) != len(experts):
            raise ValueError(f"{len(settings.weights)} weights for {len(experts)} experts, expected one each")
        for pattern, weights in settings.blocks.items():
            if len(weights) != len(experts):
                raise ValueError(f"blocks: {pattern!r} has {len(weights)} weights for {len(experts)} experts")
            if not any(fnmatchcase(key, pattern) for key in self.base.entries):
                raise ValueError(
                    f"blocks: no tensor matches {pattern!r}; keys are like {next(iter(self.base.entries))}"
                )
        for expert, path in zip(self.experts, experts, strict=True):
            self._check_keys(expert, path)
        self._check_origin(experts)
        self.fishers = [TensorFiles(weight_files(path)) for path in settings.fishers]
        lacking = [k for f in self.fishers for k in self.base.entries if k not in f.entries]
        if lacking or (settings.method == "fisher" and len(self.fishers) != len(experts)):
            raise ValueError(
                f"{len(self.fishers)} Fisher files for {len(experts)} experts, "
                f"without {', '.join(lacking[:3]) or 'gaps'}; expected one for each expert, "
                "with every key of the network"
            )
        # Masks go with an expert's content, not with its place in the list.
        self.identities = [e.files.sha256() for e in self.experts] if settings.method.startswith("dare") else []
        asked = None if settings.dtype is None else DTYPES[settings.dtype]
        self.output: Layout = {
            key: (asked if asked and e.dtype.is_floating_point else e.dtype, e.shape)
            for key, e in self.base.entries.items()
        }
        extra = {k: e for x in self.experts for k, e in x.files.entries.items() if is_trunk_projection(k)}
        self.projections: Layout = {
            k: (e.dtype, e.shape) for k, e in sorted(extra.items()) if k not in self.base.entries
        }

    def _check_keys(self, expert: Expert, path: Path) -> None:
        if isinstance(expert, Checkpoint):
            check_same_keys(self.base.entries, expert.files.entries, str(path))
        elif unknown := [k for k in expert.factors if k not in self.base.entries]:
            raise ValueError(
                f"{path} doesn't fit the base: unknown: {', '.join(unknown[:5])}; expected a LoRA of this base"
            )

    def _check_origin(self, experts: list[Path]) -> None:
        records = [(p, p / "expert.json" if p.is_dir() else p.parent / "expert.json") for p in experts]
        origins = [(p, json.loads(r.read_text())["base_sha256"]) for p, r in records if r.is_file()]
        if not origins:
            return
        found = widened_sha256(self.base)
        for path, expected in origins:
            if found != expected:
                raise ValueError(
                    f"{path} was finetuned from another base: found {expected[:16]}, expected {found[:16]}; "
                    "merge it into the base that it came from"
                )

    def weights_of(self, key: str) -> list[float]:
        """Say the weights of a tensor: those of the first pattern that matches its key, else the model's."""
        for pattern, weights in self.settings.blocks.items():
            if fnmatchcase(key, pattern):
                return weights
        return self.settings.weights

    def merged(self, key: str, dtype: torch.dtype) -> Tensor:
        """Merge one tensor.

        Raises:
            ValueError: an input has NaN or infinity, and the settings don't allow it.
        """
        base = torch.eye(self.projections[key][1][0]) if key in self.projections else self.base[key]
        if not base.is_floating_point():
            return base
        versions = [e.tensor(key, base) for e in self.experts]
        if not self.settings.allow_non_finite:
            for version in [base, *versions]:
                _check_finite(key, version)
        weights = self.weights_of(key)
        seeds = [stream_seed(self.settings.seed, sha256, key) for sha256 in self.identities]
        fishers = [f[key] for f in self.fishers if key in f.entries]
        context = Context(key, self.settings.density, seeds, fishers)
        return combine([base, *versions], self.rule(base, versions, weights, context), dtype)


def open_expert(path: Path) -> Expert:
    """Open an expert: a pipeline, one of its networks, an expert folder of a run, a weights file or a LoRA.

    Raises:
        ValueError: there are no weights, they are damaged, a pickle, or quantised.
    """
    opened = TensorFiles(model_files(path))
    return Lora(opened, path) if any(LORA_KEY.match(k) for k in opened.entries) else Checkpoint(opened)


def merge_files(
    base: Path, out: Path, sources: Sources, record: dict[str, Any], card: Callable[[dict[str, Any]], str]
) -> Iterator[Progress]:
    """Write the merge; ``out`` appears whole or not at all.

    The inputs are hashed while they are merged, in the same order, so that the disk is read once.

    Args:
        base: a pipeline folder or a network's, copied with other weights into the folder ``out``, or a weights file,
            and then ``out`` is one.
        record: how it was made, to which the inputs' hashes are added. A folder gets it as merge.json, with the hash
            of the result, and as a model card; a file carries it in its metadata under ``merge``.

    Raises:
        ValueError: an input has NaN or infinity.
    """
    total, done = sum(num_bytes_of(*tensor) for tensor in sources.output.values()), 0
    metadata = {"format": "pt", **sources.base.metadata}
    with atomic_path(out) as temporary, _hashing(sources) as hashes:
        if not base.is_dir():
            files = {temporary: shards(sources.output, total)[0]}
            # The header is written first, and the hashes are known last: their place is kept.
            metadata["merge"] = json.dumps(_with_hashes(record, ["0" * 64] * (1 + len(sources.experts))))
        else:
            network = network_folder(base)
            # Weights in other formats and precisions would be stale copies of the base's.
            stale = shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.index.json")
            shutil.copytree(base, temporary, ignore=lambda d, names: stale(d, names) if Path(d) == network else set())
            files = _shard_files(temporary / network.relative_to(base), weight_files(network)[0], sources, total)
            if sources.projections:
                files[temporary / PROJECTIONS_FILE] = sources.projections
        for path, layout in files.items():
            for num_bytes in write_stream(path, layout, _ahead(sources, layout), metadata):
                done += num_bytes
                yield Progress(done, total)
        record = _with_hashes(record, [found.result() for found in hashes])
        if not base.is_dir():
            replace_metadata(temporary, metadata | {"merge": json.dumps(record)})
        else:
            record = {**record, "merged_sha256": open_expert(temporary).files.sha256()}
            (temporary / "merge.json").write_text(json.dumps(record, indent=2) + "\n")
            (temporary / "README.md").write_text(card(record))


def _with_hashes(record: dict[str, Any], found: list[str]) -> dict[str, Any]:
    return {**record, "base": {**record["base"], "sha256": found[0]}, "experts_sha256": found[1:]}


@contextmanager
def _hashing(sources: Sources) -> Iterator[list[Future[str]]]:
    """Hash the base and every expert, each in a thread of its own that ends when the context does."""
    inputs, stop = [sources.base, *(e.files for e in sources.experts)], threading.Event()

    def hashed(files: TensorFiles) -> str:
        return hash_tensors((key, files[key]) for key in files.entries if not stop.is_set())

    with ThreadPoolExecutor(len(inputs)) as pool:
        try:
            yield [pool.submit(hashed, files) for files in inputs]
        finally:
            stop.set()


def _shard_files(folder: Path, original: Path, sources: Sources, total: int) -> dict[Path, Layout]:
    """Name the files of a network after the base's, and write the index where they are several."""
    stem = re.sub(r"-\d+-of-\d+", "", original.name.removesuffix(".safetensors"))
    groups = shards(sources.output, sources.settings.max_shard_bytes)
    if len(groups) == 1:
        return {folder / f"{stem}.safetensors": groups[0]}
    names = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    places = {key: name for name, group in zip(names, groups, strict=True) for key in group}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {folder / name: group for name, group in zip(names, groups, strict=True)}


def _ahead(sources: Sources, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Merge tensors in threads, a few ahead of the one that is asked for."""
    with ThreadPoolExecutor(NUM_AHEAD) as pool:
        waiting: deque[tuple[str, Future[Tensor]]] = deque()
        for key, (dtype, _) in layout.items():
            waiting.append((key, pool.submit(sources.merged, key, dtype)))
            if len(waiting) > NUM_AHEAD:
                name, future = waiting.popleft()
                yield name, future.result()
        for name, future in waiting:
            yield name, future.result()


def widened_sha256(files: TensorFiles) -> str:
    """Hash a model as it trains, in float32, which is how runs record their bases."""
    return hash_tensors((k, _widened(files[k])) for k in files.entries)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _check_finite(key: str, tensor: Tensor) -> None:
    # One pass, and no mask of the tensor's size: a NaN goes through both ends, an infinity is one of them.
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        raise ValueError(f"{key} has NaN or infinity; expected finite weights: mend the model, or allow it")
