"""Experts as one bit an entry: an almost-ensemble that takes 1/32 of a float32 copy for each of them.

An expert is θ + s·p with a pattern p that its bits choose, and a scale s for each tensor, that of least squares:
s = ⟨p, τ_i⟩ / ⟨p, p⟩.

- ``mask``: p = m_i ⊙ (θ_merged - θ), m_i where the merge moves an entry as the expert does. Of a merge by ``emr`` these
  are EMR's masks (Huang et al. 2024, section 3), which has one scale for all tensors, a ratio of L1 norms.
- ``sign``: p = ±1, the sign of τ_i (BitDelta; Liu et al. 2024). It needs no merge.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from ..config.document import dump
from ..errors import UserError
from ..storage.files import atomic_path, write_text
from ..storage.hub import pipeline_folder
from ..storage.outputs import MASKS, check_output
from ..storage.reading import parse_json
from ..storage.tensors import Layout, TensorFiles, num_bytes_of, write_stream
from .experts import Expert, open_expert
from .files import Progress
from .record import name_from, read_recipe
from .rules.sums import task_vector
from .sources import Sources

Pattern = Literal["mask", "sign"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
BITS, SCALE, RECORD = ".bits", ".scale", "mask"
# Bytes of a tensor's bits are a multiple of it, so that all that follows is aligned.
ALIGNMENT = 8
ADVICE = "make it again with deme masks"


def pack(mask: Bool[Tensor, " n"]) -> UInt8[Tensor, " m"]:
    """Pack bits into bytes, the first in the lowest place, with zeros up to a multiple of ``ALIGNMENT`` bytes."""
    padded = torch.zeros(8 * _num_bytes(len(mask)), dtype=torch.uint8)
    padded[: len(mask)] = mask
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, " m"], num: int) -> Bool[Tensor, " n"]:
    """Undo ``pack``; n is ``num``."""
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.view(-1)[:num].bool()


def _num_bytes(num: int) -> int:
    return -(-num // (8 * ALIGNMENT)) * ALIGNMENT


class MaskedExpert(Mapping[str, Tensor]):
    """An expert made of its bits, the base and, of masks, the merge; a tensor is made when it is asked for.

    Args:
        files: as ``write_masks`` wrote them.
        merged: of masks alone.
    """

    def __init__(self, files: TensorFiles, base: TensorFiles, merged: TensorFiles | None) -> None:
        self.files, self.base, self.merged = files, base, merged

    def __getitem__(self, key: str) -> Tensor:
        base = self.base[key]
        if key + BITS not in self.files.entries:
            return base
        bits = unpack(self.files[key + BITS], base.numel()).view(base.shape)
        moved = None if self.merged is None else task_vector(base, self.merged[key])
        return (base + _pattern(bits, moved) * self.files[key + SCALE].item()).to(base.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base.entries)

    def __len__(self) -> int:
        return len(self.base.entries)


def _pattern(bits: Tensor, moved: Tensor | None) -> Tensor:
    return 2 * bits.float() - 1 if moved is None else moved * bits


def open_masked(path: Path, base: TensorFiles, merges: dict[Path, TensorFiles]) -> MaskedExpert | None:
    """Open an expert that ``write_masks`` wrote, on its base; None where the file is another.

    Args:
        merges: those that masks of the same mixture are of, by their places; gets what is opened.

    Raises:
        UserError: the merge that its masks are of is gone, or is another one now; or it is of another base.
    """
    files = TensorFiles([path])
    if RECORD not in files.metadata:
        return None
    record = parse_json(files.metadata[RECORD], path, ADVICE)
    for key, entry in files.entries.items():
        name = key.removesuffix(BITS)
        fits = name in base.entries and (_num_bytes(math.prod(base.entries[name].shape)),) == entry.shape
        if key.endswith(BITS) and not fits:
            raise UserError(f"{path}: {key} fits no tensor of the base; give the base that it was made with")
    if base.sha256() != record.get("base_sha256"):
        raise UserError(f"{path} was made with another base than the mixture's; give that one, or {ADVICE}")
    if record["pattern"] == "sign":
        return MaskedExpert(files, base, None)
    place = path.parent / record["merged"]
    if not place.exists():
        raise UserError(f"{path} holds masks of {place}, which is gone: put it back, or {ADVICE}")
    merged = merges[place] = merges.get(place) or open_expert(place).files
    if (found := merged.sha256()) != record["merged_sha256"]:
        raise UserError(
            f"{path} holds masks of another merge than {place} now is: found {found[:16]}, expected "
            f"{record['merged_sha256'][:16]}; {ADVICE}"
        )
    return MaskedExpert(files, base, merged)


def write_masks(merged: Path, out: Path, pattern: Pattern = "mask") -> Iterator[str | Progress]:
    """Write the experts of a merge as bits, a file each, and ``mixture.yaml``, which draws with each on its range.

    Args:
        merged: what ``deme merge`` or a run merged from experts that have ranges.
        out: a new folder.

    Raises:
        UserError: the merge has no record, an input is gone or isn't what was merged, the experts have no ranges,
            ranges that overlap, or trunk projections, or ``out`` is there.
    """
    found = read_recipe(merged, merged)
    ranges = found.record["ranges"]
    if not ranges or not all(ranges):
        raise UserError(f"{merged} was merged from experts without ranges of timesteps, expected those of a run")
    check_output(out, MASKS, [merged, found.base, *found.experts])
    for (_, stop), (start, _) in itertools.pairwise(sorted(ranges)):
        if start < stop:
            raise UserError(
                f"{merged} was merged from experts whose ranges overlap, up to {stop:g}, from {start:g} on; expected "
                "one expert for each timestep"
            )
    sources = Sources(pipeline_folder(found.base), found.experts, found.settings)
    if sources.projections:
        raise UserError(f"{merged} was merged from experts with trunk projections, which bits of weights don't hold")
    sources.check_sha256([found.base, *found.experts], found.expected_sha256)
    merge, record = None, {"pattern": pattern, "base_sha256": sources.base.sha256()}
    if pattern == "mask":
        merge = open_expert(merged).files
        record |= {"merged": name_from(out, merged), "merged_sha256": merge.sha256()}
    layout, metadata = _layout(sources), {RECORD: json.dumps(record)}
    num_bytes, num_done = sum(num_bytes_of(*tensor) for tensor in layout.values()), 0
    with atomic_path(out) as temporary:
        temporary.mkdir()
        for index, expert in enumerate(sources.experts):
            squares = [0.0, 0.0]
            tensors = _bits_of(expert, sources, merge, squares)
            for num in write_stream(temporary / f"{index}.safetensors", layout, tensors, metadata):
                num_done += num
                yield Progress(num_done, num_bytes * len(sources.experts))
            left = math.sqrt(max(0.0, 1 - squares[1] / squares[0])) if squares[0] else 0.0
            yield f"expert {index}: |expert - its bits| / |expert - base| = {left:.3f}"
        parts = [{"low": own[0], "high": own[1], "model": f"./{i}.safetensors"} for i, own in enumerate(ranges)]
        mixture = {"base": name_from(out, found.base), "rest": "base", "ranges": parts}
        write_text(temporary / "mixture.yaml", dump(mixture))
    yield f"{len(ranges)} experts, each {num_bytes:,} bytes: {num_bytes / sources.base.num_bytes:.1%} of the base"


def _layout(sources: Sources) -> Layout:
    found: Layout = {}
    for key, entry in sources.base.entries.items():
        if entry.dtype.is_floating_point:
            num = math.prod(entry.shape)
            found[key + SCALE] = torch.float64, ()
            found[key + BITS] = torch.uint8, (_num_bytes(num),)
    return found


def _bits_of(
    expert: Expert, sources: Sources, merge: TensorFiles | None, squares: list[float]
) -> Iterator[tuple[str, Tensor]]:
    """Make the tensors of an expert's file; adds to the squares those of its task vector, and of what its bits hold."""
    for key in sources.base.entries:
        base = sources.base[key]
        if base.is_floating_point():
            vector = task_vector(base, expert.tensor(key, base)).reshape(-1)
            moved = None if merge is None else task_vector(base, merge[key]).reshape(-1)
            bits = vector > 0 if moved is None else vector * moved > 0
            pattern = _pattern(bits, moved)
            # Where nothing moved, the scale is 0.
            scale = pattern.dot(vector) / pattern.dot(pattern).clamp(min=torch.finfo(torch.float32).tiny)
            squares[0] += float(vector.dot(vector))
            squares[1] += float(scale * pattern.dot(vector))
            yield key + SCALE, scale.double()
            yield key + BITS, pack(bits)
