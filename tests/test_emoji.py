"""Noto emoji as a known data set, from a package of the real one's layout."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from decouple_merge.config import Data
from decouple_merge.data import emoji, fashion
from decouple_merge.data.captions import load_captions
from decouple_merge.data.sources import load_images, open_images
from decouple_merge.errors import UserError

TONES = list(emoji.SKIN_TONES)


def listed(number: int, name: str, tones: list[str]) -> dict[str, Any]:
    variations = {t: {"image": f"{number}-{t.lower()}.png"} for t in tones}
    return {
        "name": name,
        "image": f"{number}.png",
        "category": "People & Body",
        "subcategory": "hand-fingers",
        **({"skin_variations": variations} if tones else {}),
    }


LISTED = [
    listed(1, "WAVING-HAND SIGN", TONES),
    listed(2, "Åland Flag", []),
    listed(3, "HANDSHAKE", [f"{TONES[0]}-{TONES[4]}"]),
    listed(4, "SHARK", []),
]


def write_package(folder: Path, colours: dict[str, tuple[int, int, int, int]] | None = None) -> Path:
    """Write a package of the emoji above, each of one colour."""
    folder.mkdir()
    files = {"package/emoji.json": json.dumps(LISTED).encode(), "package/img/google/sheets/64.png": b"not read"}
    for one in LISTED:
        for image in [one["image"], *(v["image"] for v in one.get("skin_variations", {}).values())]:
            buffer = io.BytesIO()
            Image.new("RGBA", (64, 64), (colours or {}).get(image, (0, 0, 0, 255))).save(buffer, "png")
            files[f"package/img/google/64/{image}"] = buffer.getvalue()
    with tarfile.open(folder / emoji.FILE, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


def test_a_caption_is_name_and_kind_or_name_and_skin_tone(tmp_path: Path) -> None:
    found, _ = emoji.read_emoji(write_package(tmp_path / "npm"))
    captions = {e.name: e.caption for e in found}
    assert captions["1.png"] == "waving hand sign, hand fingers"
    assert captions["1-1f3fc.png"] == "waving hand sign medium light skin"
    assert captions["3-1f3fb-1f3ff.png"] == "handshake light and dark skin"
    assert captions["2.png"] == "åland flag, hand fingers"
    assert len(captions) == 10


def test_skin_tones_stay_together_in_an_order_that_is_not_the_files(tmp_path: Path) -> None:
    found, _ = emoji.read_emoji(write_package(tmp_path / "npm"))
    groups = [e.group for e in found]
    changes = [b for a, b in zip([None, *groups], groups, strict=False) if a != b]
    assert sorted(changes) == [0, 1, 2, 3]
    assert changes != [0, 1, 2, 3]


def test_transparency_becomes_white_and_each_image_keeps_its_caption(tmp_path: Path) -> None:
    folder = write_package(tmp_path / "npm", {"4.png": (255, 0, 0, 51), "2.png": (0, 0, 255, 255)})
    data = Data(source="noto-emoji", path=folder, fit="resize", num_held_out=1)
    images = load_images(data, 3, 32)
    assert images[0].shape == (3, 32, 32)
    by_caption = dict(zip(load_captions(images, data), images.stack(range(10)), strict=True))
    assert by_caption["shark, hand fingers"].float().mean((1, 2)).tolist() == [255.0, 204.0, 204.0]
    assert by_caption["åland flag, hand fingers"].float().mean((1, 2)).tolist() == [0.0, 0.0, 255.0]


def test_another_size_is_refused_unless_resizing_is_asked_for(tmp_path: Path) -> None:
    folder = write_package(tmp_path / "npm")
    with pytest.raises(ValueError, match=r"found images 64×64 with 3 channel.*expected 32×32.*data.fit: resize"):
        load_images(Data(source="noto-emoji", path=folder), 3, 32)


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path is .* which has no emoji-datasource-google-16.0.0.tgz; run npm"):
        load_images(Data(source="noto-emoji", path=tmp_path), 3, 64)


@pytest.mark.parametrize("keep", [0, 200, 0.9])
def test_a_package_that_is_cut_short_is_refused(tmp_path: Path, keep: float) -> None:
    path = write_package(tmp_path / "npm") / emoji.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(ValueError, match=r"16.0.0.tgz: not a whole package of Noto emoji .*fetch it again from https"):
        load_images(Data(source="noto-emoji", path=path.parent), 3, 64)


def test_without_a_folder_it_is_downloaded_once_with_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = write_package(tmp_path / "npm"), []

    def retrieve(url: str, known_hash: str, **places: Any) -> str:
        calls.append((url, known_hash))
        return str(folder / emoji.FILE)

    monkeypatch.setattr(emoji.pooch, "retrieve", retrieve)
    emoji.read_emoji.cache_clear()
    try:
        assert len(open_images("noto-emoji")) == 10
        assert open_images("noto-emoji")[0].shape == (3, 64, 64)
    finally:
        emoji.read_emoji.cache_clear()
        load_images.cache_clear()
    ((url, known_hash),) = calls
    assert url.endswith(emoji.FILE)
    assert known_hash.startswith("sha256:")


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_without_a_network_or_the_right_bytes_the_error_says_what_to_do(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def retrieve(*args: Any, **places: Any) -> str:
        raise kind("no route")

    monkeypatch.setattr(emoji.pooch, "retrieve", retrieve)
    with pytest.raises(UserError, match=r"can't be downloaded \(no route\); run npm pack .* and set data.path"):
        emoji.read_emoji(None)
    monkeypatch.setattr(fashion, "FOLDER", Path("nowhere"))
    with pytest.raises(UserError, match=r"neither in nowhere nor can it be downloaded \(no route\); install Debian's"):
        fashion.FashionMnist(Data()).read()
