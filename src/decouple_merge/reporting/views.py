"""What a page shows of one run: its pictures, charts and tables, made ready for the template."""

import json
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..analysis.charts import range_losses, search_cost
from ..config import dump_config
from . import pictures
from .contents import Analysis, Contents
from .verdict import PRETRAINED

# Of a summary what a page shows as settings: longer values are data, which the JSON has.
MAX_SETTING = 300
TEXTS = ("title", "caption", "finding")
# Of a summary what the page shows elsewhere, or not at all.
SHOWN = (*TEXTS, "name", "figures", "table", "arrays")


@dataclass(frozen=True)
class Chart:
    """A drawing and what it shows, for those who don't see it."""

    svg: Markup
    alt: str
    title: str = ""


@dataclass(frozen=True)
class Shown:
    """An analysis as a page shows it.

    Attributes:
        figures: each picture, as data URI, width and height, with its caption.
    """

    name: str
    title: str
    finding: str
    settings: str
    figures: list[tuple[tuple[str, int, int], str]]


@dataclass(frozen=True)
class View:
    """What a page shows of one run.

    Attributes:
        grids: model to the data URI of its images, the same seeds of all.
        num_updates: of an expert.
        final_losses: for each training the last validation losses.
    """

    contents: Contents
    grids: dict[str, str]
    seeds: list[int]
    losses: list[Chart]
    final_losses: list[tuple[str, list[float]]]
    search: Chart | None
    surface: tuple[str, int, int] | None
    levels: list[tuple[str, int, int, float]]
    analyses: list[Shown]
    costs: list[tuple[str, str, float | None]]
    hashes: list[tuple[str, str]]
    weights: list[tuple[str, list[float]]]
    config: str
    num_colours: int

    @property
    def name(self) -> str:
        return self.contents.name


def view(run: Contents, scale: float) -> View:
    """Make a run ready for the page.

    Args:
        scale: of the pictures that may be made smaller.
    """
    seeds = _common_seeds(run)
    levels = _levels(run)
    surface = run.run.search_figure("surfaces")
    return View(
        contents=run,
        grids={m: pictures.grid([files[s] for s in seeds], scale) for m, files in run.samples.items() if seeds},
        seeds=seeds,
        losses=_losses(run),
        final_losses=[(t.name, t.log[-1]["validation"]) for t in run.trainings if t.log],
        search=_search(run, levels),
        surface=pictures.figure(surface, scale) if surface.is_file() else None,
        levels=[(name, len(values), num, min(values)) for name, num, values in levels],
        analyses=[_shown(a, scale) for a in run.analyses],
        costs=_costs(run),
        hashes=_hashes(run),
        weights=_weights(run),
        config=dump_config(run.config),
        num_colours=max([2, len(levels), *(len(t.ranges) for t in run.trainings)]),
    )


def _common_seeds(run: Contents) -> list[int]:
    """List the first seeds that all models drew: chosen by that rule, never by how they look."""
    shared = set.intersection(*map(set, run.samples.values())) if run.samples else set()
    return sorted(shared)[: pictures.NUM_COLUMNS * pictures.NUM_ROWS]


def _losses(run: Contents) -> list[Chart]:
    """Draw one chart for each range; the losses of ranges are never averaged.

    A training on all timesteps has the updates of all experts together. Its updates are divided by their number, so
    that the lines end at equal compute.
    """
    logged = [t for t in run.trainings if t.log]
    charts = []
    for index, (low, high) in enumerate(logged[0].ranges if logged else []):
        curves: list[tuple[str, int | None, list[float], list[float]]] = []
        said = []
        for training in logged:
            share = len(training.ranges) if training.range_index is None else 1
            losses = [float(r["validation"][index]) for r in training.log]
            curves.append((training.name, training.range_index, [r["update"] / share for r in training.log], losses))
            if training.range_index in (index, None):
                said.append(f"{training.name} from {losses[0]:.4g} to {losses[-1]:.4g}")
        if any(own in (index, None) for _, own, _, _ in curves):
            title = f"timesteps [{low:g}, {high:g})"
            alt = f"Validation loss on {title} over the updates: {', '.join(said)}."
            charts.append(Chart(Markup(range_losses(curves, index, f"seed-{run.config.seed}")), alt, title))
    return charts


def _levels(run: Contents) -> list[tuple[str, int, list[float]]]:
    """List the search's levels: name, images of a candidate, values in the order of the candidates."""
    found: dict[str, list[dict[str, Any]]] = {}
    for trial in run.trials:
        if trial.get("value") is not None:
            found.setdefault(trial["level"], []).append(trial)
    return [(name, trials[0]["num_images"], [float(t["value"]) for t in trials]) for name, trials in found.items()]


def _search(run: Contents, levels: list[tuple[str, int, list[float]]]) -> Chart | None:
    if not levels:
        return None
    base = next((float(t["value"]) for t in run.trials if t["level"] == levels[0][0] and not any(t["weights"])), None)
    metric = run.config.search.metric
    said = "; ".join(f"{name}, {len(v)} candidates of {n:,} images, best {min(v):.4g}" for name, n, v in levels)
    alt = f"{metric} of every candidate over the images drawn. {said}."
    if base is not None:
        alt += f" The {PRETRAINED} model has {base:.4g} on the first level."
    return Chart(Markup(search_cost(levels, base, metric, f"seed-{run.config.seed}")), alt)


def _shown(analysis: Analysis, scale: float) -> Shown:
    title, caption, finding = (str(analysis.summary.get(key, "")) for key in TEXTS)
    texts = {k: json.dumps(v) for k, v in analysis.summary.items() if k not in SHOWN}
    settings = "\n".join(f"{k}: {v}" for k, v in texts.items() if len(v) <= MAX_SETTING)
    figures = [(pictures.figure(file, scale), own or caption) for file, own in analysis.figures]
    return Shown(analysis.name, title or analysis.name, finding, settings, figures)


def _costs(run: Contents) -> list[tuple[str, str, float | None]]:
    """List the stages of a run: name, work, seconds where they were recorded."""
    finetune, num = run.config.finetune, run.config.finetune.num_experts
    num_images = finetune.num_updates * finetune.batch_size * finetune.accumulation
    is_trained = finetune.experts == "trained"
    trained = []
    if is_trained and run.config.search.combines_experts:
        trained.append(f"{num} experts × {finetune.num_updates:,} updates = {num * num_images:,} images")
    if is_trained and finetune.baseline:
        updates = f"{num * finetune.num_updates:,} updates = {num * num_images:,} images"
        trained.append(f"equally finetuned model {updates}")
    searched = sum(t.get("num_images", 0) for t in run.trials)
    drawn = {(r["model"], str(r.get("seeds"))): r["num_images"] for r in run.metrics}
    # Of all workers, where the stage itself has no record.
    scored = float(sum(t["seconds"] for t in run.trials)) if run.trials else None
    recorded: dict[str, float] = {}
    for cost in run.costs:
        recorded[cost["stage"]] = recorded.get(cost["stage"], 0.0) + float(cost["seconds"])
    return [
        ("trainings", "; ".join(trained) or "none", recorded.get("finetune")),
        ("search", f"{len(run.trials)} candidates, {searched:,} images drawn", recorded.get("search", scored)),
        ("evaluation", f"{sum(drawn.values()):,} images drawn", recorded.get("evaluate")),
    ]


def _hashes(run: Contents) -> list[tuple[str, str]]:
    """List what a run was made from and with, each with its hash or version."""
    manifest, merge = run.manifest, run.merge
    base, data = manifest.get("base", {}), manifest.get("data", {})
    found = [("base " + str(base.get("name", "")), base.get("sha256"))]
    found += [(f"data {data.get('source', '')}, {data.get('num_images', 0):,} images", data.get("sha256"))]
    found += [(f"expert {i}", sha256) for i, sha256 in enumerate(merge.get("experts_sha256", []))]
    found += [("merged model", merge.get("merged_sha256")), ("this code, git", manifest.get("git"))]
    found += [(name, version) for name, version in manifest.get("versions", {}).items()]
    for field in ("extractor", "reference"):
        found += [(field, value) for value in dict.fromkeys(r.get(field) for r in run.metrics)]
    return [(name, str(value)) for name, value in found if value]


def _weights(run: Contents) -> list[tuple[str, list[float]]]:
    """List the merging weights of each block of the network, those of the rest last."""
    blocks = run.merge.get("settings", {}).get("blocks", {})
    rest = [("all other tensors" if blocks else "all tensors", run.merge["weights"])] if "weights" in run.merge else []
    return [(name, [float(w) for w in row]) for name, row in [*blocks.items(), *rest]]
