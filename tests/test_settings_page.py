"""The page of all settings says what the code says."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page() -> str:
    return "\n".join(runpy.run_path(str(ROOT / "docs/settings.py"))["pages"]()) + "\n"


def test_the_page_is_the_one_that_the_code_makes(page: str) -> None:
    assert (ROOT / "docs/settings.md").read_text() == page, "run python docs/settings.py"


def test_every_setting_is_explained(page: str) -> None:
    assert [line for line in page.splitlines() if line.endswith("|  |")] == []
