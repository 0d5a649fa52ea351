"""Imports go down only: the layers of docs/architecture.md, read from the source."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "decouple_merge"
LAYERS = [
    ["timesteps", "losses", "projection", "rules", "weights", "metrics", "neighbours", "seeds"],
    [
        "alignment",
        "archives",
        "batches",
        "captions",
        "config",
        "models",
        "data",
        "emoji",
        "ensemble",
        "features",
        "encoders",
        "inception",
        "latents",
        "lora",
        "parts",
        "prompts",
        "references",
        "runs",
        "search",
        "shards",
        "strategies",
        "study",
        "tensors",
        "text_encoders",
    ],
    ["finetune", "gradient", "pretraining", "sample", "evaluate", "compare", "merging", "figures"],
    [
        "executors",
        "plan",
        "memory",
        "card",
        "objective",
        "fisher",
        "results",
        "selection",
        "recipes",
        "standalone",
        "scored",
        "scoring",
        "workflow",
        "progress",
        "cli",
    ],
]
LAYER = {name: index for index, names in enumerate(LAYERS) for name in names}
MATHS, STAGES = LAYERS[0], LAYERS[2]
# A foreign library has one adapter, diffusers has two; the other files don't know that it exists.
ADAPTERS = {
    "diffusers": ("models", "parts"),
    "typer": ("cli",),
    "optuna": ("study",),
    "cmaes": ("strategies",),
    "accelerate": ("finetune",),
    "bitsandbytes": ("finetune",),
    "datasets": ("data",),
    "matplotlib": ("figures",),
    "yaml": ("config",),
    "pydantic": ("config",),
    "transformers": ("encoders",),
    "tokenizers": ("text_encoders",),
    "peft": ("lora",),
}


def imports(name: str, *, top_level_only: bool = False) -> set[str]:
    """List what a module imports, ours with a dot: ``.models``, ``torch``."""
    found = set()
    tree = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 1 and not module:
                found |= {f".{alias.name}" for alias in node.names}
            elif node.level == 1:
                found.add("." + module.split(".")[0])
            elif module.split(".")[0] == "decouple_merge":
                found |= {f".{n}" for n in (module.split(".")[1:2] or [alias.name for alias in node.names])}
            else:
                found.add(module.split(".")[0])
    return found


def ours(name: str) -> set[str]:
    return {i[1:] for i in imports(name) if i.startswith(".") and not i.startswith(".__")}


def test_every_module_has_a_layer() -> None:
    assert {p.stem for p in SOURCE.glob("*.py")} - {"__init__"} == set(LAYER)
    assert not [p for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"]


@pytest.mark.parametrize("name", LAYER)
def test_a_module_imports_only_from_its_own_layer_and_below(name: str) -> None:
    assert [i for i in sorted(ours(name)) if LAYER[i] > LAYER[name]] == []


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_imports_no_other_stage(name: str) -> None:
    assert sorted(ours(name) & set(STAGES)) == []


@pytest.mark.parametrize("name", MATHS)
def test_maths_needs_only_torch_and_the_standard_library(name: str) -> None:
    foreign = {i for i in imports(name) if not i.startswith(".")} - sys.stdlib_module_names
    assert foreign <= {"torch", "jaxtyping"}


@pytest.mark.parametrize("library", ADAPTERS)
def test_only_its_adapter_imports_a_foreign_library(library: str) -> None:
    assert [name for name in LAYER if library in imports(name)] == list(ADAPTERS[library])


def test_modules_do_not_import_each_other_in_circles() -> None:
    TopologicalSorter({name: ours(name) for name in LAYER}).prepare()


def test_the_command_imports_nothing_heavy_before_it_knows_its_verb() -> None:
    foreign = imports("cli", top_level_only=True) - sys.stdlib_module_names
    assert foreign <= {"typer", "rich"}


def test_merging_files_imports_no_network_library() -> None:
    reached, waiting = set[str](), ["recipes"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        below = {m[1:] for m in imports(name, top_level_only=True) if m[1:] in LAYER}
        waiting += sorted(below - reached)
    assert not reached & {"models", "plan", "features", "finetune"}


def test_nothing_imports_the_command() -> None:
    assert [name for name in LAYER if "cli" in ours(name)] == []
