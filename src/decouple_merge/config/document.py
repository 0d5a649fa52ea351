"""YAML as configs are written in it: small, plain, and every key once."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, is_ours
from ..storage.reading import check_file, read_text

# A config has some hundred values. More would take seconds to parse, and aliases that repeat each other gigabytes.
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 200_000, 50_000, 40
PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
# Numbers as YAML 1.2 has them. By 1.1 ``1e-3`` is a text, ``010`` is 8, ``1:30`` is 90 and ``2024-01-01`` a date.
NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)",
    "float": r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_KEPT = {
    first: [(tag, form) for tag, form in forms if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {first: list(forms) for first, forms in _KEPT.items()}

    def fetch_flow_collection_start(self, token: Any) -> None:
        # For every bracket the scanner looks at all that are open.
        if self.flow_level >= MAX_DEPTH:
            raise RecursionError
        super().fetch_flow_collection_start(token)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {first: list(forms) for first, forms in _KEPT.items()}


for _kind in (_Loader, _Dumper):
    for _name, _form in NUMBERS.items():
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_form})\Z"), list("-+.0123456789"))


def read_document(path: Path) -> dict[str, Any]:
    """Read keys and values from a YAML file.

    Raises:
        UserError: the file is missing, too large, empty, in another encoding, or not YAML as ``parse`` wants it.
    """
    advice = "give the path of a YAML file, or the name of a config that we ship"
    if check_file(path, advice) > MAX_BYTES:
        raise UserError(f"{path} is longer than {MAX_BYTES:,} bytes; {advice}")
    values = parse(read_text(path, advice), str(path))
    if values is None:
        raise UserError(f"{path} is empty; write {{}} in it if every value shall be the default")
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {type(values).__name__}, expected keys and values")
    if other := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"{path}: found the key {other[0]!r}, expected the name of a section or of a value")
    return values


def parse(text: str, where: str) -> Any:
    """Parse one YAML document to plain values.

    Raises:
        UserError: it is not YAML, a key stands twice, it has tags, is nested too deep or grows too large by aliases.
    """
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, where, {}, ())
        return loader.construct_document(node)
    except RecursionError as error:
        raise UserError(f"{where}: nested too deep, expected at most {MAX_DEPTH} levels") from error
    except UserError:
        raise
    # Its own constructors let Python's errors through, such as those of int() for too many digits.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        if is_ours(error):
            raise
        raise UserError(f"{where} is not valid YAML: {error}") from error
    finally:
        loader.dispose()


def dump(values: dict[str, Any]) -> str:
    """Write plain values as YAML that ``parse`` reads back to equal ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_commented(values: dict[str, Any], comments: dict[str, str]) -> str:
    """Write sections of plain values as YAML with a comment behind some keys, which are named with dots."""
    lines, parents = list[str](), list[tuple[int, str]]()
    for line in dump(values).splitlines():
        found = re.match(r"( *)(\w+):", line)
        if found is not None:
            depth, key = len(found[1]), found[2]
            parents = [*(p for p in parents if p[0] < depth), (depth, key)]
            if comment := comments.get(".".join(name for _, name in parents)):
                line = f"{line:<31} # {comment}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _check(node: Any, where: str, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Count the values below a node, aliases as often as they are used, and refuse what a config doesn't have."""
    line = f"{where}, line {node.start_mark.line + 1}"
    if node.tag not in PLAIN:
        raise UserError(f"{line}: the tag {node.tag} is not supported, expected plain values")
    if id(node) in above:
        raise UserError(f"{line}: a value contains itself")
    if len(above) >= MAX_DEPTH:
        raise UserError(f"{line}: nested too deep, expected at most {MAX_DEPTH} levels")
    if id(node) not in sizes:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, where)
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(_check(child, where, sizes, (*above, id(node))) for child in children)
    if sizes[id(node)] > MAX_VALUES:
        raise UserError(f"{line}: more than {MAX_VALUES:,} values, by aliases that repeat each other")
    return sizes[id(node)]


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}, line {line}: a key is a list or a section, expected a name")
        if key.value in first:
            raise UserError(f"{where}: the key {key.value!r} stands in line {first[key.value]} and in line {line}")
        first[key.value] = line
