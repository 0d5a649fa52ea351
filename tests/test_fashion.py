"""Fashion-MNIST from Debian's folder or the user's, or an error that names the file."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from decouple_merge.config import Data, Protocol
from decouple_merge.data import fashion
from decouple_merge.data.fashion import FOLDER
from decouple_merge.data.sources import load_images
from decouple_merge.evaluation.evaluate import evaluate_model


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


def test_a_reference_may_be_of_another_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "FOLDER", tmp_path)
    for i, name in enumerate(("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")):
        write_idx(tmp_path, name, np.random.default_rng(i).integers(0, 256, (8, 28, 28), dtype=np.uint8))
    images = load_images(Data(path=tmp_path, split="test"), 1, 28).stack(range(8))
    found = {}
    for split in ("train", "test"):
        settings = Protocol(metrics=["fd_effnetlite0"], split=split)
        found[split] = [r["value"] for r in evaluate_model([images], "fashion-mnist", settings) if isinstance(r, dict)]
    assert found["test"][0] == pytest.approx(0, abs=1e-3)
    assert found["train"][0] > 1


def test_a_folder_without_fashion_mnist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"which has no train-images-idx3-ubyte\.gz"):
        load_images(Data(path=tmp_path), 1, 28)


def test_an_unknown_split_of_fashion_mnist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fashion-mnist has no split 'validation', expected 'train' or 'test'"):
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
