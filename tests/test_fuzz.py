"""Whatever a config or a file's header holds, it is read or refused as a user's mistake; nothing else comes out."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decouple_merge.config import Config, Merge, Protocol, Section, dump_config, load_config, validate
from decouple_merge.config.loader import _keys
from decouple_merge.data.prompts import read_prompts
from decouple_merge.errors import UserError
from decouple_merge.evaluation.compare import compare
from decouple_merge.merging.described import describe_model
from decouple_merge.merging.experts import open_expert, open_model
from decouple_merge.merging.recipes import repeat_merge
from decouple_merge.models.base import load_base
from decouple_merge.storage.files import read_records, read_tensors
from decouple_merge.storage.reading import read_record
from decouple_merge.storage.tensors import TensorFiles

NUM_EXAMPLES = int(os.environ.get("DEME_FUZZ_EXAMPLES", "500"))
fuzz = settings(
    max_examples=NUM_EXAMPLES,
    deadline=20_000,
    derandomize=NUM_EXAMPLES == 500,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Make a folder in memory where there is one: thousands of files are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as made:
        yield Path(made)


# -- configs

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "~", "*", "nan", "1e999", "\0", "\ud800", "~root", "a:b", "none", "gp", "fp16", "{}", "%s"]),
    st.sampled_from([10**30, 2**63, -(2**63), 2**64, 5e-324, 1.8e308, -0.0]),
    st.dates(),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def assignments_of(section: type[Section]) -> st.SearchStrategy[list[tuple[str, Any]]]:
    return st.lists(st.tuples(st.sampled_from(sorted(_keys(section))), VALUES), max_size=5)


def nested(assignments: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in assignments:
        place = values
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = value
    return values


@fuzz
@given(assignments=assignments_of(Config))
def test_a_config_of_any_values_is_read_or_refused(folder: Path, assignments: list[tuple[str, Any]]) -> None:
    path = folder / "values.yaml"
    path.write_text(yaml.dump(nested(assignments), allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    config = None
    with suppress(UserError):
        config = load_config(path)
    if config is not None:
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config


TOKENS = st.sampled_from(
    [
        *":-?,[]{}&*!|>'\"%@`#~ \n\t=<.",
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!float ",
        "!!set ",
        "!!timestamp ",
        "---\n",
        "...",
        "\n  ",
        ": ",
        "- ",
        "seed",
        "finetune",
        "betas",
        "search",
        "frozen",
        "1",
        "0.5",
        "1e3",
        ".nan",
        "true",
        "é",
        "\ufeff",
    ]
)


@fuzz
@given(tokens=st.lists(TOKENS | st.text(max_size=3), max_size=40))
def test_a_config_of_any_text_is_read_or_refused(folder: Path, tokens: list[str]) -> None:
    path = folder / "text.yaml"
    path.write_text("".join(tokens), encoding="utf-8", errors="surrogatepass")
    with suppress(UserError):
        load_config(path)


@fuzz
@given(content=st.binary(max_size=60))
def test_a_config_of_any_bytes_is_read_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "bytes.yaml"
    path.write_bytes(content)
    with suppress(UserError):
        load_config(path)


KEYS = st.sampled_from(sorted({*_keys(Protocol), *_keys(Merge)})) | st.text("abc.[]0", max_size=6)
OVERRIDES = st.builds(
    lambda key, value: f"{key}={value if isinstance(value, str) else json.dumps(value, default=str)}",
    KEYS,
    VALUES | st.lists(TOKENS, max_size=6).map("".join),
)


@fuzz
@given(override=OVERRIDES)
def test_an_override_is_taken_or_refused(override: str) -> None:
    with suppress(UserError):
        validate(Protocol, {}, "deme evaluate", [override])
    with suppress(UserError):
        validate(Merge, {"weights": [1.0]}, "merge", [override])


# -- files

NAMES = st.sampled_from(["a", "b", "conv_in.weight", "", "__metadata__", "a.alpha", "\0", "é", "x.lora_A.weight"])
OFFSETS = st.lists(st.integers(-1, 24) | st.sampled_from([2**63, 2**64, 10**30]), max_size=3) | SCALARS
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "X9", "", "f32"]) | SCALARS,
        "shape": st.lists(st.integers(-1, 6) | st.sampled_from([2**32, 2**63, 10**20]), max_size=4) | SCALARS,
        "data_offsets": OFFSETS,
        "extra": SCALARS,
    },
)
HEADERS = st.lists(st.tuples(NAMES, ENTRIES | VALUES), max_size=4).map(
    # Written by hand, since a dict can't hold a key twice.
    lambda pairs: "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v, default=str, skipkeys=True)}" for k, v in pairs) + "}"
)
SIZES = st.none() | st.integers(0, 2**16) | st.sampled_from([2**31, 2**63 - 1, 2**64 - 1, 100_000_001])


@fuzz
@given(header=HEADERS.map(str.encode) | st.binary(max_size=40), size=SIZES, data=st.binary(max_size=32))
def test_a_weights_file_of_any_header_is_read_or_refused(
    folder: Path, header: bytes, size: int | None, data: bytes
) -> None:
    path = folder / "header.safetensors"
    path.write_bytes((len(header) if size is None else size).to_bytes(8, "little") + header + data)
    with suppress(UserError):
        files = TensorFiles([path])
        assert len(files.sha256()) == 64
    with suppress(UserError):
        read_tensors(path)


CONTENTS = st.one_of(
    st.binary(max_size=60),
    VALUES.map(lambda value: json.dumps(value, default=str, skipkeys=True).encode()),
    st.lists(TOKENS | st.text(max_size=4), max_size=20).map(lambda t: "".join(t).encode(errors="surrogatepass")),
    st.lists(
        st.fixed_dictionaries({}, optional={"image_id": SCALARS, "id": SCALARS, "caption": SCALARS}) | SCALARS,
        max_size=3,
    ).map(lambda found: json.dumps({"annotations": found}, default=str).encode()),
    st.sampled_from([b"[" * 9_000, b'{"a":' * 2_000, b"9" * 5_000, b"[" + b"9" * 10_000 + b"]", b"", b"\xef\xbb\xbf"]),
)


@fuzz
@given(content=CONTENTS, suffix=st.sampled_from([".txt", ".tsv", ".json"]))
def test_a_prompt_file_of_any_content_is_read_or_refused(folder: Path, content: bytes, suffix: str) -> None:
    path = folder / f"prompts{suffix}"
    path.write_bytes(content)
    with suppress(UserError):
        assert all(isinstance(prompt, str) and prompt for prompt in read_prompts(path))


@fuzz
@given(content=CONTENTS)
def test_records_of_any_content_are_read_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "record.json"
    path.write_bytes(content)
    with suppress(UserError):
        assert isinstance(read_record(path, "make it again", base_sha256=str)["base_sha256"], str)
    with suppress(UserError):
        assert all(isinstance(record["model"], str) for record in read_records(path, model=str))
    with suppress(UserError):
        list(compare(str(path), str(path)))


@fuzz
@given(index=CONTENTS, name=st.sampled_from(["model_index.json", "diffusion_pytorch_model.safetensors.index.json"]))
def test_a_folder_with_any_index_is_read_or_refused(folder: Path, index: bytes, name: str) -> None:
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    (model / name).write_bytes(index)
    for read in (open_model, open_expert, lambda path: list(describe_model(path)), lambda path: load_base(str(path))):
        with suppress(UserError):
            read(model)


@fuzz
@given(recipe=CONTENTS | HEADERS.map(str.encode))
def test_a_recipe_of_any_content_is_read_or_refused(folder: Path, recipe: bytes) -> None:
    path = folder / "merge.json"
    path.write_bytes(recipe)
    with suppress(UserError):
        list(repeat_merge(path, folder / "merged", dry_run=True))
