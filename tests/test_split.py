"""Held-out examples: a sample of all that is there, the same for everything that is trained on the data."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from decouple_merge.config import Data
from decouple_merge.data.images import ArrayImages
from decouple_merge.data.sources import load_images
from decouple_merge.data.split import hold_out, split
from test_emoji import write_package


def counts(indices: object, labels: list[str]) -> dict[str, int]:
    held = [labels[i] for i in indices]  # type: ignore[attr-defined]
    return {label: held.count(label) for label in sorted(set(labels))}


@pytest.mark.parametrize(("num", "num_held_out"), [(2, 1), (50, 10), (50, 49), (1000, 1)])
def test_all_are_either_trained_on_or_held_out(num: int, num_held_out: int) -> None:
    found = hold_out(num, num_held_out)
    assert len(found.held_out) == num_held_out
    assert sorted([*found.trained, *found.held_out]) == list(range(num))


def test_a_sample_is_not_an_end_and_does_not_depend_on_the_runs_seed() -> None:
    found = hold_out(1000, 100)
    assert found == hold_out(1000, 100)
    assert 30 < sum(i < 500 for i in found.held_out) < 70


def test_sorted_classes_are_held_out_by_their_share() -> None:
    labels = ["a"] * 500 + ["b"] * 300 + ["c"] * 200
    assert counts(hold_out(1000, 100, labels).held_out, labels) == {"a": 50, "b": 30, "c": 20}


def test_every_class_is_held_out_and_trained_on_where_there_are_enough() -> None:
    labels = ["large"] * 900 + ["pair"] * 2 + ["one"]
    assert counts(hold_out(903, 10, labels).held_out, labels) == {"large": 9, "one": 0, "pair": 1}
    classes = [f"{i:02}" for i in range(20) for _ in range(5)]
    assert set(counts(hold_out(100, 20, classes).held_out, classes).values()) == {1}
    assert set(counts(hold_out(100, 80, classes).trained, classes).values()) == {1}
    assert max(counts(hold_out(100, 7, classes).held_out, classes).values()) == 1


def test_classes_of_one_example_each_are_no_hindrance() -> None:
    assert len(hold_out(10, 4, list("abcdefghij")).held_out) == 4


@pytest.mark.parametrize("num_held_out", [1, 5, 20, 59])
def test_groups_are_not_separated(num_held_out: int) -> None:
    groups = [i // 6 for i in range(48)] + list(range(100, 112))
    found = hold_out(60, num_held_out, groups=groups)
    assert not {groups[i] for i in found.trained} & {groups[i] for i in found.held_out}
    assert num_held_out - 5 <= len(found.held_out) <= num_held_out


def test_groups_larger_than_what_is_held_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.num_held_out is 2, less than .* at least 3: hold out more"):
        hold_out(6, 2, groups=[0, 0, 0, 1, 1, 1])


def test_last_is_the_end_of_the_data() -> None:
    images = ArrayImages(np.zeros((10, 1, 2, 2), np.uint8))
    assert split(images, Data(num_held_out=3, held_out="last")) == (range(7), range(7, 10))


@pytest.mark.parametrize("held_out", ["random", "last"])
def test_nothing_left_to_train_on_is_refused(held_out: str) -> None:
    images = ArrayImages(np.zeros((10, 1, 2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"the data has 10 images and data.num_held_out is 10: nothing is left"):
        split(images, Data(num_held_out=10, held_out=held_out))


def test_sub_folders_of_a_folder_and_of_an_archive_are_classes(tmp_path: Path) -> None:
    for label, num in (("cats", 30), ("dogs", 20), ("owls", 10)):
        (tmp_path / "data" / "train" / label).mkdir(parents=True)
        for i in range(num):
            Image.new("L", (8, 8), i).save(tmp_path / f"data/train/{label}/{i:02}.png")
    # A damaged file shifts those after it.
    (tmp_path / "data/train/cats/00.png").write_bytes(b"no image")
    shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data")
    held = []
    for name in ("data", "data.zip"):
        data = Data(source=str(tmp_path / name), num_held_out=6, skip_damaged=True)
        images = load_images(data, 1, 8)
        labels = [label.name for label in images.labels]  # type: ignore[attr-defined]
        held.append(split(images, data).held_out)
        assert counts(held[-1], labels) == {"cats": 3, "dogs": 2, "owls": 1}
    assert held[0] == held[1]


def test_skin_tones_of_an_emoji_are_not_separated(tmp_path: Path) -> None:
    data = Data(source="noto-emoji", path=write_package(tmp_path / "npm"), num_held_out=4)
    images = load_images(data, 3, 64)
    found = split(images, data)
    assert not {images.groups[i] for i in found.trained} & {images.groups[i] for i in found.held_out}
    assert len(images.groups) == 10
