"""The protocols of papers, each from end to end on tiny random models, with nothing changed but the counts."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from conftest import WORDS, make_unet, save_stable_diffusion
from decouple_merge.cli import main as cli
from decouple_merge.config import Protocol, Sample, Stats, Text, load_protocol
from decouple_merge.data.decoding import resize_images
from decouple_merge.data.prompts import read_prompts
from decouple_merge.data.sources import open_images
from decouple_merge.evaluation import evaluate
from decouple_merge.evaluation.compare import compare
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.evaluation.extractors import Extractor, load_extractor
from decouple_merge.evaluation.references import write_reference
from decouple_merge.sampling.folder import sample_model
from decouple_merge.storage.files import read_records
from test_clip_score import save_clip
from test_inception import random_weights

ROOT = Path(__file__).parent.parent
PROTOCOLS = ["cifar10-50k", "lsun-50k", "coco-30k", "imagenet-names", "partiprompts"]


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_weights(), path)
    return path


@pytest.fixture(autouse=True)
def _few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep 16 of Inception's features: the roots of 2,048-d covariances would take most of the time."""

    def load(name: str, device: torch.device, weights: Any = None) -> Extractor:
        whole = load_extractor(name, device, weights)
        if name != "inception":
            return whole
        return replace(whole, outputs={"features": 16}, extract=lambda x: {"features": first(whole.extract(x))})

    def first(outputs: dict[str, Tensor]) -> Tensor:
        return outputs["features"][:, :16]

    monkeypatch.setattr(evaluate, "load_extractor", load)


@pytest.fixture
def pixel_model(tmp_path: Path) -> Path:
    """A tiny DDPM pipeline of 8×8 images that can take 50 steps."""
    DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=60)).save_pretrained(tmp_path / "pixels")
    return tmp_path / "pixels"


@pytest.fixture
def text_model(tmp_path: Path) -> Path:
    """A tiny Stable Diffusion pipeline of 16×16 images that can take 50 steps."""
    return save_stable_diffusion(tmp_path / "text", num_train_timesteps=60)


def draw_pixels(num: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def write_photos(folder: Path, num: int = 5) -> Path:
    """Photographs as COCO has them: of unlike sizes, wide and high."""
    folder.mkdir()
    for i in range(num):
        pixels = draw_pixels(1, 20 + i, 30 - 3 * i, i)[0]
        Image.fromarray(pixels).save(folder / f"COCO_{i:012}.png")
    return folder


def write_coco(path: Path) -> Path:
    annotations = [
        {"image_id": 10 + i, "id": 2 * i + c, "caption": f"{word} {'big' if c else 'small'}"}
        for i, word in enumerate(WORDS)
        for c in range(2)
    ]
    path.write_text(json.dumps({"images": [], "annotations": annotations}))
    return path


def write_names(path: Path) -> Path:
    path.write_text("tench\ngreat white shark\n")
    return path


def write_parti(path: Path) -> Path:
    path.write_text("Prompt\tCategory\tChallenge\tNote\n" + "".join(f"{w}\tAnimals\tBasic\t\n" for w in WORDS[:3]))
    return path


def run(out: Path, *arguments: Any) -> list[dict[str, Any]]:
    result = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments), "--out", str(out)])
    assert result.exit_code == 0, result.exception
    return read_records(out)


def test_cifar10_is_scored_at_its_own_size(pixel_model: Path, inception: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", draw_pixels(5, 8, 8)[..., 0])
    arguments = [pixel_model, "--protocol", "cifar10-50k", "--reference", tmp_path / "train.npy"]
    arguments += ["--set", f"inception_weights={inception}"]
    refused = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments), "--num-images", "4"])
    assert "found 5 images, expected 50000; give the whole data set, or" in str(refused.exception)
    counts = ["--num-images", 4, "--set", "num_reference_images=5"]
    (record,) = run(tmp_path / "m.jsonl", *arguments, *counts)
    assert record["value"] > 0
    assert (
        record
        | {
            "metric": "fid",
            "num_images": 4,
            "seeds": [0, 3],
            "sampler": "DDIM",
            "num_steps": 50,
            "prompts": None,
            "resize": None,
        }
        == record
    )
    assert record["extractor"].startswith("inception:")
    assert record["reference"].startswith(f"{tmp_path / 'train.npy'}:")
    assert record["reference"].endswith(":5")


def test_coco_is_30k_captions_resized_against_the_whole_set_with_a_clip_score(
    text_model: Path, inception: Path, tmp_path: Path
) -> None:
    photos, captions = write_photos(tmp_path / "val2014"), write_coco(tmp_path / "captions_val2014.json")
    clip = save_clip(tmp_path / "clip", image_size=8)
    networks = ["--set", f"inception_weights={inception}", "--set", f"clip={clip}"]
    inputs = ["--reference", photos, "--prompts", captions, *networks]
    counts = ["--num-images", 4, "--set", "num_reference_images=5", "--set", "image_size=8"]
    found = run(tmp_path / "m.jsonl", text_model, "--protocol", "coco-30k", *inputs, *counts)
    assert [r["metric"] for r in found] == ["fid", "clip_score"]
    for record in found:
        assert (record["sampler"], record["num_steps"], record["num_images"]) == ("PNDM", 50, 4)
        assert record["resize"] == "8, centre square, Lanczos of Pillow"
        assert record["prompts"].startswith("6 texts ")
        assert record["prompts"].endswith(", guidance 7.5")
    # Step by step: draw, cut and resize both sides with Pillow, then score the files.
    chosen = read_prompts(captions)[:4]
    (tmp_path / "chosen.txt").write_text("\n".join(chosen))
    text = Text(prompts=tmp_path / "chosen.txt")
    sample_model(str(text_model), tmp_path / "drawn", 4, 0, Sample(sampler="PNDM", num_steps=50, batch_size=16), text)
    for folder in ("drawn", "val2014"):
        (tmp_path / f"{folder}-8").mkdir()
        for file in (tmp_path / folder).iterdir():
            image = Image.open(file)
            left, top, side = (image.width - image.height) // 2, (image.height - image.width) // 2, min(image.size)
            box = (max(left, 0), max(top, 0), max(left, 0) + side, max(top, 0) + side)
            image.crop(box).resize((8, 8), Image.Resampling.LANCZOS).save(tmp_path / f"{folder}-8" / file.name)
    files = [
        tmp_path / "drawn-8",
        "--reference",
        tmp_path / "val2014-8",
        "--prompts",
        tmp_path / "chosen.txt",
        *networks,
    ]
    expected = run(tmp_path / "files.jsonl", *files, "--metrics", "fid,clip_score")
    assert [r["value"] for r in found] == pytest.approx([r["value"] for r in expected], rel=1e-4)
    assert found[0]["reference"].split(":")[-2:] == expected[0]["reference"].split(":")[-2:]


def test_imagenet_is_two_images_of_each_name(text_model: Path, inception: Path, tmp_path: Path) -> None:
    photos, clip = write_photos(tmp_path / "imagenet"), save_clip(tmp_path / "clip")
    inputs = ["--reference", photos, "--prompts", write_names(tmp_path / "names.txt"), "--set", f"clip={clip}"]
    counts = ["--num-images", 4, "--set", "image_size=8", "--set", f"inception_weights={inception}"]
    found = run(tmp_path / "m.jsonl", text_model, "--protocol", "imagenet-names", *inputs, *counts)
    assert [r["metric"] for r in found] == ["fid", "clip_score"]
    assert found[0]["prompts"].startswith("2 texts ")
    # A template is other prompts.
    counts += ["--metrics", "clip_score", "--set", "text.template=a photo of a {}"]
    other = run(tmp_path / "m.jsonl", text_model, "--protocol", "imagenet-names", *inputs, *counts)[-1]
    assert other["prompts"].split()[2] != found[0]["prompts"].split()[2]
    (tmp_path / "photos.txt").write_text("a photo of a tench\na photo of a great white shark\n")
    counts = [*counts[:-2], "--prompts", tmp_path / "photos.txt"]
    same = run(tmp_path / "m.jsonl", text_model, "--protocol", "imagenet-names", *inputs, *counts)[-1]
    assert [same[k] for k in ("value", "prompts", "reference")] == [other[k] for k in ("value", "prompts", "reference")]


def test_partiprompts_is_the_clip_score_alone_and_needs_no_reference(text_model: Path, tmp_path: Path) -> None:
    prompts, clip = write_parti(tmp_path / "PartiPrompts.tsv"), save_clip(tmp_path / "clip")
    arguments = [
        text_model,
        "--protocol",
        "partiprompts",
        "--prompts",
        prompts,
        "--set",
        f"clip={clip}",
        "--num-images",
        3,
    ]
    (record,) = run(tmp_path / "m.jsonl", *arguments)
    (expected,) = (
        r
        for r in evaluate_model(
            str(text_model),
            None,
            Protocol(
                metrics=["clip_score"],
                num_images=3,
                clip=str(clip),
                sample=Sample(sampler="PNDM"),
                text=Text(prompts=prompts),
            ),
        )
        if isinstance(r, dict)
    )
    assert record["value"] == pytest.approx(expected["value"], rel=1e-5)
    assert (record["num_steps"], record["resize"], record["num_images"]) == (50, None, 3)
    # An option changes one value and leaves the others.
    (_, changed) = run(
        tmp_path / "m.jsonl", *arguments, "--set", "sample.num_steps=3", "--set", "text.guidance_scale=2"
    )
    assert (changed["sampler"], changed["num_steps"]) == ("PNDM", 3)
    assert changed["prompts"].endswith("guidance 2")


def test_lsun_is_resized_and_unlike_resizes_are_not_compared(
    pixel_model: Path, inception: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "church.npy", draw_pixels(5, 12, 12)[..., 0])
    arguments = [pixel_model, "--protocol", "lsun-50k", "--reference", tmp_path / "church.npy", "--num-images", 4]
    (record,) = run(
        tmp_path / "m.jsonl", *arguments, "--set", "image_size=4", "--set", f"inception_weights={inception}"
    )
    assert [record[k] for k in ("metric", "sampler", "num_steps")] == ["fid", "DDIM", 50]
    assert record["resize"] == "4, centre square, Lanczos of Pillow"
    arguments += ["--metrics", "kd_effnetlite0"]
    for out, size in (("a", 8), ("b", 4)):
        run(tmp_path / f"{out}.jsonl", *arguments, "--set", f"image_size={size}")
    # The same images as statistics, of which a record can't tell the size.
    for out in "ab":
        (line,) = read_records(tmp_path / f"{out}.jsonl")
        (tmp_path / f"{out}.jsonl").write_text(json.dumps(line | {"reference": "stats.npz"}))
    with pytest.raises(ValueError, match=r"kd_effnetlite0 differ in resize \(8, .*, 4, .*\), expected the same"):
        list(compare(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")))
    refused = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])
    assert "found images 8×8, which image_size 256 would enlarge" in str(refused.exception)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_resized_as_pillow_does(channels: int) -> None:
    pixels = draw_pixels(3, 40, 26)[..., :channels]
    found = resize_images(torch.from_numpy(pixels).permute(0, 3, 1, 2), 10)
    for image, array in zip(found, pixels, strict=True):
        square = Image.fromarray(array.squeeze()).crop((0, 7, 26, 33))
        expected = np.asarray(square.resize((10, 10), Image.Resampling.LANCZOS)).reshape(10, 10, channels)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    # A checkerboard is grey, where a filter that doesn't antialias would find black or white.
    board = torch.from_numpy(np.indices((32, 32)).sum(0) % 2 * 255).to(torch.uint8)[None, None]
    assert (resize_images(board, 8).int() - 127).abs().max() < 8
    unchanged = found[:, :, :10, :10]
    assert torch.equal(resize_images(unchanged, 10), unchanged)


def test_a_reference_has_the_channels_of_what_is_scored(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    Image.fromarray(draw_pixels(1, 9, 9)[0, ..., 0]).save(photos / "COCO_.png")
    images = open_images(str(photos), 8, 3)
    assert images.stack(range(6)).shape == (6, 3, 8, 8)


def test_statistics_of_resized_images_serve_as_reference(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 8)
    write_reference(str(photos), tmp_path / "stats.npz", "fd_effnetlite0", Stats(image_size=8))
    features = load_extractor("effnetlite0", torch.device("cpu")).extract(open_images(str(photos), 8).stack(range(8)))
    with np.load(tmp_path / "stats.npz") as file:
        np.testing.assert_allclose(file["mu"], features["features"].double().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--protocol", "coco"],
            "--protocol is 'coco', expected one of cifar10-50k, lsun-50k, coco-30k, imagenet-names",
        ),
        (["--set", "image_sise=8"], "deme evaluate: unknown key 'image_sise'; the nearest valid key is 'image_size'"),
        (
            ["--protocol", "coco-30k", "--set", "sample.steps=8"],
            "protocol coco-30k: unknown key 'sample.steps'; .*num_",
        ),
        (["--set", "num_images=1"], "num_images: Input should be greater than or equal to 2"),
        (
            ["--set", "text.guidance_scale=0.5"],
            "text.guidance_scale: Input should be greater than or equal to 1, found 0.5",
        ),
    ],
)
def test_mistakes_in_a_protocol_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["evaluate", "nowhere", *arguments])
    assert re.search(message, str(result.exception))


def test_protocols_are_what_the_page_says() -> None:
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip(" `"): cells[1:] for cells in (r.strip("|").split("|") for r in page.splitlines() if "|" in r)
    }
    for name in PROTOCOLS:
        protocol = load_protocol(name, {})
        metrics, num_images, size, drawn, *_ = (cell.strip() for cell in rows[name])
        assert metrics == " ".join(f"`{m}`" for m in protocol.metrics)
        assert num_images == f"{protocol.num_images:,}"
        assert size == (str(protocol.image_size) if protocol.image_size else "its own")
        guidance = f", guidance {protocol.text.guidance_scale:g}" if "clip_score" in protocol.metrics else ""
        assert drawn == f"{protocol.sample.sampler} {protocol.sample.num_steps}{guidance}"
    with pytest.raises(ValueError, match=", ".join(PROTOCOLS)):
        load_protocol("none", {})


def test_the_pages_commands_parse() -> None:
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    commands = [shlex.split(line) for line in "".join(blocks).replace("\\\n", " ").splitlines() if line]
    verbs: Any = typer.main.get_command(cli.app)
    for _, verb, *arguments in commands:
        verbs.commands[verb].make_context(verb, list(arguments))
    named = {a[a.index("--protocol") + 1] for a in commands if "--protocol" in a}
    assert named == set(PROTOCOLS)
