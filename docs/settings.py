"""Write settings.md, every setting with its default, from the docstrings of ``decouple_merge.config``.

python docs/settings.py
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from decouple_merge.config import Config, Protocol, Study, Zoo
from decouple_merge.config.section import Section

PAGE = Path(__file__).with_suffix(".md")
# Names of fields, and what the lines below say of them.
ENTRY = r"^    (\w+(?:, \w+)*): ((?:.|\n(?!    \w+(?:, \w+)*: ))+)"
ROOTS: dict[type[Section], str] = {Config: "", Protocol: "deme evaluate", Study: "deme study", Zoo: "deme schedule"}
HEAD = """# Settings

Every key that a config takes, with its default. `--set finetune.num_updates=100` sets one. This page is made from the
code: `python docs/settings.py`.
"""


def sections(root: type[Section], path: str) -> Iterator[tuple[type[Section], str]]:
    """List a section and all below it, each with the place of its keys; where classes inherit, each class."""
    for kind in reversed(root.__mro__):
        if issubclass(kind, Section) and kind is not Section and own_fields(kind):
            yield kind, path
    for name in root.model_fields:
        if (inner := section_of(root, name)) is not None:
            yield from sections(inner, f"{path}.{name}".lstrip("."))


def own_fields(kind: type[Section]) -> list[str]:
    return [name for name in kind.__annotations__ if name in kind.model_fields]


def entries(kind: type[Section]) -> dict[str, str]:
    """Read the entries of a docstring's attributes."""
    found: dict[str, str] = {}
    for names, body in re.findall(ENTRY, inspect.getdoc(kind) or "", re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(body.split()))
    return found


def described(kind: type[Section], name: str) -> str:
    """Say what a field is: by its own entry, or by that of a class above, or which entry names it."""
    own = entries(kind)
    if told := [found[name] for above in kind.__mro__ if name in (found := entries(above))]:
        return told[0]
    if (inner := section_of(kind, name)) is not None:
        return (inspect.getdoc(inner) or "").partition("\n")[0]
    naming = [key for key, body in own.items() if re.search(rf"\b{name}\b", body)]
    return f"see `{naming[0]}`" if naming else ""


def section_of(kind: type[Section], name: str) -> type[Section] | None:
    annotation = kind.model_fields[name].annotation
    for one in (annotation, *get_args(annotation)):
        if inspect.isclass(one) and issubclass(one, Section):
            return one
    return None


def default(kind: type[Section], name: str) -> str:
    value: Any = kind.model_fields[name].get_default(call_default_factory=True)
    if kind.model_fields[name].is_required():
        return "required"
    if isinstance(value, Section):
        return "a section"
    plain = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{plain}`" if plain else "none"


def pages() -> Iterator[str]:
    places: dict[type[Section], list[str]] = {}
    for root, verb in ROOTS.items():
        for kind, path in sections(root, ""):
            where = f"`{path}`" if path else f"`{verb}`" if verb else "the top of a config"
            # What a verb shares with a config is told there.
            if where not in places.setdefault(kind, []) and (not verb or not places[kind]):
                places[kind].append(where)
    yield HEAD
    last = ""
    for kind, where in places.items():
        heading = ", ".join(where)
        if heading != last:
            first = (inspect.getdoc(kind) or "").partition("\n")[0].replace("``", "`")
            yield f"\n## {heading[0].upper()}{heading[1:]}\n\n{first}\n\n| key | default | is |\n|---|---|---|"
        last = heading
        for name in own_fields(kind):
            text = described(kind, name).replace("``", "`").replace("|", "\\|")
            yield f"| `{name}` | {default(kind, name)} | {text} |"


if __name__ == "__main__":
    PAGE.write_text("\n".join(pages()) + "\n")
