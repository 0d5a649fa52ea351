"""Data sets of the ``datasets`` library, from a folder or the hub."""

from pathlib import Path
from typing import Any

from ..config import Data
from ..errors import UserError
from .decoded import EncodedSource
from .decoding import DamagedError

PREFIX = "datasets:"


class Rows(EncodedSource):
    """A column of images of a ``datasets`` data set.

    Raises:
        UserError: there is no such data set or column, or it is empty.
    """

    form = captioned = f"{PREFIX}NAME"

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.name = data.source.removeprefix(PREFIX)
        self.rows = _open_rows(self.name, data.split)
        if data.column not in self.rows.column_names:
            raise UserError(
                f"data set {self.name!r} has columns {', '.join(self.rows.column_names)}, expected {data.column!r}: "
                "set data.column"
            )
        if len(self.rows) == 0:
            raise UserError(f"data set {self.name!r}, split {data.split!r}: has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.rows[index][self.data.column]
        except (OSError, SyntaxError) as error:
            raise DamagedError(
                f"row {index} of the data set: can't be decoded ({error}); mend or remove it, or set data.skip_damaged"
            ) from error

    @property
    def identity(self) -> str:
        return f"{self.name} {self.data.column} {self.rows._fingerprint}"

    @property
    def holds_jpeg(self) -> bool:
        """Whether the first image is JPEG: the others are not looked at."""
        return getattr(self[0], "format", None) == "JPEG"

    def captions(self, field: str, classes: dict[str, int] | None) -> list[Any]:
        if field not in self.rows.column_names:
            raise UserError(
                f"data set {self.data.source!r} has columns {', '.join(self.rows.column_names)}, expected {field!r} "
                "for captions: set data.caption_column"
            )
        return list(self.rows[field])


def _open_rows(name: str, split: str) -> Any:
    import datasets

    local = Path(name).is_dir() and (Path(name) / "dataset_info.json").is_file()
    try:
        return datasets.load_from_disk(name) if local else datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds, from its own and from the hub's
        raise UserError(f"data set {name!r}, split {split!r}: {error}") from error
