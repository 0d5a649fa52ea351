"""What a run's merge rule needs besides the experts: seeds of masks, Fisher information, inner products of inputs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..merging.rules import RULES
from ..merging.rules.rule import Context, Settings
from ..seeds import stream_seed
from ..storage.reading import parse_json
from ..storage.tensors import TensorFiles
from .fisher import write_fishers
from .gram import write_grams
from .planned import Plan


class Kind(NamedTuple):
    """A kind of file: its name in ``Rule.needs`` and in a merge's settings, its place, its record, its maker."""

    need: str
    path: Callable[[int], Path]
    record: str
    write: Callable[[Plan], Iterator[str]]


def _kinds(plan: Plan) -> list[Kind]:
    """List the kinds that the search's rule needs."""
    every = [
        Kind("fishers", plan.run.fisher, "fisher", write_fishers),
        Kind("grams", plan.run.gram, "gram", write_grams),
    ]
    return [kind for kind in every if kind.need in RULES[plan.config.search.method].needs]


def write_rule_inputs(plan: Plan, experts_sha256: Sequence[str]) -> Iterator[str]:
    """Write the files that the search's rule needs, unless they are there, of the same experts."""
    for kind in _kinds(plan):
        if [_origin(kind, i) for i in range(len(experts_sha256))] != list(experts_sha256):
            yield from kind.write(plan)


def _origin(kind: Kind, index: int) -> str | None:
    path = kind.path(index)
    if not path.exists():
        return None
    record = parse_json(TensorFiles([path]).metadata.get(kind.record, "{}"), path, "remove it to make it again")
    return record.get("expert_sha256") if isinstance(record, dict) else None


def rule_records(plan: Plan) -> list[str]:
    """Say what the files that the search's rule needs were made from; none of those that aren't there."""
    paths = [(kind.path(i), kind.record) for kind in _kinds(plan) for i in range(len(plan.ranges))]
    return [TensorFiles([path]).metadata.get(record, "") for path, record in paths if path.exists()]


def rule_files(plan: Plan) -> dict[str, list[Path]]:
    """Name the files that the search's rule needs, as a merge's settings do."""
    return {kind.need: [kind.path(i) for i in range(len(plan.ranges))] for kind in _kinds(plan)}


def contexts(plan: Plan, experts_sha256: Sequence[str]) -> Callable[[str], Context]:
    """Make the function that says what the search's rule needs for a key, besides the tensors.

    Args:
        experts_sha256: of what is combined, in its order.

    Raises:
        UserError: a file that it needs is missing.
    """
    search = plan.config.search
    settings, needs = Settings(**search.rule_settings()), RULES[search.method].needs
    paths = rule_files(plan)
    if missing := [path for each in paths.values() for path in each if not path.exists()]:
        raise UserError(f"{missing[0]} is missing, which method {search.method} needs; start the search's leader first")
    identities = experts_sha256 if "seeds" in needs else []
    files = {need: [TensorFiles([path]) for path in each] for need, each in paths.items()}

    def context(key: str) -> Context:
        seeds = [stream_seed(search.seed, sha256, key) for sha256 in identities]
        found = {need: [f[key] for f in each if key in f.entries] for need, each in files.items()}
        return Context(key, settings, seeds, found.get("fishers", []), found.get("grams", []))

    return context
