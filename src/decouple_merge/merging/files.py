"""Merge models of any size: one tensor at a time, from memory-mapped files to a stream."""

import json
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..storage.files import atomic_path, copy_folder
from ..storage.layouts import PROJECTIONS_FILE, STALE, plain_name, weight_files
from ..storage.outputs import hashes_of_files
from ..storage.tensors import (
    NAMES,
    Layout,
    TensorFiles,
    hash_tensors,
    num_bytes_of,
    replace_metadata,
    shards,
    write_stream,
)
from .experts import open_expert
from .joining import leave_out
from .sources import Sources
from .survival import NUM_WORST, check_survival, survival_line, survival_record

# Tensors computed ahead of the one that is written: reading, arithmetic and writing overlap, and memory stays bounded.
NUM_AHEAD = 2


@dataclass(frozen=True)
class Progress:
    """How far a merge is, in bytes of output."""

    num_done: int
    num_bytes: int


def merge_files(
    base: Path, out: Path, sources: Sources, record: dict[str, Any], card: Callable[[dict[str, Any]], str]
) -> Iterator[str | Progress]:
    """Write the merge; ``out`` appears whole or not at all.

    The inputs are hashed while they are merged, in the same order, so that the disk is read once.

    Args:
        base: a pipeline folder or a network's, copied with other weights into the folder ``out``, or a weights file,
            and then ``out`` is one.
        record: how it was made, to which the inputs' hashes are added. A folder gets it as merge.json, with the hash
            and the files of the result, and as a model card; a file carries it in its metadata under ``merge``.

    Raises:
        UserError: an input has NaN or infinity, a sum is too large for its dtype, or rounding leaves too little of the
            change.
    """
    total, done = sum(num_bytes_of(*tensor) for tensor in sources.output.values()), 0
    # That of a merged base would tell of its experts.
    metadata = {k: v for k, v in {"format": "pt", **sources.base.metadata}.items() if k != "merge"}
    with atomic_path(out) as temporary, _hashing(sources) as hashes:
        if not base.is_dir():
            files = {temporary: ("", shards(sources.output, total)[0])}
            # The header is written first, and the hashes are known last: their place is kept.
            metadata["merge"] = json.dumps(_unfinished(record, sources))
        else:
            files = _copy_folder(base, temporary, sources)
        for path, (prefix, layout) in files.items():
            for num_bytes in write_stream(path, layout, _ahead(sources, prefix, layout), metadata):
                done += num_bytes
                yield Progress(done, total)
        first, *tensors = [found.result() for found in hashes]
        whole = [expert.whole_sha256(found) for expert, found in zip(sources.experts, tensors, strict=True)]
        statistics = [files.sha256() for files in sources.statistics]
        record = _with_hashes(record, [first, *whole], statistics)
        if sources.changes:
            record["delta"] = survival_record(sources.changes)
            dtypes = {NAMES[sources.output[k][0]] for k in sources.changes if k in sources.output}
            check_survival(record["delta"], "/".join(sorted(dtypes)), sources.settings.min_delta_cosine)
            yield survival_line(record["delta"])
        if not base.is_dir():
            replace_metadata(temporary, metadata | {"merge": json.dumps(record)})
        else:
            places = {name: temporary / at.relative_to(base) for name, at in sources.parts.items()}
            record = {**record, "merged_sha256": open_expert(temporary, places).files.sha256()}
            (temporary / "README.md").write_text(card(record))
            record = {**record, "files": hashes_of_files(temporary)}
            (temporary / "merge.json").write_text(json.dumps(record, indent=2) + "\n")


def _with_hashes(record: dict[str, Any], found: list[str], statistics: list[str]) -> dict[str, Any]:
    record = {**record, "base": {**record["base"], "sha256": found[0]}, "experts_sha256": found[1:]}
    return {**record, "statistics_sha256": statistics} if statistics else record


def _unfinished(record: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Make a record no shorter than the one that will be: with hashes, and the tensors of the longest names."""
    longest = {"cosine": -0.1234, "unchanged": 0.1234}
    keys = sorted(sources.output, key=lambda key: len(json.dumps(key)))[-NUM_WORST:]
    record = _with_hashes(record, ["0" * 64] * (1 + len(sources.experts)), ["0" * 64] * len(sources.statistics))
    return {**record, "delta": {**longest, "worst": dict.fromkeys(keys, longest)}}


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


def _copy_folder(base: Path, out: Path, sources: Sources) -> dict[Path, tuple[str, Layout]]:
    """Copy a folder but for the weights that are merged; returns what is to be written as ``_shard_files`` does."""
    folders = [*sources.parts.values()]
    # Weights in other formats and precisions would be stale copies of the base's.
    stale, left_out = shutil.ignore_patterns(*STALE), [name for name in sources.joined if name not in sources.parts]

    def ignored(at: str, names: list[str]) -> set[str]:
        return (stale(at, names) if Path(at) in folders else set()) | ({*left_out} if Path(at) == base else set())

    copy_folder(base, out, ignored)
    leave_out(out, left_out)
    files: dict[Path, tuple[str, Layout]] = {}
    for name, folder in sources.parts.items():
        files |= _shard_files(out / folder.relative_to(base), name, sources)
    return files | ({out / PROJECTIONS_FILE: ("", sources.projections)} if sources.projections else {})


def _shard_files(folder: Path, part: str, sources: Sources) -> dict[Path, tuple[str, Layout]]:
    """Name the files of a part after the base's, and write the index where they are several.

    Returns:
        What stands before the file's keys in the merge's, and the file's layout.
    """
    prefix = f"{part}." if len(sources.parts) > 1 else ""
    layout = {k.removeprefix(prefix): tensor for k, tensor in sources.output.items() if k.startswith(prefix)}
    stem = plain_name(weight_files(sources.parts[part])[0])
    groups = shards(layout, sources.settings.max_shard_bytes)
    if len(groups) == 1:
        return {folder / f"{stem}.safetensors": (prefix, groups[0])}
    names = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    places = {key: name for name, group in zip(names, groups, strict=True) for key in group}
    total = sum(num_bytes_of(*tensor) for tensor in layout.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {folder / name: (prefix, group) for name, group in zip(names, groups, strict=True)}


def _ahead(sources: Sources, prefix: str, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Merge tensors in threads, a few ahead of the one that is asked for."""
    with ThreadPoolExecutor(NUM_AHEAD) as pool:
        waiting: deque[tuple[str, Future[Tensor]]] = deque()
        for key, (dtype, _) in layout.items():
            waiting.append((key, pool.submit(sources.merged, prefix + key, dtype)))
            if len(waiting) > NUM_AHEAD:
                name, future = waiting.popleft()
                yield name, future.result()
        for name, future in waiting:
            yield name, future.result()
