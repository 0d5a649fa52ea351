"""Experts as files hold them: whole sets of weights, or adapters."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..storage.layouts import model_files
from ..storage.tensors import Entry, TensorFiles
from .adapter_keys import is_adapter
from .keys import check_same_keys
from .lora import Lora


class Checkpoint:
    """An expert as a whole set of weights."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files
        self.notes: list[str] = []

    def check_keys(self, base: Mapping[str, Entry], name: str) -> None:
        """Require that the expert has the base's keys and shapes; raises a UserError as ``check_same_keys``."""
        check_same_keys(base, self.files.entries, name)

    def tensor(self, key: str, base: Tensor) -> Tensor:
        """Read the expert's version of a tensor; a projection that it doesn't have is the identity."""
        return self.files[key] if key in self.files.entries else base


Expert = Checkpoint | Lora


def open_expert(path: Path) -> Expert:
    """Open an expert: a pipeline, one of its networks, an expert folder of a run, a weights file or a LoRA.

    Raises:
        UserError: there are no weights, they are damaged, a pickle, or quantised.
    """
    opened = TensorFiles(model_files(path))
    return Lora(opened, path) if is_adapter(opened.entries) else Checkpoint(opened)
