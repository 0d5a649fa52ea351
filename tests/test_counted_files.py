"""One rule for which files are images, in folders, archives and shards."""

import io
import logging
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from decouple_merge.config import Data
from decouple_merge.data import shards
from decouple_merge.data.decoding import DamagedError
from decouple_merge.data.names import IMAGE_SUFFIXES
from decouple_merge.data.sources import load_images, open_source

HIDDEN = [".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/a/._1.png", "a/._1.png", ".hidden.png", "a/.git/x/2.png"]


def write(path: Path, value: int = 0, kind: str = "png") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path, kind)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images among hidden ones and files of other kinds."""
    for i, name in enumerate(["a/1.png", "a/b/2.PNG"]):
        write(tmp_path / "data" / name, i)
    for name in HIDDEN:
        write(tmp_path / "data" / name, 100)
    for name in ("notes.md", "a/x.heic", "a/y.heic", "LICENSE"):
        (tmp_path / "data" / name).write_text("x")
    return tmp_path / "data"


def packed(folder: Path, kind: str) -> str:
    if kind == "folder":
        return str(folder)
    archive = shutil.make_archive(str(folder), "zip" if kind == "zip" else "tar", folder)
    return f"webdataset:{archive}" if kind == "shards" else archive


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "shards"])
def test_the_same_files_count_everywhere_and_the_others_are_told(
    folder: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = packed(folder, kind)
    with caplog.at_level(logging.WARNING, "decouple_merge"):
        images = load_images(Data(source=source), 1, 8)
    assert images.stack(range(len(images))).amax((1, 2, 3)).tolist() == [0, 1]
    # A folder that is hidden is not looked into.
    num_hidden = 5 if kind == "folder" else len(HIDDEN)
    (told,) = caplog.messages
    assert told == f"{source}: 2 images; passed over {num_hidden} hidden, 2 .heic, 1 .md, 1 without ending"


def test_a_folder_within_a_hidden_one_is_as_any(tmp_path: Path) -> None:
    write(tmp_path / ".cache/data/1.png")
    assert len(open_source(Data(source=str(tmp_path / ".cache/data")))) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_kind_of_image_file_can_be_read(tmp_path: Path, suffix: str) -> None:
    kinds = {
        ".apng": "png",
        ".jfif": "jpeg",
        ".pgm": "ppm",
        ".pbm": "ppm",
        ".pnm": "ppm",
        ".tif": "tiff",
        ".jpg": "jpeg",
    }
    write(tmp_path / f"1{suffix}", 128, kinds.get(suffix, suffix[1:]))
    images = load_images(Data(source=str(tmp_path)), 3, 8)
    assert abs(int(images[0][0, 0, 0]) - 128) <= 2
    assert images.source.holds_jpeg == (suffix in (".jpg", ".jpeg", ".jfif"))


def test_links_to_files_and_folders_are_followed_but_no_folder_is_entered_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "data/b/1.png", 1)
    write(tmp_path / "elsewhere/2.png", 2)
    write(tmp_path / "elsewhere/deep/3.png", 3)
    write(tmp_path / "file.png", 4)
    for link, target in (
        ("a", "data/b"),  # comes first by name, and is a folder that is there itself
        ("c", "elsewhere"),
        ("d", "elsewhere"),
        ("b/up", "data"),
        ("b/self", "data/b/self"),
        ("e.png", "file.png"),
        ("f.png", "elsewhere/deep"),  # a folder, whatever it is called
    ):
        (tmp_path / "data" / link).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    with caplog.at_level(logging.WARNING, "decouple_merge"):
        images = load_images(Data(source=str(tmp_path / "data")), 1, 8)
    assert images.stack(range(len(images))).amax((1, 2, 3)).tolist() == [1, 2, 3, 4]
    assert [str(p.relative_to(tmp_path / "data")) for p in images.source.names] == [
        "b/1.png",
        "c/2.png",
        "c/deep/3.png",
        "e.png",
    ]
    assert "links to folders that count already" in caplog.text


def test_a_link_to_nothing_is_named_and_skipped_where_asked(tmp_path: Path) -> None:
    write(tmp_path / "data/1.png")
    (tmp_path / "data/0.png").symlink_to("/nowhere/x.png")
    (tmp_path / "data/2.png").symlink_to(tmp_path / "data/2.png")
    with pytest.raises(
        DamagedError, match=r"0\.png: can't be decoded .*; mend or remove it, or set data\.skip_damaged"
    ):
        load_images(Data(source=str(tmp_path / "data")), 1, 8)
    assert len(load_images(Data(source=str(tmp_path / "data"), skip_damaged=True), 1, 8)) == 1


def test_a_pipe_is_not_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "data/1.png")
    os.mkfifo(tmp_path / "data/0.png")
    (tmp_path / "data/2.png").symlink_to(tmp_path / "data/0.png")
    with caplog.at_level(logging.WARNING, "decouple_merge"):
        assert len(load_images(Data(source=str(tmp_path / "data")), 1, 8)) == 1
    assert "passed over 2 no regular files" in caplog.text


def test_a_folder_named_as_an_image_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "data/x.png/1.png")
    assert len(load_images(Data(source=str(tmp_path / "data")), 1, 8)) == 1


def test_metadata_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "data/1.png")
    (tmp_path / "data/metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}\n')
    with caplog.at_level(logging.WARNING, "decouple_merge"):
        load_images(Data(source=str(tmp_path / "data")), 1, 8)
    assert caplog.messages == []


def image_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "png")
    return buffer.getvalue()


def test_links_in_archives_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("1.png", tarfile.REGTYPE), ("2.png", tarfile.SYMTYPE), ("3.png", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "1.png"
            entry.size = len(image_bytes()) if kind == tarfile.REGTYPE else 0
            archive.addfile(entry, io.BytesIO(image_bytes()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed_files:
        packed_files.writestr("1.png", image_bytes())
        link = zipfile.ZipInfo("2.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        packed_files.writestr(link, "1.png")
    for name, num in (("a.tar", 2), ("a.zip", 1)):
        images = load_images(Data(source=str(tmp_path / name)), 1, 8)
        assert len(images) == 1
        assert str(images.source.passed_over) == f"{num} no regular files"  # type: ignore[attr-defined]


def test_a_zip_whose_file_is_more_than_it_claims_is_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", b"\0" * 10_000_000)
    content = (tmp_path / "a.zip").read_bytes()
    size = (10_000_000).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(content.replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(DamagedError, match=r"a\.zip:1\.png: can't be read .its checksum differs"):
        load_images(Data(source=str(tmp_path / "a.zip")), 1, 8)


@pytest.mark.parametrize("last", ["999999999", "9" * 18, "9" * 5000])
def test_a_range_of_too_many_shards_is_refused_at_once(last: str) -> None:
    with pytest.raises(ValueError, match=r"webdataset:\S+: .*expected"):
        open_source(Data(source=f"{shards.PREFIX}{{0..{last}}}"))
