"""webdataset shards: samples in any order from where they lie, with their captions, or an error that names them."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from decouple_merge.config import Config, Data
from decouple_merge.data.captions import load_captions
from decouple_merge.data.sources import load_images, open_images
from decouple_merge.experiment import finetuning
from decouple_merge.experiment.plan import check, prepare

MakeConfig = Callable[..., Config]


def write_shard(path: Path, members: dict[str, bytes], mode: Any = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def image_bytes(kind: str = "PNG", value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def shards(tiny_captioned: Path, tmp_path: Path) -> str:
    """The images and captions of a folder in three shards, in each from back to front."""
    captions = [json.loads(line)["text"] for line in (tiny_captioned / "metadata.jsonl").read_text().splitlines()]
    files = sorted(tiny_captioned.glob("*.png"))
    for shard in range(3):
        members: dict[str, bytes] = {}
        for i in reversed(range(8 * shard, 8 * shard + 8)):
            if i % 2:
                members[f"{i:02}.txt"] = f"{captions[i]}\n".encode()
                members[f"{i:02}.json"] = b'{"text": "not this one"}'
            else:
                members[f"{i:02}.json"] = json.dumps({"url": "x", "text": captions[i]}).encode()
            members[f"{i:02}.png"] = files[i].read_bytes()
            members[f"{i:02}.mask.png"] = b"another kind of member"
        write_shard(tmp_path / f"shards/s-{shard:03}.tar", members)
    return f"webdataset:{tmp_path}/shards/s-{{000..002}}.tar"


def load(source: str, **data: Any) -> tuple[Any, list[str]]:
    settings = Data(source=source, **data)
    images = load_images(settings, 3, 16)
    return images, load_captions(images, settings)


def test_shards_hold_the_samples_of_the_folder_they_were_made_of(shards: str, tiny_captioned: Path) -> None:
    images, captions = load(shards)
    expected, expected_captions = load(str(tiny_captioned))
    assert (len(images), images.sha256) == (24, expected.sha256)
    assert captions == expected_captions
    order = [17, 3, 23, 0, 8]
    assert torch.equal(images.stack(order), expected.stack(order))
    assert torch.equal(pickle.loads(pickle.dumps(images)).stack(order), expected.stack(order))
    assert images.frames([5]).tolist() == [[16, 16, 0, 0, 16, 16]]


def test_a_folder_of_shards_and_one_shard_are_sources_too(shards: str, tmp_path: Path) -> None:
    assert load(f"webdataset:{tmp_path}/shards")[1] == load(shards)[1]
    assert load(f"webdataset:{tmp_path}/shards/s-001.tar")[1] == load(shards)[1][8:16]
    images = open_images(f"webdataset:{tmp_path}/shards")
    assert len(images) == 24
    assert not images.source.holds_jpeg


def test_samples_in_folders_and_of_any_kind_of_image(tmp_path: Path) -> None:
    members = {"b/1.JPG": image_bytes("JPEG"), "b/1.txt": b"one", "a/1.webp": image_bytes("WEBP"), "a/1.txt": b"two"}
    write_shard(tmp_path / "one.tar", members | {"a.txt": b"no sample", "c/1.txt": b"none either"})
    images, captions = load(f"webdataset:{tmp_path}/one.tar")
    assert captions == ["two", "one"]
    assert images.source.holds_jpeg


def test_a_training_from_shards_is_that_from_the_folder_even_if_interrupted(
    text_config: MakeConfig, shards: str, tmp_path: Path
) -> None:
    weights = []
    for name, data in (("folder", {}), ("shards", {"source": shards, "num_workers": 1})):
        plan = prepare(text_config(finetune={"baseline": False}, data=data), tmp_path / "runs" / name)
        events = finetuning.finetune_experts(plan, 0)
        while name == "shards" and getattr(next(events), "update", 0) < 3:
            pass
        events.close()
        list(finetuning.finetune_experts(plan, 0))
        weights.append(load_file(tmp_path / "runs" / name / "experts/0/model.safetensors"))
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_damaged_image_is_left_out_with_its_caption(tmp_path: Path) -> None:
    members = {f"{i}.png": image_bytes(value=i) for i in range(3)} | {f"{i}.txt": f"{i}".encode() for i in range(3)}
    write_shard(tmp_path / "one.tar", members | {"1.png": b"no image"})
    images, captions = load(f"webdataset:{tmp_path}/one.tar", skip_damaged=True)
    assert (len(images), captions) == (2, ["0", "2"])
    with pytest.raises(ValueError, match=r"one\.tar:1\.png: can't be decoded .*set data.skip_damaged"):
        load(f"webdataset:{tmp_path}/one.tar")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {},
            r"one\.tar:b: found an image without caption, as 2 of 3 are; expected beside it a \.txt, or a",
        ),
        ({"b.json": b'{"url": 1, "caption": "x"}'}, r"b\.json: found .* in 'text'; set data\.caption_column"),
        ({"b.json": b"{bad"}, r"one\.tar:b\.json, line 1.* expected JSON with the caption in 'text'"),
        ({"b.json": b"[1]"}, r"one\.tar:b\.json: found .* expected JSON with the caption in 'text'"),
        ({"b.txt": "café".encode("latin-1")}, r"one\.tar:b\.txt is not UTF-8 \(byte 3: .*save it as UTF-8"),
        ({"b.json": b'{"text": 7}', "c.txt": b"c"}, r"1 of 3 captions are no text, the first of image 1: 7"),
        ({"b.jpeg": image_bytes("JPEG")}, r"one\.tar:b has \.jpeg and \.png, expected one image in a sample: remove"),
    ],
)
def test_a_caption_that_is_missing_or_wrong_is_named(
    text_config: MakeConfig, tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    images = {f"{name}.png": image_bytes() for name in "abc"}
    write_shard(tmp_path / "one.tar", {**images, "a.txt": b"a", **members})
    with pytest.raises(ValueError, match=message):
        check(text_config(data={"source": f"webdataset:{tmp_path}/one.tar", "num_held_out": 1}), tmp_path / "run")


def nothing(path: Path) -> None:
    path.mkdir()


def no_images(path: Path) -> None:
    write_shard(path / "one.tar", {"a.txt": b"a"})


def compressed(path: Path) -> None:
    write_shard(path / "one.tar", {"a.png": image_bytes()}, "w:gz")


def cut(path: Path) -> None:
    write_shard(path / "one.tar", {"a.png": image_bytes()})
    (path / "one.tar").write_bytes((path / "one.tar").read_bytes()[:600])


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (
            nothing,
            "",
            r"no shards; expected a folder of \.tar files, or their path with a range such as \{000\.\.127\}",
        ),
        (no_images, "", r"found no images, expected members ending in \.apng, .*\.bmp, "),
        (compressed, "", r"one\.tar: no whole \.zip or plain \.tar archive .*unpack a compressed tar"),
        (cut, "", r"one\.tar: no whole \.zip or plain \.tar archive"),
        (no_images, "/{0..2}.tar", r"3 of 3 shards don't exist, .*/0\.tar among them"),
        (no_images, "/none.tar", r"1 of 1 shards don't exist, .*/none\.tar among them"),
    ],
)
def test_shards_that_can_not_be_read_are_named(
    tmp_path: Path, make: Callable[[Path], None], source: str, message: str
) -> None:
    make(tmp_path / "shards")
    with pytest.raises(ValueError, match=message):
        load(f"webdataset:{tmp_path}/shards{source}")
