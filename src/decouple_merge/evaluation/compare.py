"""Compare the records of two models, and refuse where they differ in more than the model."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage.files import read_records
from .records import COMPARED_FIELDS, measured_by

Record = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """How two models differ in one metric.

    Attributes:
        a, b: the models' means.
        paired: b - a on each set of seeds that both were scored on; empty where there is none.
        standard_error: of b - a; None where one value each doesn't tell.
    """

    metric: str
    a: float
    b: float
    paired: list[float]
    standard_error: float | None

    def __str__(self) -> str:
        text = f"{self.metric}: A {self.a:.5g}, B {self.b:.5g}, B - A {self.b - self.a:+.4g}"
        error = "" if self.standard_error is None else f", standard error {self.standard_error:.2g}"
        if len(self.paired) > 1:
            low, high = min(self.paired), max(self.paired)
            return f"{text}, {low:+.4g} to {high:+.4g} over {len(self.paired)} sets of the same seeds{error}"
        how = "on the same seeds" if self.paired else "on different images"
        return f"{text} {how}{error or ', spread unknown: score more sets of seeds'}"


def compare(a: str, b: str) -> Iterator[Difference]:
    """Compare the records of two models in every metric that both have.

    Where both were scored on the same seeds, these are compared set by set, which cancels the noise they share.

    Args:
        a, b: a metrics file or a run folder; where it holds several models, followed by ``:MODEL``. The model that was
            scored last under a name counts, and of its records on the same seeds the last.

    Raises:
        UserError: there are no records, or some are not comparable: the field that differs is named.
    """
    first, second = _select(a), _select(b)
    metrics = [m for m in dict.fromkeys(r["metric"] for r in first) if any(r["metric"] == m for r in second)]
    if not metrics:
        known = [", ".join(sorted({r["metric"] for r in records})) for records in (first, second)]
        raise UserError(f"{a} has {known[0]} and {b} has {known[1]}, expected a metric in common")
    pairs = {m: tuple([r for r in records if r["metric"] == m] for records in (first, second)) for m in metrics}
    for metric, (of_a, of_b) in pairs.items():
        check_comparable(metric, of_a + of_b, a if a == b else f"{a} and {b}")
    for metric, (of_a, of_b) in pairs.items():
        yield _difference(metric, _by_seeds(of_a), _by_seeds(of_b))


def _select(source: str) -> list[Record]:
    path, model = Path(source), ""
    if not path.exists() and ":" in source:
        name, _, model = source.rpartition(":")
        path = Path(name)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{source}: there is no metrics file {file}; expected FILE or FILE:MODEL, or a run's folder")
    records = read_records(file, model=str, metric=str, value=(int, float))
    models = list(dict.fromkeys(r["model"] for r in records))
    records = [r for r in records if r["model"] == model] if model else records
    if not records:
        known = f" of {model!r}, only of {', '.join(models)}" if model else ""
        raise UserError(f"{file} has no records{known}")
    if not model and len(models) > 1:
        raise UserError(f"{file} has records of {', '.join(models)}; expected one model: append :MODEL to the name")
    # An older model of that name is another model.
    return [r for r in records if r.get("model_sha256") == records[-1].get("model_sha256")]


def check_comparable(metric: str, records: list[Record], where: str) -> None:
    """Require that records of a metric measure the same thing.

    Raises:
        UserError: they differ in something that the number depends on, which is named.
    """
    measured = [measured_by(r) for r in records]
    for field in COMPARED_FIELDS:
        values = list({own[field]: r.get(field) for own, r in zip(measured, records, strict=True)}.values())
        if len(values) > 1:
            raise UserError(
                f"{where}: records of {metric} differ in {field} ({', '.join(map(str, values))}), expected the same: "
                "they are not comparable; score both alike"
            )


def _by_seeds(records: list[Record]) -> dict[tuple[int, ...] | None, float]:
    return {tuple(r["seeds"]) if r.get("seeds") else None: float(r["value"]) for r in records}


def _difference(metric: str, a: dict[Any, float], b: dict[Any, float]) -> Difference:
    common = [seeds for seeds in a if seeds in b and seeds is not None]
    if common:
        paired = [b[seeds] - a[seeds] for seeds in common]
        error = statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else None
        mean_a, mean_b = (statistics.fmean(side[seeds] for seeds in common) for side in (a, b))
        return Difference(metric, mean_a, mean_b, paired, error)
    sides = [list(a.values()), list(b.values())]
    error = None
    if all(len(values) > 1 for values in sides):
        error = sum(statistics.variance(values) / len(values) for values in sides) ** 0.5
    return Difference(metric, statistics.fmean(sides[0]), statistics.fmean(sides[1]), [], error)
