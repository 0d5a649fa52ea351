"""Data sets of the ``datasets`` library, from a folder or the hub."""

from pathlib import Path
from typing import Any

from ..config import Data
from ..errors import UserError, is_ours, not_installed
from .archives import Member
from .decoded import EncodedSource
from .decoding import DamagedError, is_jpeg
from .images import OTHER_NAME, file_stamp

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
                "set data.column, or column of deme evaluate"
            )
        if len(self.rows) == 0:
            raise UserError(f"data set {self.name!r}, split {data.split!r}: has no rows")
        # Of a row that is read, all columns are decoded.
        self.images_only = _undecoded(self.rows.select_columns([data.column]), data.column, self.name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row, name = self.images_only[index][self.data.column], f"row {index} of data set {self.name!r}"
        if row is None:
            raise DamagedError(f"{name}: has no image; remove it, or set data.skip_damaged")
        return Path(row["path"]) if row["bytes"] is None else Member(row["bytes"], name)

    @property
    def identity(self) -> str:
        # The fingerprint is of how the rows came about: made once more of other files, they have the same.
        stamps = [file_stamp(Path(file["filename"])) for file in self.rows.cache_files]
        return f"{self.name} {self.data.column} {self.images_only._fingerprint} {stamps}"

    @property
    def holds_jpeg(self) -> bool:
        """Whether the first image that can be read is JPEG: the others are not looked at."""
        return next(self._readable(is_jpeg), False)

    def captions(self, field: str, classes: dict[str, int] | None) -> list[Any]:
        if field not in self.rows.column_names:
            raise UserError(
                f"data set {self.data.source!r} has columns {', '.join(self.rows.column_names)}, expected {field!r} "
                f"for captions; {OTHER_NAME}"
            )
        return list(self.rows[field])


def _open_rows(name: str, split: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise not_installed(f"data.source {PREFIX}{name}", "datasets", "datasets") from error

    local = Path(name).is_dir() and (Path(name) / "dataset_info.json").is_file()
    try:
        if local:
            return _of_split(datasets.load_from_disk(name), name, split)
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds, from its own and from the hub's
        if is_ours(error):
            raise
        raise UserError(f"data set {name!r}, split {split!r}: {error}") from error


def _of_split(rows: Any, name: str, split: str) -> Any:
    """Require that what was saved is of the split that is asked for, where it says which it is."""
    if rows.split is not None and str(rows.split) != split:
        raise UserError(
            f"data set {name!r} was saved of split {str(rows.split)!r}, expected {split!r}: set "
            "data.split (split of deme stats; of deme evaluate images_split, or split of the reference)"
        )
    return rows


def _undecoded(rows: Any, column: str, name: str) -> Any:
    """Have images as files, which are decoded as those of any source."""
    import datasets

    if not isinstance(rows.features[column], datasets.Image):
        raise UserError(
            f"data set {name!r}: column {column!r} holds {rows.features[column]}, expected images: set data.column"
        )
    return rows.cast_column(column, datasets.Image(decode=False))
