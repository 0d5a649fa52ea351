"""Images into a folder, as ``<seed>.png``."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..config import Pieces, Sample, Text
from ..errors import UserError
from ..executors import run_all
from ..executors.devices import default_device
from ..executors.local import shares
from ..storage.files import atomic_path
from ..storage.outputs import Kind, check_output
from .model import OpenedModel, open_model
from .sampler import seed_batches

# The text of a PNG that says what was drawn; by seed.
RECORD = "deme"
Records = dict[int, dict[str, Any]]


def sample_model(
    model: str,
    out: Path,
    num_images: int | None = None,
    seed: int = 0,
    settings: Sample | None = None,
    text: Text | None = None,
    pieces: Pieces | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[int]:
    """Draw images from a pipeline, or from a run's ensemble, as ``<seed>.png``; returns the seeds that were drawn.

    A PNG says what it was drawn from. Those that are there already are kept, where they were drawn from the same.

    Args:
        num_images: where not given, one for each prompt of a text-to-image model.
        seed: of the first image; the others' follow.
        settings: how images are drawn; not a run's own, but the defaults where not given.
        text: prompts and guidance of such a model; what it doesn't set is a run's own.
        pieces: where shares of the batches are drawn, each with the model in its memory; this process where not given.
        say: gets lines for the user, before anything is drawn.

    Raises:
        UserError: ``out`` holds anything else; as ``open_model``; the model and its prompts don't fit, or neither the
            number nor prompts are given.
    """
    settings, text, pieces = settings or Sample(), text or Text(), pieces or Pieces()
    check_output(out, IMAGES, [model])
    opened = open_model(model, settings, text, seed)
    num = num_images or len(opened.prompts)
    if num == 0:
        raise UserError(f"{model}: no prompts say how many images there are; give --num-images, or --prompts")
    seeds = range(seed, seed + num)
    opened.check(seeds)
    records = _records(opened, seeds)
    there = _seeds_in(out, records)
    for line in (*opened.notes(), *_besides(out, there - records.keys())):
        say(line)
    missing = [seed for seed in records if seed not in there]
    dealt = shares(len(seed_batches(missing, settings.batch_size)), pieces.num_processes)
    if len(dealt) == 1:
        _draw(opened, out, missing, records, dealt[0])
    elif dealt:
        # The others open it for themselves.
        del opened
        calls = [(model, out, missing, records, settings, text, seed, share) for share in dealt]
        for _ in run_all(_open_and_draw, calls, *pieces.where, folder=out):
            pass
    return missing


def _besides(out: Path, others: set[int]) -> Iterator[str]:
    if others:
        yield f"{out} holds {len(others)} images besides, of seeds not asked for: {min(others)} to {max(others)}"


def _open_and_draw(
    model: str,
    out: Path,
    seeds: list[int],
    records: Records,
    settings: Sample,
    text: Text,
    first_seed: int,
    share: slice,
) -> Iterator[None]:
    _draw(open_model(model, settings, text, first_seed), out, seeds, records, share)
    yield


def _draw(opened: OpenedModel, out: Path, seeds: list[int], records: Records, share: slice) -> None:
    names = [seed for batch in seed_batches(seeds, opened.settings.batch_size)[share] for seed in batch]
    write_images(opened.draw(seeds, default_device(), share), names, out, records)


def _records(opened: OpenedModel, seeds: range) -> Records:
    """Say of each image what it depends on besides its seed."""
    common = opened.identity
    prompts: Sequence[str | None] = opened.prompts_of(seeds) or [None] * len(seeds)
    return {s: {**common, "prompt": prompt} for s, prompt in zip(seeds, prompts, strict=True)}


def _seeds_in(out: Path, records: Records) -> set[int]:
    """List the seeds whose images are in a folder.

    Raises:
        UserError: an image in it was drawn from something else.
    """
    there = {int(path.stem): record for path in _images_in(out) if (record := drawn_from(path))}
    expected = next(iter(records.values()))
    for seed, found in there.items():
        # Of an image that isn't asked for the prompt is its own.
        wanted = records.get(seed, {**expected, "prompt": found.get("prompt")})
        if differing := [key for key in wanted if found.get(key) != wanted[key]]:
            raise UserError(
                f"--out is {out}, whose {seed}.png was drawn otherwise: {differing[0]} is {found.get(differing[0])!r}, "
                f"expected {wanted[differing[0]]!r}; give another folder, or remove it"
            )
    return {*there}


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if path.stem.isdecimal())


def drawn_from(path: Path) -> dict[str, Any] | None:
    """Read what a PNG says of itself: what it was drawn from; None where it is no PNG of ours, or isn't there."""
    try:
        with Image.open(path) as image:
            found = json.loads(image.info[RECORD])
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _foreign(folder: Path) -> str | None:
    images = _images_in(folder)
    if not images:
        return next((p.name for p in sorted(folder.iterdir()) if not p.name.startswith(".")), None)
    unknown = next((path.name for path in images if drawn_from(path) is None), None)
    return unknown and f"{unknown}, which deme sample didn't write"


IMAGES = Kind("a folder of deme sample", True, _foreign, is_replaced=False)


def write_images(batches: Iterable[Tensor], seeds: Sequence[int], folder: Path, records: Records | None = None) -> None:
    """Write uint8 batches [n, C, H, W] as ``<seed>.png``, each with its record as a text of the PNG where given."""
    folder.mkdir(parents=True, exist_ok=True)
    names = iter(seeds)
    for batch in batches:
        for pixels in batch:
            seed, texts = next(names), PngInfo()
            if records is not None:
                texts.add_text(RECORD, json.dumps(records[seed]))
            with atomic_path(folder / f"{seed}.png") as temporary:
                image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
                image.save(temporary, format="PNG", pnginfo=texts)
