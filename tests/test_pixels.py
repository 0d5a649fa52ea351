"""From files to the 8-bit pixels that a viewer shows, whatever the file's kind."""

import contextlib
import io
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from decouple_merge.config import Data, Protocol
from decouple_merge.data import decoded, decoding
from decouple_merge.data.decoding import DamagedError, decode
from decouple_merge.data.sources import load_images, open_images
from decouple_merge.errors import UserError
from decouple_merge.evaluation import evaluate
from decouple_merge.evaluation.scored_images import Scored

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
IN_8_BITS = np.rint(RAMP / 257).astype(np.uint8)
RED, GREEN = (255, 0, 0), (0, 255, 0)


def encoded(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return io.BytesIO(buffer.getvalue())


def pixels(item: Any, channels: int = 3, size: int = 8, fit: str = "exact") -> np.ndarray:
    found = decode(item, channels, size, fit).pixels.permute(1, 2, 0).numpy()
    return found[..., 0] if channels == 1 else found


def tiff(levels: bytes, bits: int, photometric: int = 1, sample_format: int = 1) -> io.BytesIO:
    """Write a grey 8×8 TIFF of any depth by hand."""
    tags = [(256, 3, 8), (257, 3, 8), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 3, 8), (279, 4, len(levels)), (339, 3, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return io.BytesIO(struct.pack("<2sHI", b"II", 42, 8 + len(levels)) + levels + directory)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_grey_of_16_bits_is_scaled(kind: str) -> None:
    file = encoded(Image.fromarray(RAMP), kind)
    assert np.array_equal(pixels(file, 1), IN_8_BITS)
    assert np.array_equal(pixels(file, 1, fit="resize"), IN_8_BITS)


@pytest.mark.parametrize("array", [RAMP, RAMP.astype(">u2"), RAMP.astype(np.int32)], ids=["I;16", "I;16B", "I"])
def test_integers_of_more_than_8_bits_are_scaled_in_pillows_pictures_too(array: np.ndarray) -> None:
    assert np.array_equal(pixels(Image.fromarray(array), 1), IN_8_BITS)


def test_floats_are_0_to_1() -> None:
    file = encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "tiff")
    assert np.array_equal(pixels(file, 1), IN_8_BITS)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((8, 8), 70000, np.int32), "found values 70000 to 70000 .*mode I.*, expected 0 to 65,535"),
        (np.full((8, 8), -1, np.int32), "found values -1 to -1 "),
        (
            np.full((8, 8), 200, np.float32),
            r"found values 200 to 200 .*mode F.*, expected 0 to 1; which of them is white",
        ),
        (np.full((8, 8), -0.1, np.float32), "found values -0.1 to -0.1 "),
        (np.full((8, 8), np.nan, np.float32), "found values nan to nan "),
        (np.full((8, 8), np.inf, np.float32), "found values inf to inf "),
    ],
)
def test_levels_that_can_not_be_known_are_refused_and_not_skipped(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    Image.fromarray(array).save(tmp_path / "a.tiff")
    for skip_damaged in (False, True):
        with pytest.raises(ValueError, match=rf"a\.tiff: {message}"):
            load_images(Data(source=str(tmp_path), skip_damaged=skip_damaged), 1, 8)


def test_a_tiff_of_12_bits_is_scaled_by_its_own_range() -> None:
    levels = np.linspace(0, 4095, 64).astype(int).tolist()
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in zip(levels[::2], levels[1::2], strict=True)
    )
    expected = np.rint(np.reshape(levels, (8, 8)) / 4095 * 255)
    assert np.array_equal(pixels(tiff(packed, 12), 1), expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_white_may_be_zero(bits: int) -> None:
    levels = RAMP.astype("<u2") if bits == 16 else IN_8_BITS
    assert np.array_equal(pixels(tiff(levels.tobytes(), bits, photometric=0), 1), 255 - IN_8_BITS)
    assert np.array_equal(pixels(tiff(levels.tobytes(), bits, photometric=1), 1), IN_8_BITS)


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_exif_turns_an_image(kind: str, orientation: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    file = encoded(Image.fromarray(array), kind, exif=exif, **options)
    assert np.array_equal(pixels(file), TURNS[orientation](array))


def test_a_turned_image_is_cut_as_it_is_shown_and_its_original_size_is_that() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = decode(encoded(Image.new("RGB", (32, 16)), "jpeg", exif=exif), 3, 8, "resize")
    assert found.original == (16, 32)


def clear(mode: str) -> io.BytesIO:
    """Write an image whose left half is transparent over garbage, and whose right half is opaque black."""
    alpha = Image.fromarray(np.repeat([[0] * 4 + [255] * 4], 8, 0).astype(np.uint8))
    garbage = Image.fromarray(np.random.default_rng(0).integers(1, 200, (8, 8), dtype=np.uint8))
    garbage.paste(0, (4, 0, 8, 8))
    if mode == "P":
        image = Image.fromarray(np.repeat([[1] * 4 + [0] * 4], 8, 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 200, 30, 30])
        return encoded(image, "png", transparency=1)
    if mode == "I;16":
        image = Image.fromarray(np.repeat([[7777] * 4 + [0] * 4], 8, 0).astype(np.uint16))
        return encoded(image, "png", transparency=7777)
    if mode in ("L", "RGB"):
        colour = 77 if mode == "L" else (77, 7, 7)
        image = Image.new(mode, (8, 8))
        image.paste(colour, (0, 0, 4, 8))
        return encoded(image, "png", transparency=colour)
    image = garbage.convert(mode.removesuffix("A"))
    image.putalpha(alpha)
    return encoded(image, "png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_what_is_transparent_is_white(mode: str) -> None:
    expected = np.repeat([[255] * 4 + [0] * 4], 8, 0)
    for channels in (1, 3) if mode in ("LA", "L", "I;16") else (3,):
        found = pixels(clear(mode), channels)
        assert np.array_equal(found if channels == 1 else found[..., 0], expected)
    # Before it is made smaller: else garbage would bleed over the edge.
    small = pixels(clear(mode), 3, 4, "resize")
    whole = Image.fromarray(np.repeat(expected[..., None], 3, 2).astype(np.uint8))
    assert np.array_equal(small, np.asarray(whole.resize((4, 4), Image.Resampling.LANCZOS)))


def test_half_transparent_colour_is_mixed_with_white() -> None:
    file = encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 51)), "png")
    assert pixels(file)[0, 0].tolist() == [255, 204, 204]


def test_a_model_of_four_channels_keeps_alpha() -> None:
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    assert np.array_equal(pixels(encoded(Image.fromarray(array), "png"), 4), array)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), RED).convert(mode)
    assert np.abs(pixels(encoded(image, "tiff")).astype(int) - RED).max() <= 2


def test_a_model_of_two_channels_has_no_images() -> None:
    with pytest.raises(ValueError, match=r"images have 1, 3 or 4 channels, expected 2, as the base model has"):
        decode(encoded(Image.new("L", (8, 8)), "png"), 2, 8, "resize")


@pytest.mark.parametrize(("kind", "options"), [("gif", {}), ("png", {}), ("webp", {"lossless": True}), ("tiff", {})])
def test_of_several_pictures_the_first_is_used_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, options: dict[str, Any]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    frames[0].save(folder / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    Image.new("RGB", (8, 8)).save(folder / "b.png")
    assert pixels(folder / f"a.{kind}")[0, 0].tolist() == list(RED)
    for _ in range(2):  # from the cache too
        load_images.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "decouple_merge"):
            load_images(Data(source=str(folder)), 3, 8)
        assert caplog.messages == [f"{folder}: 2 images; of 1 files with several pictures the first is used"]


def bomb(width: int) -> bytes:
    """Write a PNG that claims a width and holds nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, width, 8, 0, 0, 0, 0)
    end = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, b"IDAT" + zlib.compress(b""), b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + end


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        bomb(10_000),
        bomb(60_000),
        bomb(0),
        bomb(8),
        b"GIF89a" + b"\0" * 7,
        b"P5 0 0 255\n",
        b"P6 8 8 x",
    ],
    ids=["empty", "text", "bomb that warns", "bomb", "no pixels", "no data", "gif", "pgm", "ppm"],
)
def test_what_can_not_be_decoded_is_one_error_and_is_skipped_where_asked(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.png").write_bytes(content)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DamagedError, match=r"b\.png: can't be decoded .*; mend or remove it, or set data.skip_damaged"):
        load_images(Data(source=str(tmp_path)), 1, 8)
    assert len(load_images(Data(source=str(tmp_path), skip_damaged=True), 1, 8)) == 1
    # Where size and channels aren't known before, the first in the folder may be the damaged one.
    (tmp_path / "0.png").write_bytes(content)
    for skipped in (open_images(str(tmp_path), skip_damaged=True), open_images(str(tmp_path), 4, skip_damaged=True)):
        assert len(skipped) == 1
    with pytest.raises(DamagedError, match=r"skip_damaged of deme stats and evaluate"):
        open_images(str(tmp_path))


@pytest.mark.parametrize("kind", ["png", "gif", "bmp", "tiff", "webp", "jpeg", "avif", "ppm"])
def test_files_with_any_byte_changed_are_decoded_or_refused(kind: str) -> None:
    whole = encoded(Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), kind).getvalue()
    rng = np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 300), 3):
            changed[place] = rng.integers(256)
        # Else it is decoded: any other error ends the test.
        with contextlib.suppress(DamagedError):
            assert pixels(io.BytesIO(bytes(changed)), fit="resize").shape == (8, 8, 3)


def mixed(folder: Path, colour: bool = True) -> str:
    """Write a folder of grey files, of which the last is in colour if asked for."""
    folder.mkdir()
    for i in range(3):
        Image.new("L", (8, 8), 50 * i).save(folder / f"{i}.png")
    Image.fromarray(RAMP).save(folder / "3.png")
    if colour:
        Image.new("RGB", (8, 8), RED).save(folder / "4.png")
    return str(folder)


@pytest.mark.parametrize("size", [None, 4])
def test_a_folder_is_in_colour_if_one_file_is_and_not_as_its_first_is(tmp_path: Path, size: int | None) -> None:
    images = open_images(mixed(tmp_path / "mixed"), size)
    assert images[1][:, 0, 0].tolist() == [50, 50, 50]
    assert images[4][:, 0, 0].tolist() == list(RED)
    assert open_images(mixed(tmp_path / "grey", colour=False), size)[0].shape[0] == 1


def test_the_shape_of_a_folder_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = mixed(tmp_path / "mixed")
    first = open_images(source)

    def refuse(*args: Any) -> None:
        raise AssertionError("opened an image")

    for name in ("decode", "has_colour", "open_image"):
        monkeypatch.setattr(decoded, name, refuse)
    load_images.cache_clear()
    assert open_images(source).sha256 == first.sha256


def test_grey_files_are_colour_for_a_colour_model_and_colour_is_not_grey(tmp_path: Path) -> None:
    source = mixed(tmp_path / "mixed")
    assert load_images(Data(source=source), 3, 8)[1][:, 0, 0].tolist() == [50, 50, 50]
    with pytest.raises(ValueError, match=r"4\.png: found 8×8 with 3 channel\(s\), expected 8×8 with 1"):
        load_images(Data(source=source), 1, 8)


def test_another_version_of_decoding_decodes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = mixed(tmp_path / "mixed")
    before = load_images(Data(source=source), 3, 8).sha256
    monkeypatch.setattr(decoded, "VERSION", decoding.VERSION + 1)
    monkeypatch.setattr(
        decoded, "decode", lambda *args: decode(*args)._replace(pixels=torch.zeros(3, 8, 8, dtype=torch.uint8))
    )
    load_images.cache_clear()
    assert load_images(Data(source=source), 3, 8).sha256 != before


def test_rows_of_a_data_set_are_decoded_as_files_are(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for i, mode in enumerate(["RGBA", "LA", "P", "I;16"]):
        (folder / f"{i}.png").write_bytes(clear(mode).getvalue())
    files = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.iterdir())]
    rows = datasets.Dataset.from_dict({"image": files}, datasets.Features({"image": datasets.Image()}))
    rows.save_to_disk(tmp_path / "rows")
    assert (
        load_images(Data(source=f"datasets:{tmp_path}/rows"), 3, 8).sha256
        == load_images(Data(source=str(folder)), 3, 8).sha256
    )


def test_rows_without_an_image_and_columns_of_something_else_are_named(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [Image.new("L", (8, 8)), None], "n": [1, 2]}, features)
    rows.save_to_disk(tmp_path / "rows")
    source = f"datasets:{tmp_path}/rows"
    with pytest.raises(
        ValueError, match=r"row 1 of data set .*rows': has no image; remove it, or set data.skip_damaged"
    ):
        load_images(Data(source=source), 1, 8)
    assert len(load_images(Data(source=source, skip_damaged=True), 1, 8)) == 1
    with pytest.raises(ValueError, match=r"column 'n' holds .*, expected images: set data\.column"):
        load_images(Data(source=source, column="n"), 1, 8)


@pytest.mark.parametrize("shape", [(4, 0, 0), (4, 0, 8, 3), (4, 8, 0, 1)])
def test_arrays_without_pixels_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="which have no pixels"):
        open_images(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("shape", [(4, 8, 8, 2), (4, 8, 8, 5), (4, 8, 8, 0), (4, 1, 8, 8, 3)])
def test_arrays_of_other_channels_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "a.npz", np.zeros(shape, np.uint8))
    for size in (None, 4):
        with pytest.raises(ValueError, match=r"found uint8 of shape .*expected uint8 .* with 1, 3 or 4 channels"):
            open_images(str(tmp_path / "a.npz"), size)


def test_arrays_with_alpha_are_laid_on_white_and_without_images_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((2, 8, 8, 4), (9, 9, 9, 0), np.uint8))
    assert open_images(str(tmp_path / "a.npy"))[0].unique().tolist() == [255]
    np.save(tmp_path / "b.npy", np.zeros((0, 8, 8), np.uint8))
    for fit in ("exact", "resize"):
        with pytest.raises(ValueError, match="holds no images"):
            load_images(Data(source=str(tmp_path / "b.npy"), fit=fit), 1, 4)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("num", [2**46, 2**62, 10**30])
def test_an_array_that_claims_more_than_memory_is_one_error(tmp_path: Path, suffix: str, num: int) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({num}, 8, 8), }}\n".encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", content)
    with pytest.raises(ValueError, match=r"a\.np[yz]: an array says [\d,]+ bytes of uint8, and has at most"):
        load_images(Data(source=str(path)), 1, 8)


def test_a_reference_in_colour_is_not_turned_grey_for_what_is_scored(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    scored = Scored(lambda share: [], channels=1, size=8)
    with pytest.raises(UserError, match=r"found images 8×8 with 3 channel\(s\), expected 8×8 with 1"):
        evaluate._open_reference(str(tmp_path), scored, Protocol(image_size=8))
