"""The tables and the figure of a study: every arm by every judge, from the records of its runs."""

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..analysis.figures import study_ratios
from ..config import Study
from ..evaluation.intervals import Ratio, paired_ratio
from ..evaluation.metrics import METRICS
from ..evaluation.records import identity_of
from ..storage.files import read_records, write_json, write_text
from ..storage.study_folder import StudyFolder
from ..training.made_from import images_of_update
from .planned import BASELINE, Plan, Plans
from .reported import report_models
from .results import wanted_records
from .sharing import drawing_key
from .table_models import is_made

# By arm and training seed, the records of a run that are of its models as they are now.
Records = dict[tuple[str, int], list[dict[str, Any]]]
# By training seed, a number for each set of report seeds.
Values = dict[int, list[float]]


@dataclass(frozen=True)
class Line:
    """What a judge says of a model of an arm.

    Attributes:
        arms: all that have this very model.
        values: by training seed, of each set of report seeds.
        low, high: of the means of the training seeds.
        to_pretrained, to_equal_compute: paired by training seed and set; None where there is nothing to compare with.
    """

    metric: str
    model: str
    arms: list[str]
    values: Values
    mean: float
    low: float
    high: float
    to_pretrained: Ratio | None
    to_equal_compute: Ratio | None


def current_records(plan: Plan) -> list[dict[str, Any]]:
    """Read those of a run's records that are of its models, and of what these are compared with, as they are now."""
    found = read_records(plan.run.metrics, model=str, metric=str, seeds=list, value=(int, float))
    models = {record["model"] for record in found}
    made = [model for model in report_models(plan) if model in models and is_made(plan, model)]
    now = {identity_of(record) for record in wanted_records(plan, made)}
    return [record for record in found if identity_of(record) in now]


def study_lines(study: Study, plans: Plans, records: Records) -> Iterator[Line]:
    """Yield a line for each judge and model that has numbers; a model that several arms share has one line."""
    metrics = list(dict.fromkeys(m for plan in plans.values() for m in plan.config.evaluate.metrics))
    keys = {
        (arm, model): _identity(study, plans, arm, model)
        for arm in study.arms
        for model in report_models(plans[arm, study.seeds[0]])
    }
    models = list(dict.fromkeys(model for _, model in keys))
    for metric in metrics:
        found = {(arm, model): _values(study, records, arm, model, metric) for arm, model in keys}
        for model in models:
            for key in dict.fromkeys(key for (_, m), key in keys.items() if m == model):
                arms = [arm for arm in study.arms if keys.get((arm, model)) == key]
                # Until all runs are finished, some that share a model don't have its numbers yet.
                arm = max(arms, key=lambda a: len(found[a, model]))
                if values := found[arm, model]:
                    equal = _equal_compute(study, plans, arm, model)
                    # A baseline with another loss is compared with the first; that isn't with itself.
                    is_same = keys.get((equal, BASELINE)) == key
                    others = found.get((arm, "pretrained"), {}), {} if is_same else found.get((equal, BASELINE), {})
                    yield _line(study, metric, model, arms, values, *others)


def _identity(study: Study, plans: Plans, arm: str, model: str) -> tuple[str, ...]:
    """Tell models from each other; what no key is known of is the arm's own."""
    return tuple(drawing_key(plans[arm, seed], model) or f"{arm} {model}" for seed in study.seeds)


def _values(study: Study, records: Records, arm: str, model: str, metric: str) -> Values:
    found: Values = {}
    for seed in study.seeds:
        of_sets = {
            tuple(r["seeds"]): r["value"] for r in records[arm, seed] if (r["model"], r["metric"]) == (model, metric)
        }
        if of_sets:
            found[seed] = [of_sets[s] for s in sorted(of_sets)]
    # A run that is being evaluated has not all sets yet.
    most = max(map(len, found.values()), default=0)
    return {seed: values for seed, values in found.items() if len(values) == most}


def _equal_compute(study: Study, plans: Plans, arm: str, model: str) -> str:
    """Name the arm whose baseline a model is compared with: its own; of a baseline or an arm without one, the first.

    That has as much compute, and is drawn and compared alike; the name is empty where there is none.
    """

    def key(name: str) -> tuple[int, str | None]:
        plan = plans[name, study.seeds[0]]
        settings = plan.config.finetune
        num_updates = len(plan.ranges) * settings.num_updates
        return num_updates * images_of_update(settings), drawing_key(plan, "pretrained")

    with_one = [a for a in study.arms if BASELINE in report_models(plans[a, study.seeds[0]])]
    if arm in with_one and model != BASELINE:
        return arm
    return next((a for a in with_one if key(a) == key(arm)), "")


def _line(
    study: Study, metric: str, model: str, arms: list[str], values: Values, pretrained: Values, equal: Values
) -> Line:
    means = [sum(v) / len(v) for v in values.values()]
    return Line(
        metric,
        model,
        arms,
        values,
        sum(means) / len(means),
        min(means),
        max(means),
        None if model == "pretrained" else _ratio(study, values, pretrained),
        None if model == "pretrained" else _ratio(study, values, equal),
    )


def _ratio(study: Study, values: Values, others: Values) -> Ratio | None:
    common = [seed for seed in values if seed in others and len(values[seed]) == len(others[seed])]
    if not common:
        return None
    a, b = (_stacked(side, common) for side in (values, others))
    return paired_ratio(a, b, study.num_resamples)


def _stacked(values: Values, seeds: list[int]) -> Tensor:
    return torch.tensor([values[seed] for seed in seeds], dtype=torch.float64)


def write_results(study: Study, plans: Plans, records: Records, folder: StudyFolder) -> str:
    """Write ``results.json``, ``.csv`` and ``.md``, and the figure; returns the text of the tables."""
    lines = list(study_lines(study, plans, records))
    write_json(folder.results("json"), {"seeds": study.seeds, "lines": [asdict(line) for line in lines]})
    write_text(folder.results("csv"), _as_csv(lines))
    text = _as_markdown(study, lines)
    write_text(folder.results("md"), text)
    if lines:
        study_ratios(_panels(study, lines), folder.figure)
    return text


def _as_csv(lines: list[Line]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ratios = ("to_pretrained", "to_equal_compute")
    head = ["metric", "model", "arms", "num_seeds", "mean", "low", "high"]
    writer.writerow(head + [f"{name}{end}" for name in ratios for end in ("", "_low", "_high")])
    for line in lines:
        row = [line.metric, line.model, " ".join(line.arms), len(line.values), line.mean, line.low, line.high]
        for ratio in (getattr(line, name) for name in ratios):
            row += ["", "", ""] if ratio is None else [ratio.value, ratio.low, ratio.high]
        writer.writerow(row)
    return text.getvalue()


def _as_markdown(study: Study, lines: list[Line]) -> str:
    text = ["# Study\n\nMeans over training seeds and sets of report seeds, with the range over the training seeds. ",
            "Ratios are paired by both; in brackets their 95 % bootstrap interval.\n"]  # fmt: skip
    for metric in dict.fromkeys(line.metric for line in lines):
        text.append(f"\n## {metric}, {'smaller' if METRICS[metric].is_distance else 'larger'} is better\n\n")
        text.append("| model | arm | seeds | mean | range | / pretrained | / equal compute |\n")
        text.append("|---|---|---|---|---|---|---|\n")
        for line in (line for line in lines if line.metric == metric):
            cells = [line.model, _arms(study, line), f"{len(line.values)}", f"{line.mean:.4g}"]
            cells += ["" if line.low == line.high else f"{line.low:.4g} to {line.high:.4g}"]
            cells += [_as_text(line.to_pretrained), _as_text(line.to_equal_compute)]
            text.append(f"| {' | '.join(cells)} |\n")
    return "".join(text)


def _arms(study: Study, line: Line) -> str:
    return "all" if len(line.arms) == len(study.arms) > 1 else ", ".join(line.arms)


def _as_text(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _panels(study: Study, lines: list[Line]) -> dict[str, list[tuple[str, Ratio]]]:
    """Pick what the figure shows: by judge, a label and the ratio to pretrained of each model."""
    panels: dict[str, list[tuple[str, Ratio]]] = {}
    for line in lines:
        if line.to_pretrained is not None:
            label = f"{line.model}: {_arms(study, line)}"
            panels.setdefault(line.metric, []).append((label, line.to_pretrained))
    return panels
