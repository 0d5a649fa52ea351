"""Images of every source: the same pixels and hash wherever they are."""

import os
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from decouple_merge.config import Data
from decouple_merge.data import decoded
from decouple_merge.data.sources import KINDS, kind_of, load_images, open_images, open_source
from decouple_merge.errors import UserError

COLOURS = {1: (6, 8, 8), 3: (6, 8, 8, 3)}


def write_source(kind: str, folder: Path, pixels: np.ndarray) -> str:
    """Write pixels [N, H, W] or [N, H, W, 3] as a source of a kind; returns data.source."""
    if kind in ("npz", "npy"):
        path = folder / f"images.{kind}"
        if kind == "npz":
            np.savez(path, images=pixels)
        else:
            np.save(path, pixels)
        return str(path)
    pictures = [Image.fromarray(p) for p in pixels]
    if kind == "datasets":
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": pictures}, features=features).save_to_disk(folder / "rows")
        return f"datasets:{folder / 'rows'}"
    for i, picture in enumerate(pictures):
        # A folder inside, and a name in capitals, are found too; the order is that of the paths.
        path = folder / "tree" / ("a" if i < 3 else "b") / f"{i:03}{'.PNG' if i == 4 else '.png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="png")
    (folder / "tree" / "readme.txt").write_text("not an image")
    return str(folder / "tree")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["npz", "npy", "folder", "datasets"])
def test_every_source_loads_the_same_pixels(tmp_path: Path, kind: str, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, COLOURS[channels], dtype=np.uint8)
    images = load_images(Data(source=write_source(kind, tmp_path, pixels)), channels, 8)
    expected = torch.from_numpy(pixels[:, None] if channels == 1 else pixels.transpose(0, 3, 1, 2).copy())
    assert len(images) == 6
    assert torch.equal(images.stack(range(6)), expected)
    assert torch.equal(images[4], expected[4])
    assert torch.equal(images.stack([5, 0, 5]), expected[[5, 0, 5]])


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_the_hash_of_the_data_changes_with_one_pixel(tmp_path: Path, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    changed = pixels.copy()
    changed[5, 7, 7] ^= 1
    hashes = []
    for name, content in (("a", pixels), ("b", pixels), ("c", changed)):
        (tmp_path / name).mkdir()
        hashes.append(load_images(Data(source=write_source(kind, tmp_path / name, content)), 1, 8).sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_folders_of_equal_names_sizes_and_times_are_told_apart(tmp_path: Path) -> None:
    # Uncompressed files from two archives that both set the time to zero.
    opened = []
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for j in range(3):
            path = tmp_path / name / f"{j}.bmp"
            Image.fromarray(np.full((8, 8), 10 * i + j, np.uint8)).save(path)
            os.utime(path, (0, 0))
        opened.append(load_images(Data(source=str(tmp_path / name)), 1, 8))
    assert opened[0].sha256 != opened[1].sha256


def test_opening_a_folder_again_gives_the_same_images_and_hash(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    data = Data(source=write_source("folder", tmp_path, pixels))
    first = load_images(data, 1, 8)
    load_images.cache_clear()
    second = load_images(data, 1, 8)
    assert first is not second
    assert first.sha256 == second.sha256
    assert torch.equal(first.stack(range(6)), second.stack(range(6)))


@pytest.mark.parametrize("kind", ["npz", "npy", "folder"])
def test_open_images_takes_size_and_channels_from_the_images(tmp_path: Path, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    assert open_images(write_source(kind, tmp_path, pixels))[0].shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["npz", "folder", "datasets"])
def test_fit_resize_crops_resizes_and_converts(tmp_path: Path, kind: str) -> None:
    # A grey square in the middle of a wide image whose sides are white: cropped away, they leave no trace.
    pixels = np.full((3, 16, 32, 3), 255, np.uint8)
    pixels[:, :, 8:24] = 100
    images = load_images(Data(source=write_source(kind, tmp_path, pixels), fit="resize"), 1, 8)
    assert torch.equal(images.stack(range(3)), torch.full((3, 1, 8, 8), 100, dtype=torch.uint8))


def test_palette_images_count_as_colour(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = (255, 0, 0)
    Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    assert torch.equal(load_images(Data(source=str(tmp_path)), 3, 8)[0], torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["npz", "npy", "folder", "datasets"])
def test_a_source_is_told_from_what_it_was_before_without_decoding(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("decoded an image")

    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    (tmp_path / "b").mkdir()
    source = write_source(kind, tmp_path, pixels)
    monkeypatch.setattr(decoded, "decode", refuse)
    before = open_source(Data(source=source)).identity
    assert open_source(Data(source=source)).identity == before
    other = write_source(kind, tmp_path / "b", pixels[:5])
    assert open_source(Data(source=other)).identity != before


def test_a_source_is_found_by_known_name_prefix_ending_or_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images.ZIP").touch()
    (tmp_path / "folder.tar").mkdir()
    expected = {
        "fashion-mnist": "fashion-mnist",
        "datasets:a/b": "datasets:",
        "webdataset:x.tar": "webdataset:",
        str(tmp_path / "images.ZIP"): ".zip",
        str(tmp_path / "folder.tar"): "/",
    }
    assert [kind_of(name) for name in expected] == [KINDS[key] for key in expected.values()]
    assert [kind_of(name) for name in ("nowhere", "nowhere.npz", "other:x.tar")] == [None] * 3


def test_images_are_decoded_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the first of a block stays in memory."""
    begun: list[int] = []
    decode_one = decoded.DecodedImages._try_decode

    def slow(self: Any, index: int) -> Any:
        begun.append(index)
        if index == 0:
            time.sleep(0.3)
            assert max(begun) < 4
        return decode_one(self, index)

    monkeypatch.setattr(decoded, "BLOCK", 4)
    monkeypatch.setattr(decoded.DecodedImages, "_try_decode", slow)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i}.png")
    images = load_images(Data(source=str(folder)), 1, 8)
    assert images.stack(range(10))[:, 0, 0, 0].tolist() == list(range(10))
    assert sorted(begun) == list(range(10))


def test_a_model_that_is_told_how_images_were_cut_takes_no_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"is told how its images were cut \(SDXL\), which is known of files alone"):
        load_images(Data(source=str(tmp_path / "images.npy")), 1, 8).frames([0])


def test_a_data_set_that_is_made_again_of_other_files_is_other_data(tmp_path: Path) -> None:
    def build(level: int) -> str:
        names = []
        for index in range(3):
            names.append(str(tmp_path / f"{index}.png"))
            Image.new("L", (8, 8), level).save(names[-1])
        rows = datasets.Dataset.from_dict({"image": names}).cast_column("image", datasets.Image())
        rows.save_to_disk(tmp_path / "rows")
        return open_images(f"datasets:{tmp_path / 'rows'}").sha256

    assert build(0) != build(7)


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_the_size_of_an_array_is_known_without_its_pixels(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape, expected in (((3, 5, 7), (1, 5)), ((3, 5, 7, 3), (3, 5)), ((3, 5, 7, 4), (3, 5)), ((3,), (1, 1))):
        path = tmp_path / f"images.{kind}"
        if kind == "npz":
            np.savez(path, labels=np.zeros(3), arr_0=np.zeros(shape, np.uint8))
        else:
            np.save(path, np.zeros(shape, np.uint8))
        with monkeypatch.context() as patch:
            patch.setattr(np, "load", None)
            assert open_source(Data(source=str(path))).natural_shape() == expected
    with pytest.raises(UserError, match=r"found uint8 of shape \(3,\), expected uint8 \[N, H, W\]"):
        open_images(str(path))
