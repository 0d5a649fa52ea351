"""Experts as files hold them: whole sets of weights, or adapters."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..config import Merge
from ..errors import UserError
from ..storage.layouts import PROJECTIONS_FILE, denoisers, weight_files
from ..storage.tensors import Entry, TensorFiles
from .adapter_keys import is_adapter
from .keys import compare_keys, describe
from .lora import Lora
from .names import pair_keys, part_of


class Checkpoint:
    """An expert as a whole set of weights.

    Attributes:
        names: the file's key of a tensor, by the base's key, where the two are in other layouts of Stable Diffusion.
        kept: keys that the base doesn't have, and that are written as they are.
        notes: lines for the user: what of the expert isn't merged.
    """

    def __init__(self, files: TensorFiles) -> None:
        self.files = files
        self.names: dict[str, str] = {}
        self.kept: list[str] = []
        self.notes: list[str] = []

    def check_keys(self, base: Mapping[str, Entry], name: str, component: str, settings: Merge) -> None:
        """Require that the expert has the base's keys and shapes, but for what the settings allow.

        Raises:
            UserError: names the keys that are missing, unknown or of another shape.
        """
        problems = self._compare(base, name, component)
        hints = list[str]()
        for kind, option, choice, others in (
            ("missing", "--missing-keys", settings.missing_keys, "base"),
            ("unknown", "--extra-keys", settings.extra_keys, "drop" if self.names else "drop or keep"),
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
        pairs = pair_keys(base, self.files.entries, part_of(component))
        if pairs is None:
            return compare_keys(base, self.files.entries)
        self.names = {key: pairs.expert.get(said, key) for said, key in pairs.base.items()}
        # Under the base's name where it has one, so that what is missing or unknown is said in the file's own words.
        found = {pairs.base.get(said, key): self.files.entries[key] for said, key in pairs.expert.items()}
        for count, whose in (
            (len(pairs.rest), "of it, for other parts, are not merged"),
            (len(base) - len(pairs.base), "of the base, for other parts, stay as they are"),
        ):
            if count:
                self.notes.append(f"{name}: in another layout than the base; {count} tensors {whose}")
        return compare_keys({key: base[key] for key in pairs.base.values()}, found)

    def tensor(self, key: str, base: Tensor) -> Tensor:
        """Read the expert's version of a tensor; of one that it doesn't have it is the base's."""
        name = self.names.get(key, key)
        return self.files[name] if name in self.files.entries else base


Expert = Checkpoint | Lora


def open_parts(parts: Mapping[str, Path]) -> TensorFiles:
    """Open the networks in some folders or files, side by side."""
    return TensorFiles.side_by_side({name: TensorFiles(weight_files(place)) for name, place in parts.items()})


def open_model(path: Path) -> TensorFiles:
    """Open a pipeline's denoisers with its projections, or the weights in any other folder or file.

    Raises:
        UserError: there are none, or they are damaged or a pickle.
    """
    parts, projections = denoisers(path), path / PROJECTIONS_FILE
    if projections.is_file() and len(parts) == 1:
        return TensorFiles([*weight_files(next(iter(parts.values()))), projections])
    return open_parts(parts)


def open_expert(path: Path, parts: Mapping[str, Path] | None = None) -> Expert:
    """Open an expert: a pipeline, one of its networks, an expert folder of a run, a weights file or a LoRA.

    Args:
        parts: where what is merged lies, by name; where not given, all denoisers of a pipeline.

    Raises:
        UserError: there are no weights, they are damaged, a pickle, or quantised.
    """
    whole = denoisers(path)
    opened = open_model(path) if parts is None or [*parts.values()] == [*whole.values()] else open_parts(parts)
    return Lora(opened, path) if is_adapter(opened.entries) else Checkpoint(opened)
