"""Images of every source, and batches that depend only on seed, rank and step."""

import gzip
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from decouple_merge.config import Data
from decouple_merge.data.batches import held_out_images, training_batches
from decouple_merge.data.fashion import FOLDER
from decouple_merge.data.images import ArrayImages, to_model, to_pixels
from decouple_merge.data.sources import load_images, open_images

NUM_IMAGES, HELD_OUT = 50, 10


def numbered(num: int = NUM_IMAGES) -> ArrayImages:
    """Make images whose left pixel says which one it is; the right pixel is 255, so that a flip shows."""
    pixels = np.full((num, 1, 2, 2), 255, np.uint8)
    pixels[..., 0] = np.arange(num)[:, None, None]
    return ArrayImages(pixels)


def numbers(batch: torch.Tensor) -> list[int]:
    return batch.amin((1, 2, 3)).tolist()


def numbers_of_all(several: list[torch.Tensor]) -> list[int]:
    return [n for batch in several for n in numbers(batch)]


def batches(
    first: int, last: int, *, batch_size: int = 8, seed: int = 0, rank: int = 0, world: int = 1, **data: object
) -> list[torch.Tensor]:
    settings = Data.model_validate({"num_held_out": HELD_OUT, **data})
    return list(training_batches(numbered(), settings, batch_size, seed, first, last, rank, world))


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("first", [1, 5, 11])
def test_resuming_at_a_step_gives_the_tail_of_a_whole_run(first: int) -> None:
    whole = batches(0, 12, flip=True)
    assert len(whole) == 12
    assert equal(batches(first, 12, flip=True), whole[first:])


def test_a_batch_depends_on_the_seed() -> None:
    assert not equal(batches(0, 3), batches(0, 3, seed=1))


def test_batches_do_not_depend_on_the_global_random_state() -> None:
    torch.manual_seed(1)
    first = batches(0, 4, flip=True)
    torch.manual_seed(2)
    assert equal(first, batches(0, 4, flip=True))


def test_two_ranks_with_half_the_batch_cover_the_images_of_one() -> None:
    whole = batches(0, 12, batch_size=8)
    halves = [batches(0, 12, batch_size=4, rank=r, world=2) for r in (0, 1)]
    assert equal([torch.cat(pair) for pair in zip(*halves, strict=True)], whole)


def test_every_image_is_seen_once_an_epoch_in_another_order_each_time() -> None:
    # 40 images are 5 batches of 8.
    epochs = [numbers_of_all(batches(5 * e, 5 * e + 5)) for e in range(3)]
    assert all(sorted(e) == list(range(NUM_IMAGES - HELD_OUT)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_epochs_follow_each_other_without_loss_where_batches_do_not_divide_them() -> None:
    seen = numbers_of_all(batches(0, 40, batch_size=7))
    for epoch in range(7):
        assert sorted(seen[40 * epoch : 40 * epoch + 40]) == list(range(40))


def test_held_out_images_are_never_trained_on() -> None:
    seen = set(numbers_of_all(batches(0, 30)))
    held_out = numbers(held_out_images(numbered(), Data(num_held_out=HELD_OUT)))
    assert held_out == list(range(NUM_IMAGES - HELD_OUT, NUM_IMAGES))
    assert seen.isdisjoint(held_out)


def test_flips_mirror_about_half_of_the_images_and_change_nothing_else() -> None:
    plain, flipped = torch.cat(batches(0, 50)), torch.cat(batches(0, 50, flip=True))
    is_flipped = (flipped[:, 0, 0, 0] == 255).tolist()
    assert torch.equal(torch.where(torch.tensor(is_flipped)[:, None, None, None], flipped.flip(-1), flipped), plain)
    assert 0.4 < sum(is_flipped) / len(is_flipped) < 0.6


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loader_workers_change_nothing() -> None:
    assert equal(batches(3, 9, flip=True, num_workers=2), batches(3, 9, flip=True, num_workers=0))


def test_training_batches_keep_the_data_intact() -> None:
    images = numbered()
    for batch in training_batches(images, Data(num_held_out=HELD_OUT, flip=True), 8, 0, 0, 6):
        batch.zero_()
    assert torch.equal(images.pixels, numbered().pixels)


def test_every_pixel_value_survives_the_way_to_the_model_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = to_model(pixels)
    assert (x.dtype, x.min(), x.max()) == (torch.float32, -1, 1)
    assert torch.equal(to_pixels(x), pixels)


def test_values_outside_of_the_range_are_clamped() -> None:
    x = torch.tensor([-9.0, -1.001, 1.001, 9.0]).reshape(1, 1, 2, 2)
    assert to_pixels(x).flatten().tolist() == [0, 0, 255, 255]


# -- sources

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


# -- Fashion-MNIST


def write_idx(folder: Path, name: str, pixels: np.ndarray) -> None:
    header = np.array([0x803, *pixels.shape], dtype=">u4").tobytes()
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(header + pixels.tobytes()))


@pytest.mark.filterwarnings("error")
def test_fashion_mnist_loads_from_a_folder_that_the_user_names(tmp_path: Path) -> None:
    splits = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}
    for i, (split, name) in enumerate(splits.items()):
        pixels = np.random.default_rng(i).integers(0, 256, (5 + i, 28, 28), dtype=np.uint8)
        write_idx(tmp_path, name, pixels)
        images = load_images(Data(path=tmp_path, split=split), 1, 28)
        assert torch.equal(images.stack(range(len(images))), torch.from_numpy(pixels[:, None]))


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"Debian's dataset-fashion-mnist is not in {FOLDER}")
@pytest.mark.parametrize(("split", "num"), [("train", 60_000), ("test", 10_000)])
def test_fashion_mnist_loads_from_debians_folder(split: str, num: int) -> None:
    images = load_images(Data(split=split), 1, 28)
    assert (len(images), images[0].shape) == (num, (1, 28, 28))
    # The published mean of the pixels, 0.2860 of 255 for the training images.
    assert float(images.stack(range(num)).float().mean() / 255) == pytest.approx(0.286, abs=1e-3)


def test_a_folder_without_fashion_mnist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"which has no train-images-idx3-ubyte\.gz"):
        load_images(Data(path=tmp_path), 1, 28)


def test_an_unknown_split_of_fashion_mnist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.split is 'validation', expected 'train' or 'test'"):
        load_images(Data(path=tmp_path, split="validation"), 1, 28)


@pytest.mark.parametrize("damage", ["cut", "changed", "not gzip", "wrong size"])
def test_a_damaged_fashion_mnist_file_is_named(tmp_path: Path, damage: str) -> None:
    name = "train-images-idx3-ubyte.gz"
    write_idx(tmp_path, name, np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8))
    whole = (tmp_path / name).read_bytes()
    content = {
        "cut": whole[: len(whole) // 2],
        "changed": whole[:10] + bytes([0xFF] * 40) + whole[50:],
        "not gzip": b"<html>not found</html>",
        "wrong size": gzip.compress(gzip.decompress(whole)[:-1]),
    }[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: not a whole"):
        load_images(Data(path=tmp_path), 1, 28)
