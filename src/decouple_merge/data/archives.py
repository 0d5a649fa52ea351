"""Image files in zip and tar archives, read when they are asked for, by any number of threads and processes."""

import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import Data
from ..errors import UserError, is_ours
from .decoded import EncodedSource
from .decoding import DamagedError
from .images import file_stamp
from .names import IMAGE_SUFFIXES, PassedOver, has_suffix, is_hidden, no_images


class Member(io.BytesIO):
    """The content of a file in an archive; as text it is the archive's path and the file's name."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name


class _Place(NamedTuple):
    offset: int
    size: int
    entry: zipfile.ZipInfo | None


class Archive(Sequence):
    """The files of an archive whose names have one of some suffixes and are not hidden, sorted by name.

    Attributes:
        passed_over: the others, links among them.

    Raises:
        UserError: the file is damaged, or a compressed tar, in which nothing is found without unpacking all.
    """

    def __init__(self, path: Path, suffixes: set[str]) -> None:
        self.path, self.passed_over = path, PassedOver()
        try:
            found = (_zip_files if path.suffix.lower() == ".zip" else _tar_files)(path, self.passed_over)
            end = max((place.offset + place.size for place in found.values()), default=0)
            if end > path.stat().st_size:
                raise UserError(f"it ends before byte {end:,}, where its last file does")
        except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, ValueError) as error:
            if is_ours(error):
                raise
            raise UserError(
                f"{path}: no whole .zip or plain .tar archive ({error}); fetch it again, and unpack a compressed tar"
            ) from error
        self.names = [name for name in sorted(found) if has_suffix(name, suffixes) and not is_hidden(name)]
        for name in found.keys() - set(self.names):
            self.passed_over.add(name)
        self._places = found

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        name = self.names[index]
        offset, size, entry = self._places[name]
        # Opened for each file: a handle that forked processes share has one position for all of them.
        with self.path.open("rb") as file:
            file.seek(offset)
            if entry is None:
                return Member(file.read(size), f"{self.path}:{name}")
            header = file.read(30)
            file.seek(sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28)), io.SEEK_CUR)
            content = file.read(size)
        try:
            if entry.compress_type == zipfile.ZIP_DEFLATED:
                # What is more than it claims isn't unpacked: it may be millions of times as much.
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, entry.file_size + 1)
            elif entry.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"compression method {entry.compress_type}, expected deflate or none")
            if zlib.crc32(content) != entry.CRC:
                raise UserError("its checksum differs")
        except (ValueError, zlib.error) as error:
            raise DamagedError(f"{self.path}:{name}: can't be read ({error}); make the archive again") from error
        return Member(content, f"{self.path}:{name}")


class ImageArchive(EncodedSource):
    """The images of a zip or tar archive, read where they lie.

    Raises:
        UserError: there are none, or as ``Archive``.
    """

    form = "a .zip or .tar of images"

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.files = Archive(Path(data.source), IMAGE_SUFFIXES)
        self.passed_over = self.files.passed_over
        if len(self.files) == 0:
            raise no_images(data.source)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Member:
        return self.files[index]

    @property
    def names(self) -> list[Path]:
        return [Path(name) for name in self.files.names]

    @property
    def identity(self) -> str:
        return repr(file_stamp(self.files.path))


def _zip_files(path: Path, passed_over: PassedOver) -> dict[str, _Place]:
    with zipfile.ZipFile(path) as archive:
        entries = [e for e in archive.infolist() if not e.is_dir()]
        if any(e.flag_bits & 1 for e in entries):
            raise UserError("it is encrypted")
        # Unix writes a file's kind here, others nothing.
        regular = [e for e in entries if stat.S_IFMT(e.external_attr >> 16) in (0, stat.S_IFREG)]
        if len(regular) < len(entries):
            passed_over["no regular files"] += len(entries) - len(regular)
        return {e.filename: _Place(e.header_offset, e.compress_size, e) for e in regular}


def _tar_files(path: Path, passed_over: PassedOver) -> dict[str, _Place]:
    found = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isreg():
                found[member.name] = _Place(member.offset_data, member.size, None)
            elif not member.isdir():
                passed_over["no regular files"] += 1
    return found
