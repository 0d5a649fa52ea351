"""Images with captions in webdataset shards: tar files, in which the members of a sample share the start of a name."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .archives import Archive

PREFIX = "webdataset:"
CAPTIONS = (".txt", ".json")


class _Sample(NamedTuple):
    name: str
    shard: Archive
    members: dict[str, int]
    image: int


class Shards(Sequence):
    """The images of webdataset shards, shard by shard, in each in the order of their names.

    A sample is an image and what has its name up to the first dot: ``a/0001.jpg``, ``a/0001.txt``, ``a/0001.json``.
    Nothing is unpacked or copied: a sample is read where it lies, by any number of threads and processes.

    Attributes:
        names: of the images in their shards.

    Raises:
        ValueError: a shard is missing or damaged, there are no images, or a sample has several.
    """

    def __init__(self, source: str, suffixes: set[str]) -> None:
        self.paths = _shard_paths(source)
        self._samples = [sample for path in self.paths for sample in _samples(path, suffixes)]
        self.names = [sample.shard.names[sample.image] for sample in self._samples]
        if not self._samples:
            raise ValueError(f"{source}: found no images, expected members ending in {', '.join(sorted(suffixes))}")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        sample = self._samples[index]
        return sample.shard[sample.image]

    @property
    def identity(self) -> str:
        """All that tells these files from others, without reading them."""
        stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return f"shards {stamps}"

    def captions(self, field: str) -> list[Any]:
        """Read the caption of every image: its ``.txt``, or where it has none a field of its ``.json``, as it is there.

        Raises:
            ValueError: a sample has neither, or they can't be read.
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
            raise ValueError(
                f"{missing[0]}: found an image without caption, as {len(missing)} of {len(self)} are; expected beside "
                f"it a .txt, or a .json with {field!r}"
            )
        return found


def _caption(content: bytes, field: str, name: str, is_json: bool) -> Any:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from error
    if not is_json:
        return text.strip()
    try:
        return json.loads(text)[field]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name}: expected JSON with the caption in {field!r} ({error!r}), found {text[:80]!r}; set "
            "data.caption_column where captions have another name"
        ) from error


def _samples(path: Path, suffixes: set[str]) -> list[_Sample]:
    shard = Archive(path, suffixes | set(CAPTIONS))
    groups: dict[str, dict[str, int]] = {}
    for index, name in enumerate(shard.names):
        stem, _, suffix = PurePosixPath(name).name.partition(".")
        groups.setdefault(str(PurePosixPath(name).parent / stem), {})[f".{suffix.lower()}"] = index
    samples = []
    for key, members in groups.items():
        images = [suffix for suffix in members if suffix in suffixes]
        if len(images) > 1:
            raise ValueError(
                f"{path}:{key} has {' and '.join(images)}, expected one image in a sample: remove the others"
            )
        samples += [_Sample(f"{path}:{key}", shard, members, members[suffix]) for suffix in images]
    return samples


def _shard_paths(source: str) -> list[Path]:
    """List the shards that are meant: a folder's, one, or those of a range such as ``{000..127}``."""
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", source)
    if found is None:
        path = Path(source)
        paths = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    else:
        start, first, last, end = found.groups()
        paths = [Path(f"{start}{i:0{len(first)}}{end}") for i in range(int(first), int(last) + 1)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"{len(missing)} of {len(paths)} shards don't exist, {missing[0]} among them" if missing else "no shards"
        raise ValueError(
            f"{PREFIX}{source}: {what}; expected a folder of .tar files, or their path with a range such as "
            "{000..127}"
        )
    return paths
