"""Batches that depend only on seed, rank and step, and images that no training sees."""

import numpy as np
import pytest
import torch

from decouple_merge.config import Data
from decouple_merge.data.batches import held_out_images, training_batches
from decouple_merge.data.images import ArrayImages, to_model, to_pixels

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
    settings = Data.model_validate({"num_held_out": HELD_OUT, "held_out": "last", **data})
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


@pytest.mark.parametrize("flip", [False, True])
def test_two_ranks_with_half_the_batch_cover_the_images_of_one(flip: bool) -> None:
    whole = batches(0, 12, batch_size=8, flip=flip)
    halves = [batches(0, 12, batch_size=4, rank=r, world=2, flip=flip) for r in (0, 1)]
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
    held_out = numbers(held_out_images(numbered(), Data(num_held_out=HELD_OUT, held_out="last")))
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
