"""The README's commands parse, its code runs, and its map is the package."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from decouple_merge.cli import main as cli
from decouple_merge.config import Config, dump_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = "".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md")))


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh", README + PAGES)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_map_names_every_folder_of_the_package() -> None:
    table = README.partition("## What is where")[2].partition("##")[0]
    named = re.findall(r"^\| `(\w+)/`", table, flags=re.MULTILINE)
    assert sorted(named) == sorted(p.parent.name for p in (ROOT / "src/decouple_merge").glob("*/__init__.py"))


def test_the_tests_that_the_precision_page_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/precision.md").read_text(encoding="utf-8")))
    defined = {
        name for p in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", p.read_text())
    }
    assert named
    assert sorted(named - defined) == []


def examples() -> list[list[str]]:
    """Take the commands out of every verb's help."""
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    return [shlex.split(found) for verb in verbs.values() for found in re.findall(r"`(deme [^`]*)`", verb.help)]


def test_every_verb_shows_an_example_of_its_own() -> None:
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {words[1] for words in examples()} == set(verbs)


@pytest.mark.parametrize("command", [c for c in [*commands(), *examples()] if c[0] == "deme"], ids=" ".join)
def test_every_command_parses(command: list[str]) -> None:
    verbs = typer.main.get_command(cli.app)
    _, verb, *arguments = command
    verbs.commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]
    for argument in arguments:
        if argument.startswith("configs/"):
            assert (ROOT / argument).is_file()


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "make"], ids=" ".join)
def test_every_make_target_exists(command: list[str]) -> None:
    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_library_examples_run(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config, out, drawn = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "image.png"
    config.write_text(dump_config(tiny_config()))
    places = {
        "configs/fashion-quick.yaml": str(config),
        "runs/seed-1": str(out),
        "models/fashion-ddpm": tiny_config().base,
        "num_inference_steps=50": "num_inference_steps=4",
        "image.png": str(drawn),
    }
    run, ensemble = [b for b in blocks("python") if "decouple_merge" in b]
    for example in (run, ensemble):
        for place, own in places.items():
            example = example.replace(place, own)
        exec(example, {})
    assert (out / "merged" / "model_index.json").is_file()
    assert "seed: 1" in (out / "config.yaml").read_text()
    assert drawn.is_file()
