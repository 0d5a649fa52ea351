"""``deme evaluate``: images from wherever they come give the same number, models as asked, mistakes before compute."""

import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from decouple_merge.cli import main as cli
from decouple_merge.config import Protocol, Sample
from decouple_merge.data.sources import open_images
from decouple_merge.evaluation import evaluate
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.evaluation.extractors import Extractor, load_extractor
from decouple_merge.evaluation.scored_images import open_scored
from decouple_merge.models.base import load_base
from decouple_merge.sampling.sampler import denoiser, sample_images, sampling_copy
from decouple_merge.storage.files import read_records
from test_encoders import save_model
from test_evaluate import features_of

METRICS = ["fd_effnetlite0", "kd_effnetlite0"]
FOUR = Sample(num_steps=4)
PIXELS = np.random.default_rng(3).integers(0, 256, (12, 8, 8), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of nothing, so that every case takes milliseconds."""

    def load(name: str, device: torch.device, weights: Any = None) -> Extractor:
        return Extractor(name, "0" * 64, {"features": 5}, lambda x: {"features": features_of(x)["features"]})

    monkeypatch.setattr(evaluate, "load_extractor", load)


def write_folder(folder: Path, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{i:02}{suffix}")
    return folder


def write_zip(path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    folder = write_folder(path.with_suffix(""))
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("__MACOSX/._00.png", "no image")
        archive.writestr("labels.txt", "no image")
        for file in sorted(folder.iterdir(), reverse=True):
            archive.write(file, f"images/{file.name}")
    return path


def write_tar(path: Path, mode: Any = "w") -> Path:
    folder = write_folder(path.with_suffix(""))
    with tarfile.open(path, mode) as archive:
        archive.add(folder, "images")
    return path


def write_datasets(path: Path) -> str:
    rows = {"image": [Image.fromarray(p) for p in PIXELS]}
    datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()})).save_to_disk(path)
    return f"datasets:{path}"


def batches() -> Iterator[torch.Tensor]:
    yield from torch.from_numpy(PIXELS)[:, None].split(5)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "folder": lambda path: str(write_folder(path / "images")),
    "zip": lambda path: str(write_zip(path / "images.zip")),
    "stored zip": lambda path: str(write_zip(path / "images.zip", zipfile.ZIP_STORED)),
    "tar": lambda path: str(write_tar(path / "images.tar")),
    "npz": lambda path: np.savez(path / "a.npz", arr_0=PIXELS[..., None], arr_1=np.arange(12)) or str(path / "a.npz"),
    "npy": lambda path: np.save(path / "a.npy", PIXELS) or str(path / "a.npy"),
    "datasets": lambda path: write_datasets(path / "rows"),
    "iterator": lambda path: batches(),
}


def records(
    model: Any, reference: Any, metrics: list[str], num_images: int | None = None, **settings: Any
) -> list[dict[str, Any]]:
    events = evaluate_model(model, reference, Protocol(metrics=metrics, num_images=num_images, **settings))
    return [e for e in events if isinstance(e, dict)]


@pytest.mark.parametrize("kind", SOURCES)
def test_images_give_the_same_number_wherever_they_come_from(kind: str, tmp_path: Path, tiny_images: Path) -> None:
    expected = [r["value"] for r in records(torch.from_numpy(PIXELS)[:, None].split(12), str(tiny_images), METRICS)]
    found = records(SOURCES[kind](tmp_path), str(tiny_images), METRICS)
    assert [r["value"] for r in found] == pytest.approx(expected, rel=1e-9)
    assert {r["num_images"] for r in found} == {12}
    # The same as a reference: the distance of images from themselves.
    (own,) = records(batches(), SOURCES[kind](tmp_path / "again"), METRICS[:1])
    assert own["value"] == pytest.approx(0, abs=1e-6)


@pytest.fixture(autouse=True)
def _again(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()


def test_a_model_is_a_reference_from_the_seeds_that_follow(tiny_base: Path, tmp_path: Path) -> None:
    (record,) = records(str(tiny_base), str(tiny_base), METRICS[:1], 6, seed=10, sample=FOUR)
    drawn = [open_scored(str(tiny_base), Protocol(num_images=6, seed=seed, sample=FOUR)) for seed in (10, 16)]
    (expected,) = records(*(torch.cat(list(d.batches(slice(None)))).split(6) for d in drawn), METRICS[:1])
    assert record["value"] == pytest.approx(expected["value"], rel=1e-9)
    assert record["value"] > 1e-3
    assert record["seeds"] == [10, 15]


def test_sampler_and_steps_are_as_asked_and_recorded(tiny_base: Path, tiny_images: Path) -> None:
    settings = [FOUR, Sample(num_steps=3), Sample(num_steps=3, sampler="DDPM")]
    found = [records(str(tiny_base), str(tiny_images), METRICS[:1], 6, sample=s)[0] for s in settings]
    assert [(r["sampler"], r["num_steps"]) for r in found] == [("DDIM", 4), ("DDIM", 3), ("DDPM", 3)]
    assert len({r["value"] for r in found}) == 3
    assert {r["timestep_spacing"] for r in found} == {"leading"}


def test_a_model_samples_in_the_precision_that_its_record_names(tiny_base: Path, tiny_images: Path) -> None:
    settings, base = Sample(num_steps=4, precision="bf16"), load_base(str(tiny_base))
    (found,) = records(str(tiny_base), str(tiny_images), METRICS[:1], 6, sample=settings)
    network = denoiser(base, sampling_copy(base.network, settings, torch.device("cpu")))
    drawn = sample_images(network, base, range(6), settings, torch.device("cpu"))
    (expected,) = records(list(drawn), str(tiny_images), METRICS[:1])
    (exact,) = records(str(tiny_base), str(tiny_images), METRICS[:1], 6, sample=FOUR)
    assert found["precision"] == "bf16"
    assert found["value"] == pytest.approx(expected["value"], rel=1e-9)
    assert found["value"] != pytest.approx(exact["value"], rel=1e-6)


def test_nothing_is_written_but_the_records_that_are_asked_for(
    tiny_base: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = Protocol(metrics=METRICS, num_images=6, sample=FOUR)
    made = list(evaluate_model(str(tiny_base), str(tiny_images), settings, Path("m.jsonl"), "ours"))
    assert [p.name for p in Path().iterdir()] == ["m.jsonl"]
    assert read_records(Path("m.jsonl")) == made
    assert {r["model"] for r in read_records(Path("m.jsonl"))} == {"ours"}


@pytest.mark.parametrize("kind", ["folder", "zip", "datasets"])
def test_jpeg_draws_a_warning_and_png_none(kind: str, tmp_path: Path, tiny_images: Path) -> None:
    assert not open_images(SOURCES[kind](tmp_path)).source.holds_jpeg
    folder = write_folder(tmp_path / "jpeg", ".jpg")
    source = str(folder)
    if kind == "zip":
        source = str(tmp_path / "jpeg.zip")
        with zipfile.ZipFile(source, "w") as archive:
            archive.write(folder / "00.jpg", "00.JPG")
            archive.write(folder / "01.jpg", "01.JPG")
    elif kind == "datasets":
        rows = {"image": [str(p) for p in sorted(folder.iterdir())]}
        rows_of = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        rows_of.save_to_disk(tmp_path / "jpegs")
        source = f"datasets:{tmp_path / 'jpegs'}"
    first = next(iter(evaluate_model(source, str(tiny_images), Protocol(metrics=METRICS[:1]))))
    assert isinstance(first, str)
    assert first.startswith(f"warning: {source} holds JPEG files, whose compression moves every metric")


def test_a_singular_covariance_is_said(tiny_images: Path) -> None:
    few = torch.from_numpy(PIXELS)[:5, None]
    events = list(evaluate_model([few], str(tiny_images), Protocol(metrics=METRICS)))
    assert [type(e) for e in events] == [str, dict, dict]
    assert "fd_effnetlite0 of 5 images with 5 features each: the covariance is singular" in str(events[0])


def test_num_images_takes_the_first_and_refuses_more_than_there_are(tiny_images: Path) -> None:
    with np.load(tiny_images) as file:
        first = torch.from_numpy(file["images"])[:20, None]
    expected = records([first], str(tiny_images), METRICS)
    assert [r["value"] for r in records(str(tiny_images), str(tiny_images), METRICS, 20)] == pytest.approx(
        [r["value"] for r in expected], rel=1e-9
    )
    with pytest.raises(ValueError, match=r"images.npz: found 48 images, expected at least --num-images 49"):
        records(str(tiny_images), str(tiny_images), METRICS, 49)


@pytest.mark.parametrize("batch", [torch.rand(2, 1, 8, 8), torch.zeros(8, 8, dtype=torch.uint8), None])
def test_batches_of_another_kind_are_refused(batch: Any, tiny_images: Path) -> None:
    with pytest.raises(ValueError, match=r"a batch of images is .*, expected uint8 \[N, C, H, W\], 0 to 255: quantise"):
        records([] if batch is None else [batch], str(tiny_images), METRICS)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ([torch.rand(4, 1, 8, 8)], r"a batch of images is torch.float32 \(4, 1, 8, 8\), expected uint8"),
        ([torch.zeros(4, 1, 9, 9, dtype=torch.uint8)], r"the reference: found images 9×9 with 1 channel.*expected 8×8"),
        ([], "the reference has no images"),
    ],
)
def test_a_reference_in_batches_is_as_what_is_scored(reference: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(evaluate_model([torch.from_numpy(PIXELS)[:, None]], reference, Protocol(metrics=METRICS)))


def test_of_batches_the_first_images_are_taken(tiny_images: Path) -> None:
    batches = list(torch.from_numpy(PIXELS)[:, None].split(4))
    found = records(batches, str(tiny_images), METRICS, 10)
    expected = records([torch.from_numpy(PIXELS)[:10, None]], str(tiny_images), METRICS)
    assert [r["value"] for r in found] == pytest.approx([r["value"] for r in expected], rel=1e-9)
    with pytest.raises(ValueError, match="found 12 images in the batches, expected num_images, 13"):
        records(batches, str(tiny_images), METRICS, 13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"stats.npz: found images 9×9 with 1 channel\(s\), expected 8×8 with 1"),
        ({"image_size": 8, "num_reference_images": 7}, r"stats.npz: found 6 images, expected 7"),
    ],
)
def test_images_beside_statistics_are_as_what_is_scored(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 9, 1), dtype=np.uint8)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5), arr_0=images)
    scored, against = [torch.from_numpy(PIXELS)[:, None]], str(tmp_path / "stats.npz")
    with pytest.raises(ValueError, match=message):
        list(evaluate_model(scored, against, Protocol(metrics=METRICS, **changes)))
    # The distance that takes the statistics alone has no use for them.
    assert list(evaluate_model(scored, against, Protocol(metrics=METRICS[:1], **changes)))
    assert list(evaluate_model(scored, against, Protocol(metrics=METRICS, image_size=8)))


def test_a_reference_of_few_images_is_said(tiny_images: Path) -> None:
    with np.load(tiny_images) as file:
        many = torch.from_numpy(file["images"])[:, None]
    events = list(evaluate_model([many], [many[:4]], Protocol(metrics=METRICS[:1])))
    assert "fd_effnetlite0 of a reference of 4 images with 5 features each: the covariance is singular" in str(
        events[0]
    )


def test_images_that_were_added_to_a_folder_are_seen(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    first = open_images(str(folder))
    Image.fromarray(PIXELS[0]).save(folder / "99.png")
    second = open_images(str(folder))
    assert (len(first), len(second)) == (12, 13)
    assert first.sha256 != second.sha256


def test_a_column_of_a_data_set_is_read_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    names = sorted(map(str, folder.iterdir()))
    (tmp_path / "broken.png").write_bytes(b"no image")
    columns = {"img": names, "mask": [str(tmp_path / "broken.png")] * len(names)}
    rows = datasets.Dataset.from_dict(columns, split="test")
    for column in columns:
        rows = rows.cast_column(column, datasets.Image())
    rows.save_to_disk(tmp_path / "rows")
    source = f"datasets:{tmp_path / 'rows'}"
    with pytest.raises(ValueError, match=r"was saved of split 'test', expected 'train': set data.split"):
        open_images(source, column="img")
    with pytest.raises(
        ValueError, match=r"has columns img, mask, expected 'image': set data.column, or column of deme"
    ):
        open_images(source, split="test")
    found = open_images(source, split="test", column="img")
    assert torch.equal(found.stack(range(12)), torch.from_numpy(PIXELS)[:, None])
    settings = Protocol(metrics=METRICS[:1], split="test", column="img")
    assert list(evaluate_model([torch.from_numpy(PIXELS)[:, None]], source, settings))
    # The split of what is scored is another setting than the reference's.
    settings = Protocol(metrics=METRICS[:1], split="test", column="img")
    with pytest.raises(
        ValueError, match=r"saved of split 'test', expected 'train': set .*of deme evaluate images_split"
    ):
        list(evaluate_model(source, source, settings))
    assert list(evaluate_model(source, source, settings.model_copy(update={"images_split": "test"})))


def test_a_first_image_that_is_left_out_says_nothing_of_the_files(tmp_path: Path) -> None:
    good = (write_folder(tmp_path / "images", ".jpg") / "00.jpg").read_bytes()
    rows = [{"bytes": good[: len(good) // 3], "path": None}, {"bytes": good, "path": None}]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features).save_to_disk(tmp_path / "rows")
    images = open_images(f"datasets:{tmp_path / 'rows'}", skip_damaged=True)
    assert (len(images), images.source.holds_jpeg) == (1, True)


def test_seeds_that_torch_does_not_tell_apart_are_refused(tiny_base: Path, tiny_images: Path) -> None:
    settings = Protocol(metrics=METRICS, num_images=6, seed=2**32 - 5, sample=FOUR)
    with pytest.raises(ValueError, match=r"the last seed is 4294967296, expected less than 2\*\*32"):
        list(evaluate_model(str(tiny_base), str(tiny_images), settings))


def test_mistakes_are_found_before_an_image_is_drawn(
    tiny_base: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    other = str(tmp_path / "other.npy")
    np.save(other, np.zeros((9, 9, 9, 3), np.uint8))

    def no_pass(*arguments: Any) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(evaluate, "score_features", no_pass)
    model, reference = str(tiny_base), str(tiny_images)
    mistakes: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((model, reference, ["fdi"]), {}, "metric is 'fdi', expected one of"),
        ((model, reference, METRICS), {"sample": Sample(sampler="Ddim")}, "sampler is 'Ddim'"),
        ((model, None, METRICS), {}, "fd_effnetlite0 needs a reference to compare with: give --reference"),
        ((model, str(tmp_path / "stats.npz"), METRICS), {}, "kd_effnetlite0 needs the reference's images; stats.npz:"),
        ((model, str(tmp_path / "nowhere"), METRICS), {}, "nowhere"),
        ((model, other, METRICS), {}, r"found images 9×9 with 3 channel\(s\), expected 8×8 with 1, as what is scored"),
        ((model, reference, ["precision_effnetlite0"], 3), {}, r"found 3 image\(s\) to score, expected at least 4"),
        ((str(tmp_path / "nowhere.zip"), reference, METRICS), {}, "is no model and holds no images"),
    ]
    for arguments, options, message in mistakes:
        with pytest.raises(ValueError, match=message):
            records(*arguments, **{"sample": FOUR, **options})


@pytest.mark.parametrize("damage", ["cut", "checksum", "compressed tar", "encrypted"])
def test_damaged_archives_are_refused(damage: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images.zip", zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    message = r"images.zip: no whole .zip or plain .tar archive"
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "checksum":
        content[content.index(b"IDAT") + 8] ^= 255
        message = r"images.zip:images/\d\d.png: can't be read \(its checksum differs\); make the archive again"
    elif damage == "encrypted":
        for at in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
            content[at] |= 1
        message += r" \(it is encrypted\)"
    path.write_bytes(content)
    if damage == "compressed tar":
        path = write_tar(tmp_path / "packed.tar", "w:gz")
        message = "packed.tar: no whole .zip or plain .tar archive .*unpack a compressed tar"
    with pytest.raises(ValueError, match=message):
        open_images(str(path))


def test_two_processes_read_one_archive(tmp_path: Path) -> None:
    images = open_images(str(write_zip(tmp_path / "images.zip")))
    loader = torch.utils.data.DataLoader(images, batch_size=None, num_workers=2)
    assert torch.equal(torch.stack(list(loader)), torch.from_numpy(PIXELS)[:, None])


def test_the_command_scores_and_compares(
    tiny_base: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_extractor", load_extractor)
    save_model("dinov2", tmp_path / "dinov2")
    runner, out = CliRunner(), tmp_path / "m.jsonl"
    base = ["evaluate", str(tiny_base), "--reference", str(tiny_images), "--num-images", "6", "--out", str(out)]
    steps, dinov2 = "sample.num_steps={}".format, f"dinov2={tmp_path / 'dinov2'}"
    of_dinov2 = ["--set", steps(4), "--metrics", "fd_dinov2,kd_dinov2", "--set", dinov2]
    for extra in (["--set", steps(2)], ["--set", steps(3), "--set", "sample.sampler=DDPM"], of_dinov2):
        assert runner.invoke(cli.app, base + extra).exit_code == 0
    made = read_records(out)
    assert [(r["metric"], r["sampler"], r["num_steps"]) for r in made] == [
        ("fd_effnetlite0", "DDIM", 2),
        ("fd_effnetlite0", "DDPM", 3),
        ("fd_dinov2", "DDIM", 4),
        ("kd_dinov2", "DDIM", 4),
    ]
    refused = runner.invoke(cli.app, ["evaluate", "--compare", str(out), str(out)])
    assert isinstance(refused.exception, ValueError)
    assert "differ in sampler (DDIM, DDPM)" in str(refused.exception)
    assert "expected MODEL_OR_IMAGES" in str(runner.invoke(cli.app, ["evaluate"]).exception)


def test_a_comparison_takes_nothing_to_score(tiny_images: Path) -> None:
    result = CliRunner().invoke(cli.app, ["evaluate", str(tiny_images), "--compare", "a.jsonl", "b.jsonl"])
    assert "expected MODEL_OR_IMAGES, or --compare A B, one of them" in str(result.exception)
