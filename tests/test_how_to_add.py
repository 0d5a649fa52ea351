"""The examples of docs/architecture.md: what they add is found, and their tests pass."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from decouple_merge import analysis, executors
from decouple_merge.merging import rules

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
TESTS = [i for i, (path, _) in enumerate(BLOCKS) if path.startswith("tests/")]
# Files that are added, and their test behind them.
EXAMPLES = [BLOCKS[before + 1 : i + 1] for before, i in zip([-1, *TESTS], TESTS, strict=False)]


def test_every_example_is_files_and_their_test() -> None:
    assert len(EXAMPLES) == 5
    assert sum(map(len, EXAMPLES)) == len(BLOCKS)
    assert all(len(example) > 1 and all(path.startswith("src/") for path, _ in example[:-1]) for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=[Path(example[0][0]).stem for example in EXAMPLES])
def test_an_example_runs(example: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (analysis, executors, rules):
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path)])
    *added, (_, test) = example
    there = [path for path, _ in added if (PAGE.parents[1] / path).exists()]
    with unchanged_tables([module_of(path) for path in there]):
        for path, code in added:
            if path in there:
                exec(compile(code, path, "exec"), vars(module_of(path)))
            else:
                (tmp_path / Path(path).name).write_text(code, encoding="utf-8")
        namespace: dict[str, Any] = {}
        exec(compile(test, "example", "exec"), namespace)
        tests = [value for name, value in namespace.items() if name.startswith("test_")]
        assert tests
        for run in tests:
            run()


def module_of(path: str) -> Any:
    parts = Path(path).with_suffix("").relative_to("src").parts
    return importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


@contextmanager
def unchanged_tables(modules: list[Any]) -> Iterator[None]:
    """Take out of the modules' tables what is added to them meanwhile."""
    tables = [value for m in modules for name, value in vars(m).items() if isinstance(value, dict) and name.isupper()]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)
