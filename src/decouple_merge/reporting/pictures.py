"""Pictures that a page carries in itself: grids of images, and figures, small enough."""

import base64
import io
from pathlib import Path

from PIL import Image

NUM_COLUMNS, NUM_ROWS = 8, 4
# Images below this are shown by whole pixels, and written without loss.
SMALL = 96
MAX_GRID_WIDTH = 1536
MAX_FIGURE_WIDTH = 1400


def grid(files: list[Path], scale: float = 1.0) -> str:
    """Put images beside each other, eight a row, and write them as a data URI; small ones as PNG, others as WebP.

    Args:
        scale: of images that aren't small.
    """
    images = [Image.open(f).convert("RGB") for f in files[: NUM_COLUMNS * NUM_ROWS]]
    width, height = images[0].size
    is_small = max(width, height) <= SMALL
    if not is_small:
        scale = min(1.0, MAX_GRID_WIDTH / NUM_COLUMNS / width) * scale
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        images = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
    columns = min(NUM_COLUMNS, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return _uri(sheet, "PNG") if is_small else _uri(sheet, "WEBP", quality=88, method=4)


def figure(file: Path, scale: float = 1.0) -> tuple[str, int, int]:
    """Write a figure as a PNG's data URI, with its width and height.

    Args:
        scale: below 1 also in a palette, which takes a third of the bytes and makes ramps coarse.
    """
    image = Image.open(file).convert("RGB")
    shrunk = min(1.0, MAX_FIGURE_WIDTH / image.width) * scale
    if shrunk < 1:
        size = max(1, round(image.width * shrunk)), max(1, round(image.height * shrunk))
        image = image.resize(size, Image.Resampling.LANCZOS)
    if scale < 1:
        # Without dithering: flat colours stay flat.
        image = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return _uri(image, "PNG", optimize=True), image.width, image.height


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
