"""Files that say or hold more than memory does are refused before anything is allocated for them."""

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import children
from decouple_merge.config import load_config
from decouple_merge.data.arrays import read_array
from decouple_merge.data.prompts import read_prompts
from decouple_merge.data.sources import open_images
from decouple_merge.errors import UserError
from decouple_merge.evaluation.references import holds_statistics
from decouple_merge.merging.described import describe_model
from decouple_merge.merging.recipes import repeat_merge
from decouple_merge.models.ranges import read_similarity
from decouple_merge.storage.files import read_records
from decouple_merge.storage.reading import read_record

READERS: dict[str, Callable[[Path], Any]] = {
    "images": lambda path: open_images(str(path)),
    "statistics": holds_statistics,
    "similarity": read_similarity,
    "weights": lambda path: list(describe_model(path)),
    "prompts": read_prompts,
    "records": read_records,
    "record": lambda path: read_record(path, "mend it"),
    "recipe": lambda path: list(repeat_merge(path, Path("out"))),
    "config": load_config,
}
# For a process that reads, beyond what it has after its imports.
MEMORY = 300_000_000


def read_all(lies: list[tuple[str, Path]], found: Path) -> None:
    """Read files in little memory, and write what came of each."""
    children.limit_memory(MEMORY)
    with found.open("w") as lines:
        for kind, path in lies:
            try:
                READERS[kind](path)
                said = "read"
            except UserError as error:
                said = f"refused: {error}"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            lines.write(json.dumps([kind, str(path), said]) + "\n")


def npy(shape: tuple[int, ...], content: bytes = b"", dtype: str = "|u1") -> bytes:
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def zipped(path: Path, name: str, content: bytes, says: int | None = None) -> Path:
    """Write a zip file of one member, whose size may be said to be another."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, content)
        if says is not None:
            file.infolist()[0].file_size = says
    return path


def png(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def sparse(path: Path, num_bytes: int, start: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(num_bytes)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def safetensors(header: dict[str, object], size: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


@pytest.fixture
def lies(tmp_path: Path) -> list[tuple[str, Path]]:
    terabytes, tensor = 2**46, {"dtype": "F32", "shape": [2**44], "data_offsets": [0, 2**46]}
    (tmp_path / "bomb").mkdir()
    written(tmp_path / "bomb/a.png", png(60_000, 60_000))
    arrays = {
        "64tb.npz": npy((terabytes,)),
        "2gb.npz": npy((2_000_000_000,), b"x" * 50),
        "negative.npz": npy((-5, 8, 8)),
        "overflow.npz": npy((2**40, 2**40)),
    }
    found = [
        ("images", tmp_path / "bomb"),
        ("images", written(tmp_path / "1gb.npy", npy((1_000_000_000, 8, 8), b"x" * 100))),
        ("images", sparse(tmp_path / "8gb.npy", 30_000_000_000, npy((30_000_000_000 - 128,)))),
        ("images", zipped(tmp_path / "says.zip", "a.png", png(8, 8), says=terabytes)),
        ("weights", written(tmp_path / "a.safetensors", safetensors({"a": tensor}))),
        ("weights", written(tmp_path / "b.safetensors", safetensors({}, 2**62))),
        ("weights", sparse(tmp_path / "c.safetensors", 200_000_000, struct.pack("<Q", 199_999_000))),
        ("prompts", sparse(tmp_path / "p.txt", 3_000_000_000)),
        ("prompts", sparse(tmp_path / "p.tsv", 3_000_000_000)),
        ("prompts", sparse(tmp_path / "p.json", 3_000_000_000)),
        ("records", sparse(tmp_path / "r.jsonl", 3_000_000_000)),
        ("record", sparse(tmp_path / "r.json", 3_000_000_000)),
        ("recipe", sparse(tmp_path / "recipe.yaml", 3_000_000_000)),
        ("config", sparse(tmp_path / "config.yaml", 3_000_000_000)),
    ]
    for name, content in arrays.items():
        found += [
            (kind, zipped(tmp_path / name, "mu.npy", content, says=terabytes)) for kind in ("images", "statistics")
        ]
        (tmp_path / "maps").mkdir(exist_ok=True)
        found.append(("similarity", zipped(tmp_path / "maps" / name, "timesteps.npy", content, says=terabytes)))
    return found


def test_a_file_that_says_more_than_memory_holds_is_refused_before_it_is_read(
    tmp_path: Path, lies: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert children.status(children.fork(lambda: read_all(lies, tmp_path / "found.jsonl"))) == 0
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(kind, path) for kind, path, _ in found] == [(kind, str(path)) for kind, path in lies]
    wrong = [f"{kind} {Path(path).name}: {what}" for kind, path, what in found if not what.startswith("refused: ")]
    assert wrong == [], wrong
    assert all("\n" not in what for _, _, what in found)


def test_an_honest_array_that_is_small_when_packed_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", np.zeros((500, 32, 32, 3), dtype=np.uint8))
    assert read_array(tmp_path / "a.npz").shape == (500, 3, 32, 32)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as file:
        file.writestr("notes.txt", "not an array")
    assert read_array(tmp_path / "a.npz").shape == (500, 3, 32, 32)


HEADERS = st.fixed_dictionaries(
    {
        "descr": st.sampled_from(
            ["|u1", "<f8", "|O", "<U999999999", "|S0", "|V9", "<M8[s]", "x", "", [("a", "<f4")], None, 3]
        ),
        "fortran_order": st.sampled_from([True, False, None, "x"]),
        "shape": st.one_of(
            st.tuples(*[st.sampled_from([0, 1, 2, 8, -1, 2**31, 2**40, 2**63, True, 1.5])] * 3),
            st.sampled_from([(), None, [8, 8], "88", (10**30,)]),
        ),
    }
)


@settings(
    max_examples=500,
    deadline=20_000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    header=st.one_of(HEADERS.map(repr), st.text(max_size=20), HEADERS.map(lambda h: repr({**h, "more": 1}))),
    version=st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"]),
    content=st.binary(max_size=64),
    cut=st.integers(0, 40),
    says=st.sampled_from([None, 0, 2**32, 2**46]),
)
def read_any(header: str, version: bytes, content: bytes, cut: int, says: Any) -> None:
    raw = header.encode(errors="replace") + b"\n"
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(raw))
    array = b"\x93NUMPY" + version + size + raw + content
    array = array[: len(array) - cut] if cut > 20 else array
    packed = zipped(Path("a.npz"), "mu.npy", array, says)
    for path in (written(Path("a.npy"), array), packed):
        with suppress(UserError):
            read_array(path)
    with suppress(UserError):
        holds_statistics(packed)


def read_any_in_little_memory() -> None:
    children.limit_memory(MEMORY)
    read_any()


def test_arrays_of_any_header_are_read_or_refused_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert children.status(children.fork(read_any_in_little_memory)) == 0
