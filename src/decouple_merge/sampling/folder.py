"""Images into a folder, as ``<seed>.png``."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..config import Sample, Text
from ..errors import UserError
from ..executors import run_all
from ..executors.devices import default_device
from ..executors.local import shares
from ..storage.files import atomic_path
from .model import OpenedModel, open_model
from .sampler import seed_batches


def sample_model(
    model: str,
    out: Path,
    num_images: int | None = None,
    seed: int = 0,
    settings: Sample | None = None,
    text: Text | None = None,
    num_processes: int = 1,
) -> None:
    """Draw images from a pipeline, or from a run's ensemble, as ``<seed>.png``.

    Args:
        num_images: where not given, one for each prompt of a text-to-image model.
        seed: of the first image; the others' follow.
        settings: how images are drawn; not a run's own, but the defaults where not given.
        text: prompts and guidance of such a model; what it doesn't set is a run's own.
        num_processes: share the batches, each with the model in its memory; the images are those of one process.

    Raises:
        UserError: as ``open_model``, the model and its prompts don't fit, or neither the number nor prompts are given.
    """
    settings, text = settings or Sample(), text or Text()
    opened = open_model(model, settings, text, seed)
    num = num_images or len(opened.prompts)
    if num == 0:
        raise UserError(f"{model}: no prompts say how many images there are; give --num-images, or --prompts")
    seeds = range(seed, seed + num)
    opened.check(seeds)
    dealt = shares(len(seed_batches(seeds, settings.batch_size)), num_processes)
    if len(dealt) == 1:
        _draw(opened, out, seeds, dealt[0])
        return
    # The others open it for themselves.
    del opened
    for _ in run_all(_open_and_draw, [(model, out, seeds, settings, text, share) for share in dealt], num_processes):
        pass


def _open_and_draw(model: str, out: Path, seeds: range, settings: Sample, text: Text, share: slice) -> Iterator[None]:
    _draw(open_model(model, settings, text, seeds.start), out, seeds, share)
    yield


def _draw(opened: OpenedModel, out: Path, seeds: range, share: slice) -> None:
    names = [seed for batch in seed_batches(seeds, opened.settings.batch_size)[share] for seed in batch]
    write_images(opened.draw(seeds, default_device(), share), names, out)


def write_images(batches: Iterable[Tensor], seeds: Sequence[int], folder: Path) -> None:
    """Write uint8 batches [n, C, H, W] as ``<seed>.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    names = iter(seeds)
    for batch in batches:
        for pixels in batch:
            with atomic_path(folder / f"{next(names)}.png") as temporary:
                Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save(temporary, format="PNG")
