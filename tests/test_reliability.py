"""docs/reliability.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_promise_has_its_test() -> None:
    named = set(re.findall(r"`(test_\w+)`", (TESTS.parent / "docs/reliability.md").read_text(encoding="utf-8")))
    there = {
        name
        for file in TESTS.glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
    }
    assert named
    assert named - there == set()
