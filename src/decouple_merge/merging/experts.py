"""Experts as files hold them: whole sets of weights, or adapters."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..config import Merge
from ..errors import UserError
from ..storage.layouts import PROJECTIONS_FILE, denoisers, files_of_parts, weight_files
from ..storage.tensors import NAMES, Entry, TensorFiles
from .adapter_keys import is_adapter
from .keys import compare_keys, describe
from .lora import Lora
from .originals import pair_keys
from .part_names import Stored, store


class Checkpoint:
    """An expert as a whole set of weights.

    Attributes:
        pairs: what a tensor of the base is made of, and how the file has it, by the base's key, where the two are in
            other layouts of Stable Diffusion; None where the keys are the same.
        kept: keys that the base doesn't have, and that are written as they are.
        notes: lines for the user: what of the expert isn't merged.
    """

    def __init__(self, files: TensorFiles) -> None:
        self.files = files
        self.pairs: dict[str, list[tuple[Stored, Stored | None]]] | None = None
        self.kept: list[str] = []
        self.notes: list[str] = []

    def whole_sha256(self, tensors: str) -> str:
        """Add to the hash of the tensors what else the expert is made of: nothing."""
        return tensors

    def check_keys(self, base: Mapping[str, Entry], name: str, component: str, settings: Merge) -> None:
        """Require that the expert has the base's keys and shapes, but for what the settings allow.

        Raises:
            UserError: names the keys that are missing, unknown or of another shape.
        """
        problems = self._compare(base, name, component)
        for key, own in self.files.entries.items():
            if key in base and own.dtype.is_floating_point != base[key].dtype.is_floating_point:
                raise UserError(
                    f"{name}: {key} is of {NAMES[own.dtype]}, the base's of {NAMES[base[key].dtype]}, and the two "
                    "can't be added: take the model before it was quantised"
                )
        hints = list[str]()
        for kind, option, choice, others in (
            ("missing", "--missing-keys", settings.missing_keys, "base"),
            ("unknown", "--extra-keys", settings.extra_keys, "drop or keep" if self.pairs is None else "drop"),
        ):
            if problems[kind] and choice in others:
                self.notes.append(f"{name}: {option} {choice} of {describe({kind: problems[kind]})}")
                self.kept = problems[kind] if choice == "keep" else self.kept
                problems[kind] = []
            elif problems[kind]:
                hints.append(f", or {option} {others}")
        if found := describe(problems):
            raise UserError(
                f"{name} doesn't fit the base: {found}; expected an expert finetuned from this base{''.join(hints)}"
            )

    def _compare(self, base: Mapping[str, Entry], name: str, component: str) -> dict[str, list[str]]:
        """List the keys that don't fit, after a translation where one is needed."""
        pairs = pair_keys(base, self.files.entries, component)
        if pairs is None:
            return compare_keys(base, self.files.entries)
        problems, self.pairs = pairs.compare(base, self.files.entries), pairs.by_key()
        for keys, stored, whose in (
            (self.files.entries, pairs.expert, "of it, for other parts, are not merged"),
            (base, pairs.base, "of the base, for other parts, stay as they are"),
        ):
            if count := len(keys) - len({s.key for s in stored.values()}):
                self.notes.append(f"{name}: {count} tensors {whose}")
        return problems

    def tensor(self, key: str, base: Tensor) -> Tensor:
        """Read the expert's version of a tensor; of one that it doesn't have it is the base's."""
        if self.pairs is None:
            return self.files[key] if key in self.files.entries else base
        if key not in self.pairs:
            return base
        pairs = self.pairs[key]
        tensors = [theirs.read(self.files[theirs.key]) if theirs else mine.read(base) for mine, theirs in pairs]
        return store([mine for mine, _ in pairs], tensors, base.shape)


Expert = Checkpoint | Lora


def open_parts(parts: Mapping[str, Path]) -> TensorFiles:
    """Open the networks in some folders or files, side by side."""
    return TensorFiles.side_by_side({name: TensorFiles(weight_files(place)) for name, place in parts.items()})


def open_model(path: Path) -> TensorFiles:
    """Open a pipeline's denoisers with its projections, or the weights in any other folder or file.

    Raises:
        UserError: there are none, or they are damaged or a pickle.
    """
    return TensorFiles.side_by_side({name: TensorFiles(files) for name, files in files_of_parts(path).items()})


def open_expert(path: Path, parts: Mapping[str, Path] | None = None) -> Expert:
    """Open an expert: a pipeline, one of its networks, an expert folder of a run, a weights file or a LoRA.

    Args:
        parts: where what is merged lies, by name; where not given, all denoisers of a pipeline.

    Raises:
        UserError: there are no weights, they are damaged, a pickle, or quantised.
    """
    # A part may be chosen of a pipeline that has no denoiser.
    projected = parts and (path / PROJECTIONS_FILE).is_file() and [*parts.values()] == [*denoisers(path).values()]
    opened = open_model(path) if parts is None or projected else open_parts(parts)
    return Lora(opened, path) if is_adapter(opened.entries) else Checkpoint(opened)
