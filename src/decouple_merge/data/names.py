"""Which files of a folder, an archive or a shard are images, by their names."""

from collections import Counter
from pathlib import PurePath

from ..errors import UserError

IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"),
}
JPEG_SUFFIXES = {".jpg", ".jpeg", ".jfif"}


def has_suffix(name: str | PurePath, suffixes: set[str]) -> bool:
    """Say whether a file's name ends in one of some suffixes, in small letters or capitals."""
    return PurePath(name).suffix.lower() in suffixes


def is_hidden(name: str | PurePath) -> bool:
    """Say whether a file, or a folder that it is in, is hidden or is what macOS adds to archives.

    Such are ``.ipynb_checkpoints/1.png``, ``._1.png`` and ``__MACOSX/1.png``.
    """
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePath(name).parts)


class PassedOver(Counter[str]):
    """Numbers of the files that are not taken for images, by why; as text it is for the user."""

    def add(self, name: str | PurePath) -> None:
        """Count a file."""
        self["hidden" if is_hidden(name) else PurePath(name).suffix.lower() or "without ending"] += 1

    def __str__(self) -> str:
        return ", ".join(
            f"{count:,} {why}" for why, count in sorted(self.items(), key=lambda item: (-item[1], item[0]))
        )


def no_images(place: object, kind: str = "files") -> UserError:
    """Make the error of a place in which no file is an image."""
    return UserError(f"{place}: found no images, expected {kind} ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
