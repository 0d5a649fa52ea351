"""Image files in a folder and below it, with their captions in metadata.jsonl or their classes as sub-folders."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Data
from ..errors import UserError
from ..models.parts import num_classes
from ..storage.reading import parse_json
from .decoded import EncodedSource
from .images import OTHER_NAME
from .names import IMAGE_SUFFIXES, PassedOver, has_suffix, is_hidden, no_images
from .prompts import read_lines

METADATA = "metadata.jsonl"


class Folder(EncodedSource):
    """The image files in a folder and below it, in the order of their paths.

    Links are followed, but no folder is entered twice. A link to nothing is an image that can't be decoded.

    Raises:
        UserError: there are none, or a folder can't be read.
    """

    form = "a folder of images"
    captioned = f"a folder of images with {METADATA}, or of classes in sub-folders for a class-conditional base"

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.path = Path(data.source)
        self.files = sorted(_image_files(self.path, self.passed_over))
        if not self.files:
            raise no_images(self.path)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Path:
        return self.files[index]

    @property
    def names(self) -> list[Path]:
        return self.files

    @property
    def identity(self) -> str:
        return repr((str(self.path.resolve()), [(str(p.relative_to(self.path)), _stamp(p)) for p in self.files]))

    def captions(self, field: str, classes: dict[str, int] | None) -> list[Any]:
        if classes is not None and not (self.path / METADATA).is_file():
            return self._classes(classes)
        return self._metadata(field)

    def _metadata(self, field: str) -> list[Any]:
        path = self.path / METADATA
        if not path.is_file():
            raise UserError(
                f"{self.path} has no {METADATA}, which holds the captions; expected there a line for each image, such "
                f'as {{"file_name": "{self.files[0].name}", "{field}": "…"}}'
            )
        captions = {}
        advice = f"expected JSON with file_name and {field!r}; {OTHER_NAME}"
        for number, line in enumerate(read_lines(path), start=1):
            if not line:
                continue
            place = f"{path}, line {number}"
            record = parse_json(line, place, advice)
            name = record.get("file_name") if isinstance(record, dict) else None
            if not isinstance(name, str) or field not in record:
                raise UserError(f"{place}: found {line[:80]!r}; {advice}")
            if self.path / name in captions:
                raise UserError(
                    f"{place}: {name} has a caption already, expected one for each image: keep one, or give each "
                    "caption a copy of the image"
                )
            captions[self.path / name] = record[field]
        if missing := [file for file in self.files if file not in captions]:
            raise UserError(
                f"{path}: {len(missing)} of {len(self.files)} images have no caption, {missing[0]} among them"
            )
        return [captions[file] for file in self.files]

    def _classes(self, classes: dict[str, int]) -> list[str]:
        parts = [file.relative_to(self.path).parts for file in self.files]
        found, num = sorted({p[0] for p in parts if len(p) > 1}), num_classes(classes)
        if loose := [p[0] for p in parts if len(p) == 1]:
            raise UserError(
                f"{self.path}: {len(loose)} images are in no class, {loose[0]} among them; expected sub-folders named "
                f"by class, or {METADATA}"
            )
        if all(name in classes for name in found):
            return [p[0] for p in parts]
        if len(found) == num:
            return [str(found.index(p[0])) for p in parts]
        unknown = [name for name in found if name not in classes]
        raise UserError(
            f"{self.path}: found {len(found)} sub-folders, of which {', '.join(unknown[:5])} are no classes of the "
            f"base; expected its names or numbers below {num}, or {num} sub-folders in the order of its classes"
        )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _image_files(folder: Path, passed_over: PassedOver) -> Iterator[Path]:
    """Find the image files below a folder, in no order; counts the others."""
    entered, waiting = set[tuple[int, int]](), deque([folder])
    while waiting:
        path = waiting.popleft()
        try:
            stat, entries = path.stat(), sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}); make it readable, or remove it") from error
        if (stat.st_dev, stat.st_ino) in entered:
            passed_over["links to folders that count already"] += 1
            continue
        entered.add((stat.st_dev, stat.st_ino))
        for entry in entries:
            if is_hidden(entry.name):
                passed_over.add(entry.name)
            elif os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                # Links come last: a folder that is there itself counts under its own name.
                (waiting.append if entry.is_symlink() else waiting.appendleft)(path / entry.name)
            elif has_suffix(entry.name, IMAGE_SUFFIXES):
                if _is_file_or_broken(entry):
                    yield path / entry.name
                else:
                    passed_over["no regular files"] += 1
            elif path / entry.name != folder / METADATA:
                passed_over.add(entry.name)


def _is_file_or_broken(entry: os.DirEntry[str]) -> bool:
    # Opening a pipe would wait for ever.
    return (os.path.isfile(entry) or not os.path.exists(entry)) if entry.is_symlink() else entry.is_file()
