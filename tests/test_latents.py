"""Captioned images as latents and embeddings: cached once, read by all, drawn afresh for every batch."""

import gc
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextModel

from conftest import WORDS, save_stable_diffusion
from decouple_merge.config import Data
from decouple_merge.data import latents as latents_module
from decouple_merge.data.batches import LatentBatch, model_input, training_batches
from decouple_merge.data.captions import load_captions
from decouple_merge.data.images import Images, to_model
from decouple_merge.data.latents import Latents, TextEmbeddings
from decouple_merge.data.sources import load_images
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.models.base import load_base
from decouple_merge.models.parts import load_text_encoders, load_vae
from decouple_merge.training.gradient import noisy_batch

OWN_CACHE = True
CPU = torch.device("cpu")
CAPTIONS = [WORDS[i % len(WORDS)] for i in range(24)]


def open_latents(base: Path, source: Path, **data: Any) -> Latents:
    encoders = load_base(str(base)).encoders
    assert encoders is not None
    settings = Data(source=str(source), **data)
    images = load_images(settings, 3, 16)
    return Latents(encoders, images, load_captions(images, settings), 16, settings, CPU)


def pixels(source: Path) -> Images:
    return load_images(Data(source=str(source)), 3, 16)


# -- captions


def test_captions_follow_their_images_whatever_the_order_of_the_lines(tiny_captioned: Path) -> None:
    metadata = tiny_captioned / "metadata.jsonl"
    metadata.write_text("\n".join(reversed(metadata.read_text().splitlines())) + "\n\n")
    assert load_captions(pixels(tiny_captioned), Data(source=str(tiny_captioned))) == CAPTIONS


def test_captions_of_files_in_subfolders_and_of_another_field(tiny_captioned: Path) -> None:
    (tiny_captioned / "more").mkdir()
    lines = []
    for path in sorted(tiny_captioned.glob("*.png")):
        path.rename(tiny_captioned / "more" / path.name)
        lines.append(json.dumps({"file_name": f"more/{path.name}", "text": "no", "caption": f"image {path.stem}"}))
    (tiny_captioned / "metadata.jsonl").write_text("\n".join(lines))
    data = Data(source=str(tiny_captioned), caption_column="caption")
    assert load_captions(pixels(tiny_captioned), data) == [f"image {i:02}" for i in range(24)]


def test_captions_of_a_data_set_leave_out_its_damaged_images(tiny_captioned: Path, tmp_path: Path) -> None:
    files = [{"bytes": p.read_bytes(), "path": None} for p in sorted(tiny_captioned.glob("*.png"))]
    files[1] = {"bytes": b"no image", "path": None}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": files, "text": CAPTIONS}, features=features)
    rows.save_to_disk(tmp_path / "rows")
    data = Data(source=f"datasets:{tmp_path / 'rows'}", skip_damaged=True)
    assert load_captions(load_images(data, 3, 16), data) == [CAPTIONS[0], *CAPTIONS[2:]]
    with pytest.raises(ValueError, match=r"columns image, text, expected 'caption' for captions; set data\.caption_"):
        load_captions(load_images(data, 3, 16), data.model_copy(update={"caption_column": "caption"}))


def no_metadata(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()


def one_too_many(folder: Path) -> None:
    shutil.copy(folder / "00.png", folder / "99.png")


def last(line: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "metadata.jsonl"
        path.write_text("\n".join([*path.read_text().splitlines()[:-1], line]))

    return change


def append(line: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(line)

    return change


def latin1(folder: Path) -> None:
    (folder / "metadata.jsonl").write_bytes("café".encode("latin-1"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_metadata, r'captioned has no metadata.jsonl, .* \{"file_name": "00.png", "text": "…"\}'),
        (one_too_many, r"metadata.jsonl: 1 of 25 images have no caption, .*99.png among them"),
        (append("{bad"), r"metadata.jsonl, line 25, .*not JSON.* expected JSON with file_name and 'text'"),
        (append('{"file_name": "00.png", "caption": "x"}'), r"line 25: found .*'text'; set data.caption_column"),
        (
            append('{"file_name": "00.png", "text": "x"}'),
            r"line 25: 00.png has a caption already, expected one",
        ),
        (last('{"file_name": "23.png", "text": ["a", "b"]}'), r"1 of 24 captions are no text.*image 23: \['a', 'b'\]"),
        (latin1, r"metadata.jsonl, line 1, is not UTF-8 \(byte 3: "),
    ],
)
def test_captions_that_are_missing_or_wrong_are_named(
    tiny_captioned: Path, change: Callable[[Path], None], message: str
) -> None:
    change(tiny_captioned)
    with pytest.raises(ValueError, match=message):
        load_captions(pixels(tiny_captioned), Data(source=str(tiny_captioned)))


def test_a_source_that_can_have_no_captions_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 16, 16, 3), np.uint8))
    data = Data(source=str(tmp_path / "images.npz"))
    with pytest.raises(ValueError, match=r"has no captions, .*expected a folder of images with metadata.jsonl"):
        load_captions(load_images(data, 3, 16), data)


# -- the cache


def test_cached_rows_are_what_the_encoders_say(tiny_text_base: Path, tiny_captioned: Path) -> None:
    examples = open_latents(tiny_text_base, tiny_captioned, flip=True)
    batch = examples.stack([20, 3])
    encoders, images = load_base(str(tiny_text_base)).encoders, to_model(pixels(tiny_captioned).stack([20, 3]))
    vae, text_encoder = load_vae(encoders, CPU), load_text_encoders(encoders, CPU)
    assert batch.moments.shape == (2, 2, 2, 4, 8, 8)
    torch.testing.assert_close(batch.moments[:, 0], encoders.family.encode_images(vae, images))
    torch.testing.assert_close(batch.moments[:, 1], encoders.family.encode_images(vae, images.flip(-1)))
    text = encoders.family.encode_texts(text_encoder, [CAPTIONS[20], CAPTIONS[3], ""])["encoder_hidden_states"]
    torch.testing.assert_close(batch.condition, {"encoder_hidden_states": text[:2]})
    torch.testing.assert_close(batch.empty, {"encoder_hidden_states": text[2]})
    assert open_latents(tiny_text_base, tiny_captioned).stack([0]).moments.shape == (1, 1, 2, 4, 8, 8)


def test_encoders_run_once_whoever_asks(
    tiny_text_base: Path, tiny_captioned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_latents(tiny_text_base, tiny_captioned)
    assert list(first.fill()) == ["texts: 7 of 7 computed", "latents: 24 of 24 computed"]
    expected = first.stack(range(24))
    monkeypatch.setattr(latents_module, "load_vae", None)
    monkeypatch.setattr(latents_module, "load_text_encoders", None)
    again = open_latents(tiny_text_base, tiny_captioned)
    assert list(again.fill()) == []
    assert torch.equal(again.stack(range(24)).moments, expected.moments)
    torch.testing.assert_close(pickle.loads(pickle.dumps(again)).stack(range(24)).condition, expected.condition)


def test_encoders_leave_memory_once_the_cache_is_full(tiny_text_base: Path, tiny_captioned: Path) -> None:
    examples = open_latents(tiny_text_base, tiny_captioned)
    examples.stack([0])
    gc.collect()
    assert [type(o) for o in gc.get_objects() if type(o) in (AutoencoderKL, CLIPTextModel)] == []


def test_a_killed_computation_goes_on_where_it_was(
    tiny_text_base: Path, tiny_captioned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_latents(tiny_text_base, tiny_captioned).stack(range(24))
    monkeypatch.setenv("DEME_CACHE", str(tiny_captioned.parent / "other"))
    monkeypatch.setattr(latents_module, "ROWS_PER_FILE", 10)
    started = open_latents(tiny_text_base, tiny_captioned).latents
    events = started.fill()
    assert next(events) == "latents: 10 of 24 computed"
    events.close()
    (kept,) = started.folder.iterdir()
    before = kept.stat().st_mtime_ns
    found = open_latents(tiny_text_base, tiny_captioned)
    assert list(found.latents.fill()) == ["latents: 20 of 24 computed", "latents: 24 of 24 computed"]
    assert kept.stat().st_mtime_ns == before
    torch.testing.assert_close(found.stack(range(24)).moments, expected.moments)


def test_the_cache_knows_data_encoders_size_and_precision(
    tiny_text_base: Path, tiny_captioned: Path, tmp_path: Path
) -> None:
    one = open_latents(tiny_text_base, tiny_captioned)
    flipped = open_latents(tiny_text_base, tiny_captioned, flip=True)
    half = open_latents(tiny_text_base, tiny_captioned, cache_precision="fp16")
    shutil.copytree(tiny_text_base, tmp_path / "rescaled")
    config = tmp_path / "rescaled/vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    rescaled = open_latents(tmp_path / "rescaled", tiny_captioned)
    shutil.copytree(tiny_captioned, tmp_path / "brighter")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "brighter/00.png")
    brighter = open_latents(tiny_text_base, tmp_path / "brighter")
    every = [one, flipped, half, rescaled, brighter]
    assert len({e.latents.folder for e in every}) == len({e.sha256 for e in every}) == 5
    # These have the same texts.
    assert len({e.texts.folder for e in every}) == 2
    metadata = tmp_path / "brighter/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("sun", "moon"))
    renamed = open_latents(tiny_text_base, tmp_path / "brighter")
    assert renamed.latents.folder == brighter.latents.folder
    assert renamed.texts.folder != brighter.texts.folder
    assert renamed.sha256 != brighter.sha256
    half.stack([0])
    tensors, _ = latents_module.read_tensors(next(half.latents.folder.iterdir()))
    assert tensors["moments"].dtype == torch.float16


def test_latents_of_other_encoders_are_refused(tiny_text_base: Path, tiny_captioned: Path, tmp_path: Path) -> None:
    one = open_latents(tiny_text_base, tiny_captioned)
    list(one.fill())
    other = open_latents(save_stable_diffusion(tmp_path / "other", latent_channels=4), tiny_captioned, flip=True)
    shutil.copytree(one.latents.folder, other.latents.folder)
    with pytest.raises(ValueError, match=r"00000.safetensors was made from images .* vae .*, expected .* mirrored"):
        other.stack([0])


def test_a_damaged_file_of_the_cache_is_named(tiny_text_base: Path, tiny_captioned: Path) -> None:
    examples = open_latents(tiny_text_base, tiny_captioned)
    list(examples.fill())
    (path,) = examples.latents.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: no whole safetensors file .*; remove it"):
        examples.stack([0])


def test_texts_in_any_order_and_number_are_the_same_rows(tiny_text_base: Path) -> None:
    encoders = load_base(str(tiny_text_base)).encoders
    one = TextEmbeddings(encoders, ["red", "blue", "red"], "fp32", CPU)
    other = TextEmbeddings(encoders, ["blue", "red", ""], "fp32", CPU)
    assert one.folder == other.folder
    asked = ["blue", "", "red"]
    torch.testing.assert_close(one.embed(asked), other.embed(asked), rtol=0, atol=0)


# -- batches


@pytest.fixture
def batch() -> LatentBatch:
    draws = torch.Generator().manual_seed(0)
    moments = torch.randn(5, 2, 2, 1, 2, 2, generator=draws)
    condition = {"states": torch.randn(5, 3, 4, generator=draws), "pooled": torch.randn(5, 2, generator=draws)}
    empty = {"states": torch.zeros(3, 4), "pooled": torch.ones(2)}
    return LatentBatch(moments, condition | {"sizes": torch.ones(5, 6)}, empty)


def test_latents_are_drawn_afresh_from_their_distribution(batch: LatentBatch) -> None:
    draws = torch.Generator().manual_seed(1)
    samples = torch.stack([model_input(batch, draws)[0] for _ in range(4000)])
    mean, log_variance = batch.moments[:, 0].unbind(1)
    deviation = (log_variance / 2).exp()
    assert ((samples.mean(0) - mean) / deviation).abs().max() < 5 / 4000**0.5
    torch.testing.assert_close(samples.std(0), deviation, rtol=0.06, atol=0)
    assert model_input(batch, draws)[1] is batch.condition


def test_mirrored_images_give_their_own_latents(batch: LatentBatch) -> None:
    found = batch.mirror(torch.tensor([True, False, True, False, False])).moments
    assert found.shape == (5, 1, 2, 1, 2, 2)
    assert torch.equal(found[:, 0], torch.stack([batch.moments[i, v] for i, v in enumerate([1, 0, 1, 0, 0])]))


def test_dropped_captions_are_empty_ones(batch: LatentBatch) -> None:
    found = batch.drop_captions(torch.tensor([False, True, False, False, True])).condition
    for name, empty in batch.empty.items():
        assert torch.equal(found[name][[0, 2, 3]], batch.condition[name][[0, 2, 3]])
        assert torch.equal(found[name][[1, 4]], torch.stack([empty, empty]))
    assert torch.equal(found["sizes"], batch.condition["sizes"])


def test_captions_are_dropped_at_the_share_asked_for_and_as_a_function_of_the_step(
    tiny_text_base: Path, tiny_captioned: Path
) -> None:
    examples = open_latents(tiny_text_base, tiny_captioned)

    def dropped(share: float, first: int = 0) -> list[list[bool]]:
        data = Data(source=str(tiny_captioned), num_held_out=4, caption_dropout=share)
        batches = training_batches(examples, data, 10, 7, first, 40)
        name = "encoder_hidden_states"
        return [
            [torch.equal(row, b.empty[name]) for row in b.condition[name]]
            for b in batches
            if isinstance(b, LatentBatch)
        ]

    assert not any(map(any, dropped(0.0)))
    found = dropped(0.3)
    assert abs(sum(map(sum, found)) / 400 - 0.3) < 5 * (0.3 * 0.7 / 400) ** 0.5
    assert dropped(0.3, first=25) == found[25:]


def test_a_noisy_batch_of_latents_carries_its_captions(tiny_text_base: Path, tiny_captioned: Path) -> None:
    base, examples = load_base(str(tiny_text_base)), open_latents(tiny_text_base, tiny_captioned)
    stacked = examples.stack([0, 1, 2])
    found = noisy_batch(base, stacked, TimestepRange(0, 40), torch.Generator().manual_seed(0))
    assert found.x_t.shape == (3, 4, 8, 8)
    torch.testing.assert_close(found.condition, stacked.condition, rtol=0, atol=0)
