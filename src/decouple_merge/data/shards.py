"""Images with captions in webdataset shards: tar files, in which the members of a sample share the start of a name."""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..config import Data
from ..errors import UserError
from ..storage.reading import parse_json
from .archives import Archive, Member
from .decoded import EncodedSource
from .images import OTHER_NAME, file_stamp
from .names import IMAGE_SUFFIXES, is_hidden, no_images

PREFIX = "webdataset:"
CAPTIONS = (".txt", ".json")
# A range of more is a slip of the pen, and takes hours to look for.
MAX_SHARDS = 100_000


class _Sample(NamedTuple):
    name: str
    shard: Archive
    members: dict[str, int]
    image: int


class Shards(EncodedSource):
    """The images of webdataset shards, shard by shard, in each in the order of their names.

    A sample is an image and what has its name up to the first dot: ``a/0001.jpg``, ``a/0001.txt``, ``a/0001.json``.
    Nothing is unpacked or copied: a sample is read where it lies, by any number of threads and processes.

    Raises:
        UserError: a shard is missing or damaged, there are no images, or a sample has several.
    """

    form = captioned = f"{PREFIX}SHARDS"

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        place = data.source.removeprefix(PREFIX)
        self.paths = _shard_paths(place)
        self._samples = [sample for path in self.paths for sample in _samples(path)]
        if not self._samples:
            raise no_images(place, "members")
        for shard in {sample.shard.path: sample.shard for sample in self._samples}.values():
            self.passed_over.update(shard.passed_over)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Member:
        sample = self._samples[index]
        return sample.shard[sample.image]

    @property
    def names(self) -> list[Path]:
        return [Path(sample.shard.names[sample.image]) for sample in self._samples]

    @property
    def identity(self) -> str:
        return f"shards {[file_stamp(path) for path in self.paths]}"

    def captions(self, field: str, classes: dict[str, int] | None) -> list[Any]:
        """Read the caption of every image: its ``.txt``, or where it has none a field of its ``.json``, as it is there.

        Raises:
            UserError: a sample has neither, or they can't be read.
        """
        found, missing = [], []
        for sample in self._samples:
            suffix = next((s for s in CAPTIONS if s in sample.members), None)
            if suffix is None:
                missing.append(sample.name)
                continue
            content = sample.shard[sample.members[suffix]].getvalue()
            found.append(_caption(content, field, sample.name + suffix, suffix == ".json"))
        if missing:
            raise UserError(
                f"{missing[0]}: found an image without caption, as {len(missing)} of {len(self)} are; expected beside "
                f"it a .txt, or a .json with {field!r}"
            )
        return found


def _caption(content: bytes, field: str, name: str, is_json: bool) -> Any:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from error
    if not is_json:
        return text.strip()
    advice = f"expected JSON with the caption in {field!r}; {OTHER_NAME}"
    found = parse_json(text, name, advice)
    if not isinstance(found, dict) or field not in found:
        raise UserError(f"{name}: found {text[:80]!r}; {advice}")
    return found[field]


def _samples(path: Path) -> list[_Sample]:
    shard = Archive(path, IMAGE_SUFFIXES | set(CAPTIONS))
    groups: dict[str, dict[str, int]] = {}
    for index, name in enumerate(shard.names):
        stem, _, suffix = PurePosixPath(name).name.partition(".")
        groups.setdefault(str(PurePosixPath(name).parent / stem), {})[f".{suffix.lower()}"] = index
    samples = []
    for key, members in groups.items():
        images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
        if len(images) > 1:
            raise UserError(
                f"{path}:{key} has {' and '.join(images)}, expected one image in a sample: remove the others"
            )
        samples += [_Sample(f"{path}:{key}", shard, members, members[suffix]) for suffix in images]
    return samples


def _shard_paths(source: str) -> list[Path]:
    """List the shards that are meant: a folder's, one, or those of a range such as ``{000..127}``."""
    found = re.fullmatch(r"(.*)\{(\d{1,18})\.\.(\d{1,18})\}(.*)", source)
    if found is None:
        path = Path(source)
        paths = sorted(p for p in path.glob("*.tar") if not is_hidden(p.name)) if os.path.isdir(path) else [path]
    else:
        start, first, last, end = found.groups()
        if int(last) - int(first) >= MAX_SHARDS:
            raise UserError(
                f"{PREFIX}{source}: a range of {int(last) - int(first) + 1:,} shards, expected at most {MAX_SHARDS:,}"
            )
        paths = [Path(f"{start}{i:0{len(first)}}{end}") for i in range(int(first), int(last) + 1)]
    missing = [str(path) for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        what = f"{len(missing)} of {len(paths)} shards don't exist, {missing[0]} among them" if missing else "no shards"
        raise UserError(
            f"{PREFIX}{source}: {what}; expected a folder of .tar files, or their path with a range such as "
            "{000..127}"
        )
    return paths
