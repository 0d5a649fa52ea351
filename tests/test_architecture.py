"""The rooms import what their own first words say, and no more: read from the source."""

import ast
import re
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "decouple_merge"
ROOMS = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))
# Dotted names below the package: ``models.base``, ``config`` for a room's __init__, ``seeds``.
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*sorted(SOURCE.glob("*/**/*.py")), SOURCE / "errors.py", SOURCE / "seeds.py"]
}
MAX_LINES, MAX_FUNCTION_LINES = 300, 50
# Pure maths: torch and the standard library, inputs never modified.
MATHS = [
    "diffusion",
    "merging.rules",
    "merging.keys",
    "merging.order",
    "merging.arithmetic",
    "merging.adapted",
    "merging.survival",
    "evaluation.distances",
    "evaluation.neighbours",
    "evaluation.sliced",
    "seeds",
]
# A foreign library has one adapter; the other files don't know that it exists.
ADAPTERS = {
    "typer": ["cli"],
    "optuna": ["searching.study"],
    "cmaes": ["searching.strategies"],
    "datasets": ["data.hub"],
    "matplotlib": ["analysis", "experiment.analyses"],
    "yaml": ["config"],
    "pydantic": ["config"],
    "diffusers": ["models", "storage.hub"],
    "transformers": ["models"],
    "tokenizers": ["models"],
    "peft": ["models.lora"],
    "bitsandbytes": ["training.optimizers"],
    "filelock": ["storage"],
    "fsspec": ["storage.copies"],
    "jinja2": ["reporting.page"],
    "gradio": ["exploring.page"],
    "ray": ["executors.ray"],
    "sklearn": ["exploring.estimate"],
}


@cache
def imports(name: str, *, top_level_only: bool = False) -> frozenset[str]:
    """List what a module imports: ours from the package on with a dot, ``.models.base``, others by their first name."""
    path, found = MODULES[name], set[str]()
    package = path.relative_to(SOURCE).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                assert not (node.module or "").startswith("decouple_merge"), f"{name}: write it as a relative import"
                found.add((node.module or "").split(".")[0])
                continue
            start = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
            full = ".".join(part for part in start if part)
            each = [f"{full}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {"." + (one if one in MODULES else full) for one in each}
    return frozenset(found)


def ours(name: str, *, top_level_only: bool = False) -> set[str]:
    found = imports(name, top_level_only=top_level_only)
    return {i[1:] for i in found if i.startswith(".") and i != "."} - {name}


def room_of(name: str) -> str:
    return name.partition(".")[0]


def may_import(room: str) -> list[str]:
    """Read the list of rooms at the end of a room's first words."""
    words = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text(encoding="utf-8")))
    found = re.search(r"^Imports ([a-z,\s]+)\.\Z", words or "", re.MULTILINE)
    assert found, f"{room}/__init__.py: expected a last line such as 'Imports config, storage.' or 'Imports nothing.'"
    return [] if found[1] == "nothing" else re.split(r",\s+", found[1])


def is_in(name: str, places: list[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_its_first_words_say(room: str) -> None:
    used = {room_of(i) for name in MODULES if room_of(name) == room for i in ours(name)} - {room}
    assert sorted(used) == sorted(may_import(room))


def test_rooms_do_not_import_each_other_in_circles() -> None:
    TopologicalSorter({room: may_import(room) for room in ROOMS}).prepare()


def test_modules_do_not_import_each_other_in_circles() -> None:
    TopologicalSorter({name: ours(name) for name in MODULES}).prepare()


def test_every_file_is_in_a_room() -> None:
    assert {p.name for p in SOURCE.iterdir()} - {"__pycache__"} == {*ROOMS, "__init__.py", "errors.py", "seeds.py"}


@pytest.mark.parametrize("name", [name for name in MODULES if is_in(name, MATHS)])
def test_maths_needs_only_torch_and_the_standard_library(name: str) -> None:
    foreign = {i for i in imports(name) if not i.startswith(".")} - sys.stdlib_module_names
    assert foreign <= {"torch", "jaxtyping"}


@pytest.mark.parametrize("library", ADAPTERS)
def test_only_its_adapter_imports_a_foreign_library(library: str) -> None:
    importers = [name for name in MODULES if library in imports(name)]
    assert importers
    assert [name for name in importers if not is_in(name, ADAPTERS[library])] == []


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_small(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    long = [f.name for f in functions if f.end_lineno and f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES]
    assert (len(text.splitlines()) <= MAX_LINES, long) == (True, [])


def test_the_command_imports_nothing_heavy_before_it_knows_its_verb() -> None:
    reached = _reached("cli.main")
    foreign = {i for name in reached for i in imports(name, top_level_only=True) if not i.startswith(".")}
    assert foreign - sys.stdlib_module_names <= {"typer", "rich", "yaml", "pydantic"}


def test_merging_files_imports_no_network_library() -> None:
    reached = _reached("merging.recipes")
    assert not {i for name in reached for i in imports(name, top_level_only=True)} & {"diffusers", "transformers"}


def _reached(start: str) -> set[str]:
    """List the modules that importing one imports."""
    reached, waiting = set[str](), [start]
    while waiting:
        name = waiting.pop()
        reached |= {name, room_of(name)} & set(MODULES)
        waiting += sorted(ours(name, top_level_only=True) & set(MODULES) - reached)
    return reached
