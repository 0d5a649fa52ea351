"""Which files of a folder, an archive or a shard are images, by their names."""

from pathlib import PurePath

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
JPEG_SUFFIXES = {".jpg", ".jpeg"}


def has_suffix(name: str | PurePath, suffixes: set[str]) -> bool:
    """Say whether a file's name ends in one of some suffixes, in small letters or capitals."""
    return PurePath(name).suffix.lower() in suffixes


def is_mac_metadata(name: str) -> bool:
    """Say whether macOS added a file to what it packed, under the name of an image that begins with ``._``."""
    return PurePath(name).name.startswith("._")


def no_images(place: object, kind: str = "files") -> ValueError:
    """Make the error of a place in which no file is an image."""
    return ValueError(f"{place}: found no images, expected {kind} ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
