"""The examples of docs/architecture.md: what they add is found, and their tests pass."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from decouple_merge import analysis, executors

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
ADDED = [(path, code) for path, code in BLOCKS if path.startswith("src/")]
TESTS = [(path, code) for path, code in BLOCKS if path.startswith("tests/")]


def test_every_example_is_two_files() -> None:
    assert len(ADDED) == len(TESTS) == 4


@pytest.mark.parametrize("index", range(len(ADDED)), ids=[Path(path).stem for path, _ in ADDED])
def test_an_example_runs(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, code = ADDED[index]
    name = Path(path).with_suffix("").relative_to("src").as_posix().replace("/", ".")
    if (PAGE.parents[1] / path).exists():
        module = importlib.import_module(name)
        tables = {key: value for key, value in vars(module).items() if isinstance(value, dict) and key.isupper()}
        for table in tables.values():
            for key in table:
                monkeypatch.setitem(table, key, table[key])
        # Added to the file's own table, and taken out again.
        before = {key: dict(table) for key, table in tables.items()}
        try:
            exec(compile(code, path, "exec"), vars(module))
            _run_tests(TESTS[index][1])
        finally:
            for key, table in tables.items():
                table.clear()
                table.update(before[key])
        return
    (tmp_path / Path(path).name).write_text(code, encoding="utf-8")
    for room in (analysis, executors):
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path)])
    _run_tests(TESTS[index][1])


def _run_tests(code: str) -> None:
    namespace: dict[str, Any] = {}
    exec(compile(code, "example", "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()
