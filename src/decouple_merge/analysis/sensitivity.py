"""Sensitivity: a metric over a setting, from runs that differ in it, with the spread over their training seeds."""

import statistics
from collections.abc import Generator
from typing import Any

import numpy as np

from ..errors import UserError
from .style import label_ends, plt, range_colours
from .subject import Cost, Finding, RunResults, Subject

TITLE = "Sensitivity"
CAPTIONS = {
    "": "A metric over a setting. A point is a run, the mean over its sets of report seeds; lines join the means over "
    "training seeds, and bars reach from the smallest to the largest."
}
NEEDS = ("several runs",)


def cost(subject: Subject) -> Cost:
    """Say that only results are read.

    Raises:
        UserError: there is no such setting.
    """
    if (over := subject.settings.sensitivity.over) is not None:
        for run in subject.runs:
            value_of(run.config, over)
    return Cost()


def value_of(config: dict[str, Any], key: str) -> Any:
    """Look up a setting by its key with dots.

    Raises:
        UserError: there is none.
    """
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            raise UserError(f"--over {key}: no such setting; give one of the config, such as finetune.num_ranges")
        found = found[part]
    return found


def compute(subject: Subject) -> Generator[str, None, Finding]:
    """Collect a metric of the runs over a setting; yields lines for the user.

    Returns:
        A row for each run and model: the setting's value, the training seed, and the mean of the metric over the sets
        of report seeds. The summary has the curves, and in which other settings the runs differ.

    Raises:
        UserError: no setting is given, or none that the runs have; or a run has no such metric.
    """
    over, runs = subject.settings.sensitivity.over, subject.runs
    if over is None:
        raise UserError("sensitivity needs the setting in which the runs differ: give --over, as finetune.num_ranges")
    values = [value_of(run.config, over) for run in runs]
    metric = subject.settings.sensitivity.metric or runs[0].config["evaluate"]["metrics"][0]
    rows = [row for run, value in zip(runs, values, strict=True) for row in _rows(run, value, metric)]
    others = _other_differences([run.config for run in runs], over)
    if others:
        yield f"the runs differ in other settings, too: {', '.join(others)}"
    models = dict.fromkeys(row["model"] for row in rows)
    curves = {model: _curve([row for row in rows if row["model"] == model]) for model in models}
    summary = {"over": over, "metric": metric, "also_differ_in": others, "curves": curves}
    return Finding(rows, summary, _sentence(summary))


def _rows(run: RunResults, value: Any, metric: str) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = {}
    for record in run.records:
        if record["metric"] == metric:
            found.setdefault(record["model"], []).append(record["value"])
    if not found:
        known = ", ".join(dict.fromkeys(record["metric"] for record in run.records)) or "none"
        raise UserError(f"run {run.name} has no {metric}, it has {known}; finish it, or --set sensitivity.metric")
    return [
        {
            "value": value,
            "seed": run.config["seed"],
            "run": run.name,
            "model": model,
            "mean": statistics.fmean(numbers),
            "num_seed_sets": len(numbers),
        }
        for model, numbers in found.items()
    ]


def _other_differences(configs: list[dict[str, Any]], over: str) -> list[str]:
    flat = [dict(_leaves(config)) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    return [k for k in keys if k not in (over, "seed") and any(one.get(k) != flat[0].get(k) for one in flat)]


def _leaves(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(prefix + key, value)]
    return found


def _curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarise the runs of one model at each value, in the order of the values."""
    values: list[Any] = list({repr(row["value"]): row["value"] for row in rows}.values())
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    curve = []
    for value in values:
        means = [row["mean"] for row in rows if row["value"] == value]
        numbers = {"mean": statistics.fmean(means), "smallest": min(means), "largest": max(means)}
        curve.append({"value": value, **numbers, "num_runs": len(means)})
    return curve


def _sentence(summary: dict[str, Any]) -> str:
    model = "merged" if "merged" in summary["curves"] else next(iter(summary["curves"]))
    curve = summary["curves"][model]
    low, high = (pick(curve, key=lambda point: point["mean"]) for pick in (min, max))
    return (
        f"{summary['metric']} of the {model} model is {low['mean']:.4g} at {summary['over']} = {low['value']} and "
        f"{high['mean']:.4g} at {high['value']}, the means of {low['num_runs']} and {high['num_runs']} runs."
    )


def draw(finding: Finding) -> dict[str, Any]:
    """Draw a curve for each model, with its runs."""
    summary = finding.summary
    names = list({repr(p["value"]): p["value"] for curve in summary["curves"].values() for p in curve}.values())
    is_number = all(isinstance(name, int | float) and not isinstance(name, bool) for name in names)
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    ends = []
    colours = dict(zip(summary["curves"], range_colours(len(summary["curves"])), strict=True))
    for model, curve in summary["curves"].items():
        places = [p["value"] if is_number else names.index(p["value"]) for p in curve]
        means = np.array([p["mean"] for p in curve])
        reach = np.array([[p["mean"] - p["smallest"] for p in curve], [p["largest"] - p["mean"] for p in curve]])
        # The mean of equal numbers may be off by a rounding.
        axis.errorbar(places, means, reach.clip(0), color=colours[model], marker="o", markersize=4, capsize=3)
        for row in finding.rows:
            if row["model"] == model:
                place = row["value"] if is_number else names.index(row["value"])
                axis.plot(place, row["mean"], "o", color=colours[model], markersize=3, alpha=0.5)
        ends.append((places[-1], float(means[-1]), model, colours[model]))
    axis.set(xlabel=summary["over"], ylabel=summary["metric"])
    axis.set_xticks(sorted(names) if is_number else range(len(names)))
    if not is_number:
        axis.set_xticklabels([str(name) for name in names], rotation=20, ha="right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()
    label_ends(axis, ends)
    return {"": figure}
