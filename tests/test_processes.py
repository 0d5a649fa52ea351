"""Several processes draw the images that one draws, and come to its numbers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decouple_merge.config import Pieces, Protocol, Sample, Text
from decouple_merge.evaluation import evaluate
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.evaluation.extractors import Extractor
from decouple_merge.sampling import folder
from decouple_merge.sampling.folder import sample_model
from test_evaluate import features_of

METRICS = ["fd_effnetlite0", "kd_effnetlite0"]


def records(model: str, reference: str, **settings: Any) -> list[dict[str, Any]]:
    events = evaluate_model(model, reference, Protocol(metrics=METRICS, **settings))
    found = [r for r in events if isinstance(r, dict)]
    return [r | {"time": ""} for r in found]


def test_two_processes_write_the_images_of_one(tiny_text_base: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\nsun\n")
    text = Text(prompts=tmp_path / "prompts.txt", guidance_scale=2.0)
    images = []
    for num in (1, 2):
        # Batches of 2, 2 and 1: the last one is filled up, in whichever process it is.
        out = tmp_path / str(num)
        settings = Sample(sampler="DDIM", num_steps=3, batch_size=2)
        sample_model(str(tiny_text_base), out, 5, 3, settings, text, Pieces(num_processes=num))
        images.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert images[0] == images[1]
    assert list(images[0]) == [f"{seed}.png" for seed in range(3, 8)]


def test_two_processes_come_to_the_numbers_of_one(tiny_base: Path, tiny_images: Path) -> None:
    arguments = str(tiny_base), str(tiny_images)
    settings = {"sample": Sample(num_steps=2, batch_size=8), "seed": 5, "num_images": 20}
    assert records(*arguments, **settings, num_processes=2) == records(*arguments, **settings)


def backwards(
    function: Callable[..., Iterator[Any]], calls: list[tuple[Any, ...]], num: int, *where: Any
) -> Iterator[Any]:
    """Run the calls here, the last one first: items come in the worst order."""
    assert len(calls) == num
    for call in reversed(calls):
        yield from function(*call)


def test_shares_of_images_are_put_together_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Extractor("effnetlite0", "0" * 64, {"features": 5}, lambda x: {"features": features_of(x)["features"]})
    monkeypatch.setattr(evaluate, "load_extractor", lambda *_: small)
    monkeypatch.setattr(evaluate, "run_all", backwards)
    pixels = np.random.default_rng(0).integers(0, 256, (600, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "b.npy", pixels[::-1] // 2)
    arguments = str(tmp_path / "a.npy"), str(tmp_path / "b.npy")
    assert records(*arguments, num_processes=3) == records(*arguments)


def test_images_that_fit_one_batch_need_no_second_process(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "run_all", None)
    settings = Sample(sampler="DDIM", num_steps=2)
    sample_model(str(tiny_base), tmp_path / "out", 3, 0, settings, pieces=Pieces(num_processes=4))
    assert len(list((tmp_path / "out").iterdir())) == 3
