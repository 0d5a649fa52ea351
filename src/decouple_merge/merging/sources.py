"""What files are merged from: a base and experts, opened and checked."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ..config import Merge
from ..errors import UserError
from ..seeds import stream_seed
from ..storage.layouts import PROJECTIONS_FILE, chosen_part, denoisers, parts_like, weight_files
from ..storage.reading import read_record
from ..storage.tensors import DTYPES, NAMES, Layout, TensorFiles, hash_tensors, is_finite
from .experts import Checkpoint, open_expert, open_parts
from .joining import joined_denoisers
from .keys import is_trunk_projection
from .rules import RULES, check_weights
from .rules.rule import Context, Rule, Settings, merge_tensor
from .survival import Change, change_of

# What quantised weights are of.
BYTES = (torch.int8, torch.uint8)


class Sources:
    """The opened and checked inputs of a merge.

    Attributes:
        names: of base and experts, for messages.
        parts: where what is merged lies in the base, by name.
        joined: denoisers of the base, by name, that become one; the first of them is what is merged.
        output: key to dtype and shape of what will be written, without projections.
        projections: the same of the projections that experts of the trunk placement carry and the base doesn't.
        changes: of the tensors that were merged so far and written in a coarser dtype than they were computed in.
        idle: experts, by their place, that had nothing but the base's tensors in what was merged so far.
    """

    def __init__(
        self, base: Path, experts: list[Path], settings: Merge, experts_sha256: Sequence[str | None] = ()
    ) -> None:
        self.settings, self.names = settings, [base, *experts]
        self.changes: dict[str, Change] = {}
        self.idle = set(range(len(experts)))
        component = settings.component
        chosen = component is not None and (base / "model_index.json").is_file()
        self.parts = {component: chosen_part(base, component)} if chosen and component else denoisers(base)
        if component is not None and not chosen:
            self.parts = {component: base}
        self.joined = joined_denoisers(base, experts) if component is None else {}
        if self.joined:
            self.parts = dict([next(iter(self.joined.items()))])
        self.base = open_parts(self.parts)
        _check_base(base, self.base, chosen)
        self.experts = [open_expert(path, self._parts_of(path)) for path in experts]
        self.rule: Rule = RULES[settings.method]
        self.rule_settings = Settings(**settings.rule_settings())
        check_weights(settings.weights, len(experts))
        self._check_blocks()
        for row in (settings.weights, *settings.blocks.values()):
            self.rule.check(row, self.rule_settings)
        for expert, path in zip(self.experts, experts, strict=True):
            expert.check_keys(self.base.entries, str(path), " and ".join(self.parts), settings)
        self._check_origin(experts)
        self.fishers = [TensorFiles(weight_files(path)) for path in settings.fishers]
        self._check_fishers()
        self.grams = [TensorFiles(weight_files(path)) for path in settings.grams]
        self._check_grams()
        self.identities = self._identities(experts_sha256) if "seeds" in self.rule.needs else []
        asked = None if settings.dtype is None else DTYPES[settings.dtype]
        self.output: Layout = {
            key: (asked if asked and e.dtype.is_floating_point else e.dtype, e.shape)
            for key, e in self.base.entries.items()
        }
        self.kept = self._kept(experts)
        self.output |= {k: (f.entries[k].dtype, f.entries[k].shape) for k, f in self.kept.items()}
        extra = {k: e for x in self.experts for k, e in x.files.entries.items() if is_trunk_projection(k)}
        self.projections: Layout = {
            k: (e.dtype, e.shape) for k, e in sorted(extra.items()) if k not in self.base.entries
        }
        if self.projections and not base.is_dir():
            raise UserError(
                f"{next(iter(self.projections))} is a trunk projection, and a file has no place for it; give the "
                "pipeline as the base"
            )

    def _identities(self, known: Sequence[str | None]) -> list[str]:
        """Name each expert by what it holds, which masks go with, and not by its place; by a recipe's name, if any."""
        return [
            sha256 or expert.whole_sha256(expert.files.sha256())
            for sha256, expert in zip(known or [None] * len(self.experts), self.experts, strict=True)
        ]

    def check_sha256(self, names: Sequence[str | Path], expected_sha256: Sequence[str | None]) -> None:
        """Require that base, experts and statistics, in this order, are what a recipe was made with, as far as it says.

        Raises:
            UserError: one isn't.
        """
        statistics = [Checkpoint(files) for files in self.statistics]
        inputs = zip(names, [Checkpoint(self.base), *self.experts, *statistics], strict=True)
        for (name, model), expected in zip(inputs, expected_sha256, strict=True):
            if expected is None or (found := model.whole_sha256(model.files.sha256())) == expected:
                continue
            # Runs hash the weights as they train.
            if model.whole_sha256(widened_sha256(model.files)) != expected:
                raise UserError(
                    f"{name} is not what the recipe was made with: found {found[:16]}, expected {expected[:16]}"
                )

    @property
    def statistics(self) -> list[TensorFiles]:
        """The files that the rule needs beside the models."""
        return [*self.fishers, *self.grams]

    def _parts_of(self, expert: Path) -> dict[str, Path]:
        """Find in an expert the parts that are merged; a run writes those of several denoisers into one file."""
        if len(self.parts) > 1 and [*denoisers(expert)] == [""]:
            prefixes = tuple(f"{name}." for name in self.parts)
            if any(key.startswith(prefixes) for key in TensorFiles(weight_files(expert)).entries):
                return {"": expert}
        return parts_like(expert, self.parts, self.settings.component)

    def _check_blocks(self) -> None:
        left, num = list(self.base.entries), len(self.experts)
        for pattern, weights in self.settings.blocks.items():
            if len(weights) != num:
                raise UserError(f"blocks: {pattern!r} has {len(weights)} weights for {num} experts")
            if not any(fnmatchcase(key, pattern) for key in self.base.entries):
                raise UserError(f"blocks: no tensor matches {pattern!r}; keys are like {next(iter(self.base.entries))}")
            if not any(fnmatchcase(key, pattern) for key in left):
                raise UserError(
                    f"blocks: every tensor that matches {pattern!r} matches an earlier pattern, and the first counts; "
                    "put it before them, or leave it out"
                )
            left = [key for key in left if not fnmatchcase(key, pattern)]

    def _check_fishers(self) -> None:
        expected = {k: e.shape for k, e in self.base.entries.items()}
        lacking = [k for f in self.fishers for k in expected if k not in f.entries]
        if lacking or ("fishers" in self.rule.needs and len(self.fishers) != len(self.experts)):
            raise UserError(
                f"fishers names {len(self.fishers)} files for {len(self.experts)} experts, "
                f"without {', '.join(lacking[:3]) or 'gaps'}; expected one for each expert, "
                "with every key of the network, as deme fisher writes them"
            )
        for path, found in zip(self.settings.fishers, self.fishers, strict=True):
            if unlike := [k for k, shape in expected.items() if found.entries[k].shape != shape]:
                raise UserError(
                    f"{path}: {unlike[0]} has shape {found.entries[unlike[0]].shape}, expected {expected[unlike[0]]}, "
                    "as in the base: the information of an expert of this base"
                )

    def _check_grams(self) -> None:
        if "grams" in self.rule.needs and len(self.grams) != len(self.experts):
            raise UserError(
                f"grams names {len(self.grams)} files for {len(self.experts)} experts, expected one for each, as deme "
                "gram writes them"
            )
        for path, file in zip(self.settings.grams, self.grams, strict=True):
            for key, found in file.entries.items():
                shape = self.base.entries[key].shape if key in self.base.entries else ()
                num = math.prod(shape[1:])
                if len(shape) < 2 or found.shape != (num, num):
                    raise UserError(
                        f"{path}: {key} has shape {found.shape}, expected the inner products of a layer's inputs, "
                        f"{f'({num}, {num})' if len(shape) > 1 else 'of a layer of the base'}: of experts of this base"
                    )
            if file.entries.keys() != self.grams[0].entries.keys():
                raise UserError(f"{path} is of other layers than {self.settings.grams[0]}, expected the same in all")

    def _read_grams(self, key: str) -> list[Tensor]:
        found = [file[key] for file in self.grams if key in file.entries]
        for path, gram in zip(self.settings.grams, found, strict=False):
            if not is_finite(gram):
                raise UserError(f"{path}: {key} has NaN or infinity; make it again with deme gram")
        return found

    def _read_fishers(self, key: str) -> list[Tensor]:
        found = []
        for path, file in zip(self.settings.fishers, self.fishers, strict=True):
            if key in file.entries:
                found.append(file[key])
                if not is_finite(found[-1]) or bool((found[-1] < 0).any()):
                    raise UserError(
                        f"{path}: {key} has NaN, infinity or numbers below 0; expected squares, as deme fisher writes"
                    )
        return found

    def _kept(self, experts: list[Path]) -> dict[str, TensorFiles]:
        """Find the tensors that the base lacks and that are written as an expert has them, and whose they are."""
        kept: dict[str, TensorFiles] = {}
        for expert, path in zip(self.experts, experts, strict=True):
            for key in expert.kept:
                first = kept.setdefault(key, expert.files)
                if hash_tensors([(key, first[key])]) != hash_tensors([(key, expert.files[key])]):
                    raise UserError(f"{path}: {key} differs from another expert's, and one can be kept; drop it")
        return kept

    def _check_origin(self, experts: list[Path]) -> None:
        records = [(p, p / "expert.json" if p.is_dir() else p.parent / "expert.json") for p in experts]
        origins = [
            (p, read_record(r, "remove it, or make the expert again", base_sha256=str)["base_sha256"])
            for (p, r), expert in zip(records, self.experts, strict=True)
            # In another layout the base has other keys, and so another hash, than where the expert was made.
            if r.is_file() and getattr(expert, "pairs", None) is None
        ]
        if not origins:
            return
        found = widened_sha256(self.base)
        for path, expected in origins:
            if found != expected:
                raise UserError(
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
            UserError: an input or Fisher information has NaN or infinity, or the sum is too large for the dtype.
        """
        if key in self.kept:
            return self.kept[key][key]
        base = torch.eye(self.projections[key][1][0]) if key in self.projections else self.base[key]
        if not base.is_floating_point():
            return base
        versions = [e.tensor(key, base) for e in self.experts]
        for i in [*self.idle]:
            if not torch.equal(versions[i].to(base.dtype), base):
                self.idle.discard(i)
        fishers, grams = self._read_fishers(key), self._read_grams(key)
        if self.rule.only_finite or not self.settings.allow_non_finite:
            method = self.settings.method if self.settings.allow_non_finite else None
            for name, version in zip(self.names, [base, *versions], strict=True):
                _check_finite(f"{name}: {key}", version, method)
        seeds = [stream_seed(self.settings.seed, sha256, key) for sha256 in self.identities]
        context = Context(key, self.rule_settings, seeds, fishers, grams)
        merged = merge_tensor(self.rule, base, versions, self.weights_of(key), context)
        written = merged.to(dtype)
        if not (self.settings.allow_non_finite or is_finite(written)):
            raise UserError(
                f"{key}: the merge has values up to {merged.abs().max():.4g}, and {NAMES[dtype]} holds none beyond "
                f"{torch.finfo(dtype).max:.4g}; take smaller weights, or --set dtype=F32 or BF16"
            )
        if dtype.itemsize < merged.dtype.itemsize:
            self.changes[key] = change_of(base, versions, merged, written)
        return written


def widened_sha256(files: TensorFiles) -> str:
    """Hash a model as it trains, in float32, which is how runs record their bases."""
    return hash_tensors((k, _widened(files[k])) for k in files.entries)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _check_base(base: Path, files: TensorFiles, is_part: bool) -> None:
    if (base / PROJECTIONS_FILE).is_file() and not is_part:
        raise UserError(
            f"{base} has {PROJECTIONS_FILE}, layers that stock pipelines don't read and that aren't merged; expected a "
            "stock model: merge into the base that it was made from"
        )
    if not files.entries:
        raise UserError(f"{base} holds no tensors, expected the weights of a model; fetch or copy it again")
    if quantised := [k for k, e in files.entries.items() if e.dtype in BYTES and len(e.shape) > 1]:
        raise UserError(
            f"{base}: {quantised[0]} is of {NAMES[files.entries[quantised[0]].dtype]}, expected weights that can be "
            "added: take the model before it was quantised"
        )


def _check_finite(key: str, tensor: Tensor, method: str | None) -> None:
    if not is_finite(tensor):
        other = "or --set allow_non_finite=true" if method is None else f"since method {method} takes no others"
        raise UserError(f"{key} has NaN or infinity; expected finite weights: mend the model, {other}")
