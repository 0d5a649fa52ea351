"""The CLIP score on a tiny random CLIP: torchmetrics' numbers, the right text for each image, the records."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.multimodal import clip_score as theirs
from transformers import AutoTokenizer, CLIPModel

from conftest import WORDS, save_clip
from decouple_merge.config import Protocol, Sample, Stats, Text
from decouple_merge.evaluation.compare import compare
from decouple_merge.evaluation.distances import clip_score
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.evaluation.extractors import load_extractor
from decouple_merge.evaluation.metrics import check_is_distance
from decouple_merge.evaluation.references import write_reference
from decouple_merge.models.encoders import ENCODERS, load_encoder, load_text_encoder
from decouple_merge.sampling.folder import sample_model

CPU = torch.device("cpu")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip")


def draw_images(num: int, side: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, 3, side, side), dtype=np.uint8))


def pillow(image: Tensor, side: int) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)


def torchmetrics_score(folder: Path, images: Tensor, texts: list[str], side: int = 16) -> float:
    """The mean of torchmetrics' score of each pair, on images that Pillow resizes as CLIP's own program does."""
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    mean, std = (torch.tensor(v)[:, None, None] for v in (ENCODERS["clip"].mean, ENCODERS["clip"].std))

    class Network(torch.nn.Module):
        config = model.config

        def get_image_features(self, x: Tensor) -> Tensor:
            return model.get_image_features(x).pooler_output

        def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
            return model.get_text_features(ids, mask).pooler_output

    def process(text: Any = None, images: Any = None, **options: Any) -> Any:
        if text is not None:
            return tokenizer(text, **options)
        resized = [torch.from_numpy(np.asarray(pillow(i, side)).copy()).permute(2, 0, 1) for i in images]
        return {"pixel_values": (torch.stack(resized) / 255 - mean) / std}

    def load() -> Any:
        return Network(), process

    with torch.no_grad():
        pairs = [float(theirs(i, t, load).clamp(min=0)) for i, t in zip(images, texts, strict=True)]
    return sum(pairs) / len(pairs)


def records(
    model: Any, reference: Any, metrics: list[str], out: Path | None = None, name: str | None = None, **settings: Any
) -> list[dict[str, Any]]:
    events = evaluate_model(model, reference, Protocol(metrics=metrics, **settings), out, name)
    return [e for e in events if isinstance(e, dict)]


def write_prompts(path: Path, prompts: list[str] = WORDS) -> Text:
    path.write_text("\n".join(prompts))
    return Text(prompts=path)


def score_of(source: Any, clip: Path, text: Text | None = None, **options: Any) -> dict[str, Any]:
    (record,) = records(source, None, ["clip_score"], clip=str(clip), text=text or Text(), **options)
    return record


def test_the_score_is_the_mean_of_cosines_that_are_not_negative() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[6.0, 8.0], [-1.0, 0.0], [5.0, 5.0]])
    assert clip_score(a, b) == pytest.approx((100 + 0 + 100 / 2**0.5) / 3, rel=1e-12)
    with pytest.raises(ValueError, match="0 pairs of image and text"):
        clip_score(a[:0], b[:0])


@pytest.mark.parametrize(("side", "tolerance"), [(16, 1e-5), (40, 2e-2)])
def test_the_score_is_that_of_torchmetrics(side: int, tolerance: float, clip: Path, tmp_path: Path) -> None:
    images = draw_images(6, side)
    record = score_of([images], clip, write_prompts(tmp_path / "prompts.txt"))
    expected = torchmetrics_score(clip, images, WORDS)
    assert 1 < expected < 99
    assert record["value"] == pytest.approx(expected, rel=tolerance)
    # Another pairing is another number.
    assert abs(torchmetrics_score(clip, images, WORDS[::-1]) - expected) > 2 * tolerance * expected


def test_texts_are_cut_where_the_model_ends_and_the_batch_changes_nothing(clip: Path) -> None:
    encoder = load_text_encoder(str(clip))
    # It reads 12 tokens, the first and the last of which are marks.
    words = [*"abcdefghijklmnop"]
    with torch.no_grad():
        found = encoder([" ".join(words), "a", ""])
        torch.testing.assert_close(found[:1], encoder([" ".join(words[:10])]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1:2], encoder(["a"]), rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_images_are_normalised_as_the_models_own_file_says(tmp_path: Path) -> None:
    half = [0.5, 0.5, 0.5]
    folder, images = save_clip(tmp_path / "half", image_mean=half, image_std=half), draw_images(3)
    encoder, other = (load_encoder("clip_text", str(save)) for save in (folder, save_clip(tmp_path / "other")))
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(folder).get_image_features(images / 127.5 - 1).pooler_output
    torch.testing.assert_close(encoder(images)["features"], expected, rtol=1e-4, atol=1e-4)
    assert encoder.sha256 != other.sha256


def test_cmmd_and_the_score_come_from_one_pass(clip: Path, tmp_path: Path) -> None:
    drawn: list[int] = []

    def batches() -> Any:
        for batch in draw_images(6, 24).split(4):
            drawn.append(len(batch))
            yield batch

    text, options = write_prompts(tmp_path / "prompts.txt"), {"clip": str(clip)}
    both = records(batches(), [draw_images(9, 24)], ["clip_score", "cmmd"], text=text, **options)
    assert drawn == [4, 2]
    alone = [
        records([draw_images(6, 24)], [draw_images(9, 24)], [m], text=text, **options) for m in ("clip_score", "cmmd")
    ]
    assert [r["value"] for r in both] == pytest.approx([r["value"] for (r,) in alone], rel=1e-5)
    # They resize differently, and their records say so.
    assert [r["extractor"].split(":")[0] for r in both] == ["clip_text", "clip"]


def test_a_model_is_scored_with_the_prompt_of_each_seed(clip: Path, tiny_text_base: Path, tmp_path: Path) -> None:
    text = write_prompts(tmp_path / "prompts.txt", WORDS[:4])
    settings = Sample(num_steps=2, batch_size=4)
    record = score_of(str(tiny_text_base), clip, text, num_images=6, seed=7, sample=settings)
    sample_model(
        str(tiny_text_base), tmp_path / "images", 6, 7, Sample(sampler="DDIM", num_steps=2, batch_size=4), text
    )
    images = [torch.from_numpy(np.asarray(Image.open(tmp_path / "images" / f"{7 + i}.png")).copy()) for i in range(6)]
    texts = [WORDS[i % 4] for i in range(6)]
    expected = torchmetrics_score(clip, torch.stack(images).permute(0, 3, 1, 2), texts)
    assert record["value"] == pytest.approx(expected, rel=1e-5)
    assert record["seeds"] == [7, 12]
    assert record["prompts"].startswith("4 texts ")
    label, digest, count = record["reference"].split(":")
    assert (label, len(digest), count) == ("prompts", 16, "4")
    # The same images from their folder, where 10.png comes before 7.png.
    folder = score_of(str(tmp_path / "images"), clip, text, seed=7)
    assert folder["value"] == pytest.approx(record["value"], rel=1e-5)
    assert folder["reference"] == record["reference"]


def test_numbered_images_of_which_one_is_missing_are_refused(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i, image in enumerate(draw_images(12)):
        pillow(image, 16).save(tmp_path / "images" / f"{i}.png")
    text = write_prompts(tmp_path / "prompts.txt", [*"abcdefghijkl"])
    expected = torchmetrics_score(clip, draw_images(12), [*"abcdefghijkl"])
    assert score_of(str(tmp_path / "images"), clip, text)["value"] == pytest.approx(expected, rel=1e-5)
    for missing, found in (("9.png", "0 to 11"), ("0.png", "1 to 11")):
        folder = shutil.copytree(tmp_path / "images", tmp_path / f"without-{missing}")
        (folder / missing).unlink()
        with pytest.raises(
            ValueError, match=rf"11 images numbered {found}, expected every number from 0 to 10: .* as --set seed="
        ):
            score_of(str(folder), clip, text)


def test_images_have_their_own_captions_where_no_prompts_are_given(clip: Path, tiny_captioned: Path) -> None:
    record = score_of(str(tiny_captioned), clip, num_images=10)
    images = [torch.from_numpy(np.asarray(Image.open(tiny_captioned / f"{i:02}.png")).copy()) for i in range(10)]
    texts = [WORDS[i % len(WORDS)] for i in range(10)]
    expected = torchmetrics_score(clip, torch.stack(images).permute(0, 3, 1, 2), texts)
    assert record["value"] == pytest.approx(expected, rel=1e-5)
    assert record["reference"].endswith(":24")


def test_scores_of_unlike_prompts_or_networks_are_not_compared(clip: Path, tmp_path: Path) -> None:
    text, other = (write_prompts(tmp_path / f"{i}.txt", WORDS[i:]) for i in range(2))
    images = [draw_images(6)]
    for name, folder, prompts in (
        ("a", clip, text),
        ("b", clip, other),
        ("c", save_clip(tmp_path / "c", seed=1), text),
    ):
        score_of(images, folder, prompts, out=tmp_path / "m.jsonl", name=name)
    for pair, field in (("ab", "reference"), ("ac", "extractor")):
        with pytest.raises(ValueError, match=f"records of clip_score differ in {field}"):
            list(compare(*(f"{tmp_path / 'm.jsonl'}:{name}" for name in pair)))


def test_what_can_have_no_score_is_refused(clip: Path, tiny_base: Path, tiny_images: Path, tmp_path: Path) -> None:
    images = [draw_images(4)]
    with pytest.raises(
        ValueError,
        match=r"needs a clip model: set evaluate.clip of a config, or deme .* --set clip=…, to .*, such as laion/CLIP",
    ):
        records(images, None, ["clip_score"])
    with pytest.raises(ValueError, match="clip_score needs the texts that the images of images show: give --prompts"):
        score_of(images, clip)
    with pytest.raises(ValueError, match=r"clip_score needs the texts that the images of .*base show"):
        score_of(str(tiny_base), clip, sample=Sample(num_steps=2))
    with pytest.raises(ValueError, match=r"images.npz' has no captions"):
        score_of(str(tiny_images), clip)
    with pytest.raises(ValueError, match="clip_score compares images with texts, for which there are no statistics"):
        write_reference("x", tmp_path / "a.npz", "clip_score", Stats(clip=str(clip)))
    with pytest.raises(ValueError, match="expected a distance, which is smaller for better images"):
        check_is_distance("clip_score", "search.metric")


def test_a_clip_without_its_text_part_or_tokenizer_is_refused(clip: Path, tmp_path: Path) -> None:
    load_encoder("clip", str(clip)).network.save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match=r"clip .*vision: can't be loaded \(it is a clip_vision_model\); expected a"):
        load_extractor("clip_text", CPU, str(tmp_path / "vision"))
    CLIPModel.from_pretrained(clip).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"clip .*bare: its tokenizer has a vocabulary of \d, its text part reads 54"):
        load_extractor("clip_text", CPU, str(tmp_path / "bare"))
