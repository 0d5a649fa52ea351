"""Images from folders, archives, arrays, ``datasets``, shards and known names."""

import gzip
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..config import Data
from ..storage.files import cache_folder, write_json
from . import emoji
from .archives import ARCHIVE_SUFFIXES, Archive, DamagedError, Member
from .batches import ArrayImages, Images
from .shards import PREFIX, Shards

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}

# How images are brought to a size, as records say it.
RESIZE = "centre square, Lanczos of Pillow"

# Debian's dataset-fashion-mnist puts its files here.
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
}


class DecodedImages(Images):
    """Images that are decoded when they are asked for: files, or rows of a ``datasets`` data set.

    Attributes:
        kept: indices of the items that can be decoded.
        sizes: width and height of each of these, before they were cut.
    """

    def __init__(
        self,
        items: Sequence[Any],
        kept: Sequence[int],
        sizes: Sequence[Sequence[int]],
        sha256: str,
        channels: int,
        size: int,
        fit: str,
    ):
        self.items, self.kept, self.sizes, self.sha256 = items, kept, sizes, sha256
        self.channels, self.size, self.fit = channels, size, fit

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> UInt8[Tensor, "c h w"]:
        return decode(self.items[self.kept[index]], self.channels, self.size, self.fit)

    def frames(self, indices: Sequence[int]) -> Float[Tensor, "n 6"]:
        rows = []
        for width, height in (self.sizes[i] for i in indices):
            left, top, side = _centre(width, height)
            rows.append([height, width, round(top * self.size / side), round(left * self.size / side)])
        return torch.tensor([[*row, self.size, self.size] for row in rows], dtype=torch.float32)


def _open(item: Any) -> Image.Image:
    try:
        with nullcontext(item) if isinstance(item, Image.Image) else Image.open(item) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DamagedError(
            f"{item}: can't be decoded ({error}); mend or remove it, or set data.skip_damaged"
        ) from error


def decode(item: Any, channels: int, size: int, fit: str) -> UInt8[Tensor, "c h w"]:
    """Decode a path or a PIL image to uint8 [C, size, size].

    Raises:
        ValueError: the file is no image or is cut short, or (fit = exact) its size or channels are not the model's.
    """
    return _convert(_open(item), item, channels, size, fit)


def _centre(width: int, height: int) -> tuple[int, int, int]:
    """Find left, top and side of the largest square in the middle."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def _convert(image: Image.Image, item: Any, channels: int, size: int, fit: str) -> UInt8[Tensor, "c h w"]:
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    name = item if isinstance(item, str | Path | Member) else "an image of the data set"
    if fit == "resize":
        left, top, side = _centre(*image.size)
        square = image.crop((left, top, left + side, top + side))
        image = square.convert(mode).resize((size, size), Image.Resampling.LANCZOS)
    found = len(image.getbands()) if image.mode != "P" else 3
    if image.size != (size, size) or found != channels:
        raise ValueError(
            f"{name}: found {image.width}×{image.height} with {found} channel(s), expected {size}×{size} with "
            f"{channels}, as the base model has; set data.fit: resize to crop, resize and convert"
        )
    pixels = np.asarray(image.convert(mode))
    return torch.from_numpy(pixels.reshape(size, size, channels).transpose(2, 0, 1).copy())


def resize_images(
    images: UInt8[Tensor, "n c h w"], size: int, channels: int | None = None
) -> UInt8[Tensor, "n channels {size} {size}"]:
    """Cut images to their centre square and resize them, as ``fit: resize`` does with files.

    The filter is Pillow's Lanczos: three lobes, stretched by the factor where images shrink, so that nothing aliases;
    values are rounded to levels.
    """
    arrays = images.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array) for array in arrays]
    return torch.stack([decode(picture, channels or images.shape[1], size, "resize") for picture in pictures])


def _read_idx(path: Path) -> UInt8[np.ndarray, "n 1 h w"]:
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    header = np.frombuffer(raw[:16], dtype=">u4")
    if len(header) < 4 or header[0] != 0x803 or len(raw) != 16 + header[1:].prod():
        raise ValueError(f"{path}: not a whole IDX image file; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(header[1], 1, header[2], header[3]).copy()


def _fashion_mnist(folder: Path | None, split: str) -> UInt8[np.ndarray, "n 1 h w"]:
    name = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}.get(split)
    if name is None:
        raise ValueError(f"data.split is {split!r}, expected 'train' or 'test' for fashion-mnist")
    for place in [folder] if folder else [FASHION_FOLDER]:
        if (place / name).is_file():
            return _read_idx(place / name)
    if folder:
        raise ValueError(f"data.path is {folder}, which has no {name}; expected Fashion-MNIST's four .gz files there")
    try:
        return _read_idx(Path(pooch.retrieve(FASHION_URL + name, FASHION_FILES[name], path=cache_folder())))
    except OSError as error:
        raise ValueError(
            f"Fashion-MNIST is neither in {FASHION_FOLDER} nor can it be downloaded ({error}); "
            "install Debian's dataset-fashion-mnist, or set data.path to a folder that has it"
        ) from error


def _array_file(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if path.suffix == ".npz":
                # Where ADM's files have images, they are arr_0; the others are labels or statistics.
                loaded = loaded["arr_0" if "arr_0" in loaded.files else loaded.files[0]]
            pixels = loaded
    except (OSError, ValueError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: can't be read as a plain array ({error})") from error
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(
            f"{path}: found {pixels.dtype} of shape {pixels.shape}, expected uint8 [N, H, W] or [N, H, W, C]"
        )
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)


def array_images(path: Path) -> ArrayImages:
    """Read the images of an npz (``arr_0``, or its first array) or npy file.

    Raises:
        ValueError: the file is damaged, or the array is not uint8 [N, H, W] or [N, H, W, C].
    """
    return ArrayImages(_array_file(path))


def _checked(items: Sequence[Any], identity: str, channels: int, size: int, data: Data) -> DecodedImages:
    """Decode every item once: a bad one found hours into a training loses those hours.

    What was found is kept under the identity of the items, so that the next start decodes nothing.
    """
    key = repr((identity, channels, size, data.fit, data.skip_damaged))
    known = cache_folder() / "decoded" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if not known.exists():
        damaged, sizes, digest = [], [], hashlib.sha256()
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(lambda i: _try_decode(items, i, channels, size, data), range(len(items)))
            for index, found in enumerate(decoded):
                if found is None:
                    damaged.append(index)
                else:
                    pixels, original = found
                    sizes.append(original)
                    digest.update(pixels.numpy().data)
        write_json(known, {"damaged": damaged, "sizes": sizes, "sha256": digest.hexdigest()})
    record = json.loads(known.read_text())
    left_out = set(record["damaged"])
    kept = [i for i in range(len(items)) if i not in left_out] if left_out else range(len(items))
    if not kept:
        raise ValueError(f"{data.source}: none of the {len(items)} images can be used")
    return DecodedImages(items, kept, record["sizes"], record["sha256"], channels, size, data.fit)


def _try_decode(
    items: Sequence[Any], index: int, channels: int, size: int, data: Data
) -> tuple[Tensor, tuple[int, int]] | None:
    """Decode an item, and say its width and height before it is cut."""
    try:
        item = items[index]
        image = _open(item)
        return _convert(image, item, channels, size, data.fit), image.size
    except DamagedError:
        if data.skip_damaged:
            return None
        raise


def _image_files(path: Path) -> Iterator[Path]:
    return (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() in ARCHIVE_SUFFIXES and path.is_file()


def _archive(path: Path, channels: int, size: int, data: Data) -> DecodedImages:
    files = Archive(path, IMAGE_SUFFIXES)
    if len(files) == 0:
        raise ValueError(f"{path}: found no images, expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    stamp = path.stat()
    return _checked(files, repr((str(path.resolve()), stamp.st_size, stamp.st_mtime_ns)), channels, size, data)


def _folder(path: Path, channels: int, size: int, data: Data) -> DecodedImages:
    files = sorted(_image_files(path))
    if not files:
        raise ValueError(f"{path}: found no images, expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    stamps = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return _checked(files, repr((str(path.resolve()), stamps)), channels, size, data)


class Column(Sequence):
    """A column of images of a ``datasets`` data set, ``rows``."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.rows[index][self.column]
        except (OSError, SyntaxError) as error:
            raise DamagedError(
                f"row {index} of the data set: can't be decoded ({error}); mend or remove it, or set data.skip_damaged"
            ) from error


def _column(name: str, data: Data) -> tuple[Column, str]:
    """Open the images of a ``datasets`` data set; returns them and what identifies them."""
    import datasets

    local = Path(name).is_dir() and (Path(name) / "dataset_info.json").is_file()
    try:
        rows = datasets.load_from_disk(name) if local else datasets.load_dataset(name, split=data.split)
    except Exception as error:  # the library raises a dozen kinds, from its own and from the hub's
        raise ValueError(f"data set {name!r}, split {data.split!r}: {error}") from error
    if data.column not in rows.column_names:
        raise ValueError(
            f"data set {name!r} has columns {', '.join(rows.column_names)}, expected {data.column!r}: set data.column"
        )
    if len(rows) == 0:
        raise ValueError(f"data set {name!r}, split {data.split!r}: has no rows")
    return Column(rows, data.column), f"{name} {data.column} {rows._fingerprint}"


@lru_cache(maxsize=2)
def load_images(data: Data, channels: int, size: int) -> Images:
    """Open the images a config names, for a model of the given channels and size.

    Raises:
        ValueError: the source is unknown, missing, empty, damaged, or of another size or channel count.
    """
    source = data.source
    if source.startswith("datasets:"):
        column, identity = _column(source.removeprefix("datasets:"), data)
        return _checked(column, identity, channels, size, data)
    if source.startswith(PREFIX):
        shards = Shards(source.removeprefix(PREFIX), IMAGE_SUFFIXES)
        return _checked(shards, shards.identity, channels, size, data)
    if source == "fashion-mnist":
        pixels = _fashion_mnist(data.path, data.split)
    elif source == emoji.SOURCE:
        pixels = emoji.read_emoji(data.path)[1]
    elif Path(source).is_dir():
        return _folder(Path(source), channels, size, data)
    elif _is_archive(Path(source)):
        return _archive(Path(source), channels, size, data)
    elif Path(source).suffix in (".npz", ".npy") and Path(source).is_file():
        pixels = _array_file(Path(source))
    else:
        raise ValueError(
            f"data.source is {source!r}, expected fashion-mnist, noto-emoji, a folder or a .zip or .tar of images, an "
            ".npz or .npy file, webdataset:SHARDS or datasets:NAME"
        )
    if pixels.shape[1:] != (channels, size, size):
        if data.fit == "exact":
            raise ValueError(
                f"{source}: found images {pixels.shape[3]}×{pixels.shape[2]} with {pixels.shape[1]} channel(s), "
                f"expected {size}×{size} with {channels}, as the base model has; set data.fit: resize to crop, "
                "resize and convert"
            )
        pixels = resize_images(torch.from_numpy(pixels), size, channels).numpy()
    if len(pixels) == 0:
        raise ValueError(f"{source}: holds no images")
    return ArrayImages(pixels)


def open_images(source: str, size: int | None = None, channels: int | None = None) -> Images:
    """Open images whose size and channels are whatever the first of them has, or are brought to.

    Raises:
        ValueError: as ``load_images``; also where the images differ among themselves.
    """
    data = Data(source=source, fit="exact" if size is None else "resize")
    path = Path(source)
    if source == "fashion-mnist":
        return load_images(data, channels or 1, size or 28)
    if source == emoji.SOURCE:
        return load_images(data, channels or 3, size or emoji.SIZE)
    if path.suffix in (".npz", ".npy") and path.is_file():
        pixels = _array_file(path)
        return load_images(data, channels or pixels.shape[1], size or pixels.shape[2])
    items: Sequence[Any]
    if source.startswith("datasets:"):
        items = _column(source.removeprefix("datasets:"), data)[0]
    elif source.startswith(PREFIX):
        items = Shards(source.removeprefix(PREFIX), IMAGE_SUFFIXES)
    elif _is_archive(path):
        items = Archive(path, IMAGE_SUFFIXES)
    else:
        items = [min(found)] if (found := list(_image_files(path))) else []
    if len(items) == 0:
        raise ValueError(
            f"{source} is no model and holds no images; expected a pipeline, a folder or archive of images, an array "
            "or datasets:NAME"
        )
    image = _open(items[0])
    return load_images(data, channels or (1 if image.mode in ("L", "1", "I;16") else 3), size or image.width)


def holds_jpeg(images: Images) -> bool:
    """Say whether files are JPEG, whose compression changes features; of a data set the first image is looked at."""
    if isinstance(images, DecodedImages) and isinstance(images.items, Column):
        return getattr(images.items[0], "format", None) == "JPEG"
    return any(path.suffix.lower() in (".jpg", ".jpeg") for path in file_names(images))


def file_names(images: Images) -> list[Path]:
    """List the names of the images' files in their order; arrays and rows of a data set have none."""
    if not isinstance(images, DecodedImages) or isinstance(images.items, Column):
        return []
    names = images.items.names if isinstance(images.items, Archive | Shards) else images.items
    return [Path(names[i]) for i in images.kept]
