"""Whatever a config or a file's header holds, it is read or refused as a user's mistake; nothing else comes out."""

import json
import os
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
from decouple_merge.errors import UserError

NUM_EXAMPLES = int(os.environ.get("DEME_FUZZ_EXAMPLES", "500"))
fuzz = settings(
    max_examples=NUM_EXAMPLES,
    deadline=2000,
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
