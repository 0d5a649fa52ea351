"""The numbers of a run: every model of the table on every set of report seeds."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..config import Config
from ..evaluation.extractors import EXTRACTORS, label_of, weights_of
from ..evaluation.metrics import METRICS, extractors_of
from ..evaluation.records import identity_of, wanted_record
from ..models.network import load_network, num_parameters
from ..storage.files import append_record, read_records
from .costs import timed
from .planned import Plan
from .reported import compared_fields, report_models
from .scoring import score_sets
from .table_models import sha256_of
from .watch import reported_with


@dataclass(frozen=True)
class Row:
    """A line of the result table: values of one metric over the sets of report seeds."""

    model: str
    num_parameters: int
    metric: str
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        return max(self.values) - min(self.values)


def _seed_set(config: Config, index: int) -> range:
    first = config.evaluate.first_seed + index * config.evaluate.num_images
    return range(first, first + config.evaluate.num_images)


def wanted_records(plan: Plan, models: list[str]) -> list[dict[str, Any]]:
    """List the records that the table has of some models of a run, as they will be but for their values.

    They have the hashes of the models, of the feature networks and of what images are compared with, as all of these
    are now; ``records.identity_of`` tells which of a metrics file they are.
    """
    evaluate, compared, found = plan.config.evaluate, _depends_on(plan), []
    for model in models:
        sha256 = sha256_of(plan, model)
        for metric, index in product(evaluate.metrics, range(evaluate.num_seed_sets)):
            seeds = _seed_set(plan.config, index)
            found.append(wanted_record(model, metric, len(seeds), seeds, compared[metric], sha256))
    return found


def _depends_on(plan: Plan) -> dict[str, dict[str, Any]]:
    """Say of each metric what its numbers depend on besides models and seeds."""
    found = compared_fields(plan)
    for metric, fields in found.items():
        name = METRICS[metric].extractor
        fields["extractor"] = label_of(name, weights_of(name, plan.config.evaluate))
    return found


def evaluate_models(plan: Plan, wanted: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Score models on sets of report seeds; yields the records that the run's metrics lack, which then has them.

    Args:
        wanted: records of ``wanted_records``.
    """
    done = {identity_of(r) for r in read_records(plan.run.metrics, model=str, metric=str, seeds=list)}
    # Cached before several processes ask for it at once.
    for name in extractors_of([record["metric"] for record in wanted if identity_of(record) not in done]):
        if not EXTRACTORS[name].reads_texts:
            reported_with(plan, name)
    # Once more where a process was lost between a number and its record.
    while sets := _sets([record for record in wanted if identity_of(record) not in done]):
        for record in timed(plan.run, "evaluate", score_sets(plan, sets)):
            if identity_of(record) not in done:
                done.add(identity_of(record))
                append_record(plan.run.metrics, record)
                yield record


def _sets(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group records by the images that they are of: one model's on one set of seeds."""
    together: dict[Any, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda r: r["seeds"]):
        together.setdefault((record["seeds"][0], record["model"]), []).append(record)
    return list(together.values())


def evaluate_run(plan: Plan) -> Iterator[dict[str, Any] | Row]:
    """Score every model of the result table on every set of report seeds; yields the table's rows."""
    wanted = wanted_records(plan, report_models(plan))
    yield from evaluate_models(plan, wanted)
    yield from result_table(plan, wanted)


def result_table(plan: Plan, wanted: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield a row for each metric and model, from those of the run's records that are of its models as they are now.

    Args:
        wanted: ``wanted_records``.
    """
    values = {identity_of(record): record["value"] for record in read_records(plan.run.metrics, value=(int, float))}
    size = num_parameters(plan.base.network)
    if plan.config.finetune.projection.placement == "trunk" and plan.run.merged.exists():
        merged_size = sum(v.numel() for v in load_network(plan.run.merged).values())
    else:
        merged_size = size
    sizes = {"ensemble": merged_size * len(plan.ranges), "merged": merged_size}
    found: dict[tuple[str, str], list[float]] = {}
    for record in wanted:
        if (identity := identity_of(record)) in values:
            found.setdefault((record["metric"], record["model"]), []).append(values[identity])
    for metric, model in product(plan.config.evaluate.metrics, report_models(plan)):
        if (metric, model) in found:
            yield Row(model, sizes.get(model, size), metric, found[metric, model])
