"""Is the merged model better, and how sure is that: in one sentence, and in a table."""

import statistics
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..evaluation.compare import check_comparable
from ..evaluation.intervals import paired_ratio, student_interval
from ..evaluation.metrics import METRICS
from .contents import Contents, in_order

PRETRAINED, MERGED, ENSEMBLE, EQUAL_COMPUTE = "pretrained", "merged", "ensemble", "baseline-"
TITLES = {
    PRETRAINED: "pretrained",
    "baseline-finetuned": "finetuned on all timesteps, equal compute",
    ENSEMBLE: "ensemble of the experts",
    MERGED: "merged",
    "distilled": "merged, then pulled to the experts",
}


Interval = tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two models' numbers, and how sure it is.

    Attributes:
        bootstrap: its 95 % interval, as of ``paired_ratio``; None where there is one number each.
        student: that of Student's t, over training seeds, or sets of images where there is one seed.
        num_sets: of images, in each run.
    """

    value: float
    bootstrap: Interval | None
    student: Interval | None
    num_runs: int
    num_sets: int


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        by_run: the mean of each run, over its sets of seeds; None where it has none.
        spread: the smallest and the largest, over runs where there are several, else over sets of seeds.
        ratio: to the pretrained model.
    """

    model: str
    metric: str
    mean: float
    by_run: list[float | None]
    spread: tuple[float, float] | None
    ratio: Ratio | None


@dataclass(frozen=True)
class Verdict:
    """Whether merging paid, in one sentence, and how far to trust it.

    Attributes:
        state: ``better``, ``mixed``, ``worse`` or ``open``.
    """

    state: str
    sentence: str
    note: str


def title_of(model: str) -> str:
    """Name a model in words."""
    return TITLES.get(model, model)


def metrics_of(runs: list[Contents]) -> list[str]:
    """List the metrics that runs have numbers of, the one that chose the merge first."""
    found = list(dict.fromkeys(r["metric"] for run in runs for r in run.metrics))
    return sorted(found, key=lambda m: m != runs[0].config.search.metric)


def check_alike(runs: list[Contents]) -> None:
    """Require that the runs' numbers may stand in one table.

    Raises:
        UserError: they differ in something that a number depends on, which is named.
    """
    where = " and ".join(str(run.run.folder) for run in runs)
    for metric in metrics_of(runs):
        check_comparable(metric, [r for run in runs for r in run.metrics if r["metric"] == metric], where)


def ratio_of(runs: list[Contents], metric: str, model: str, other: str) -> Ratio | None:
    """Compare two models on the sets of seeds that they drew in every run; the ratio is model / other.

    Returns:
        None where there is no such set, or a number isn't above 0: those have no ratio.
    """
    found = [(run.values(model, metric), run.values(other, metric)) for run in runs]
    found = [(a, b) for a, b in found if a and b]
    common = [s for s in found[0][0] if all(s in side for pair in found for side in pair)] if found else []
    if not common:
        return None
    a, b = (torch.tensor([[pair[i][s] for s in common] for pair in found], dtype=torch.float64) for i in (0, 1))
    if bool((a <= 0).any() or (b <= 0).any()):
        return None
    ratio = paired_ratio(a, b)
    units = ratio.by_seed if len(found) > 1 else (a / b)[0].tolist()
    bootstrap = (ratio.low, ratio.high) if a.numel() > 1 else None
    return Ratio(ratio.value, bootstrap, student_interval(units), len(found), len(common))


def table(runs: list[Contents]) -> list[Row]:
    """List every metric's models, each with its mean, its spread and its ratio to the pretrained model."""
    rows = []
    for metric in metrics_of(runs):
        for model in in_order(m for run in runs for m in run.models):
            values = [list(run.values(model, metric).values()) for run in runs]
            by_run = [statistics.fmean(v) if v else None for v in values]
            known = [mean for mean in by_run if mean is not None]
            if not known:
                continue
            spread_of = known if len(runs) > 1 else values[0]
            spread = (min(spread_of), max(spread_of)) if len(spread_of) > 1 else None
            ratio = None if model == PRETRAINED else ratio_of(runs, metric, model, PRETRAINED)
            rows.append(Row(model, metric, statistics.fmean(known), by_run, spread, ratio))
    return rows


def verdict(runs: list[Contents]) -> Verdict:
    """Say whether the merged models are better than the pretrained and than equally finetuned ones.

    A word is plain where bootstrap and Student's interval both exclude 1, and weaker where one of them doesn't.
    """
    models, config = in_order(m for run in runs for m in run.models), runs[0].config
    if config.search.over == "nothing":
        return Verdict("open", "Nothing was merged: search.over is nothing.", "")
    # Of a base with denoisers of its own, the pretrained model is their ensemble.
    is_given = config.finetune.experts == "denoisers"
    first, named = (ENSEMBLE, "the base's own denoisers") if is_given else (PRETRAINED, "the pretrained model")
    if MERGED not in models or first not in models:
        return Verdict("open", "There is no verdict yet: the merged model isn't scored.", "Run deme run to its end.")
    metric = metrics_of(runs)[0]
    others = {first: named}
    if baseline := next((m for m in models if m.startswith(EQUAL_COMPUTE)), None):
        others[baseline] = "plain finetuning with as many updates"
    ratios = {other: ratio_of(runs, metric, MERGED, other) for other in others}
    known = {other: ratio for other, ratio in ratios.items() if ratio is not None}
    if not known:
        return Verdict("open", f"There is no verdict: {metric} isn't above 0 everywhere, so it has no ratio.", "")
    sign = 1 if METRICS[metric].is_distance else -1
    is_sure = all(ratio.bootstrap for ratio in known.values())
    subject = "The merged model" if is_sure else "On one set of images, the merged model"
    said = " and ".join(f"{_word(ratio, sign)} {others[other]}" for other, ratio in known.items())
    numbers = " and ".join(f"{_number(ratio)} that of {others[other]}" for other, ratio in known.items())
    sides = {sign * _side(ratio.bootstrap) for ratio in known.values()}
    state = {frozenset({-1}): "better", frozenset({1}): "worse"}.get(frozenset(sides), "mixed")
    return Verdict(state, f"{subject} is {said}: its {metric} is {numbers}.", _note(runs, next(iter(known.values()))))


def _side(interval: Interval | None) -> int:
    """Say where an interval lies: -1 below 1, 1 above 1, 0 where it holds 1 or there is none."""
    if interval is None or interval[0] <= 1 <= interval[1]:
        return 0
    return -1 if interval[1] < 1 else 1


def _word(ratio: Ratio, sign: int) -> str:
    if ratio.bootstrap is None and ratio.value == 1:
        return "as good as"
    if ratio.bootstrap is None:
        return f"{'better' if sign * (ratio.value - 1) < 0 else 'worse'} than"
    plain, careful = (sign * _side(i) for i in (ratio.bootstrap, ratio.student))
    if plain == 0:
        return "not told apart from"
    direction = "better" if plain < 0 else "worse"
    return f"{direction} than" if careful == plain else f"apparently {direction} than"


def _number(ratio: Ratio) -> str:
    interval = "" if ratio.bootstrap is None else " (95 % interval {:.3f} to {:.3f})".format(*ratio.bootstrap)
    return f"{ratio.value:.3f} times{interval}"


def _note(runs: list[Contents], ratio: Ratio) -> str:
    images = max(r["num_images"] for run in runs for r in run.metrics)
    num_sets = f"{ratio.num_sets} set{'s' if ratio.num_sets > 1 else ''}"
    num_runs = f"{ratio.num_runs} training seeds" if ratio.num_runs > 1 else "one training seed"
    text = f"{num_runs.capitalize()}, {num_sets} of {images:,} images that all models drew from the same seeds."
    if ratio.bootstrap is None:
        return f"{text} One number each has no interval: raise evaluate.num_seed_sets."
    units, num = ("training seeds", ratio.num_runs) if ratio.num_runs > 1 else ("sets", ratio.num_sets)
    text += f" Intervals are paired bootstraps over {'training seeds and sets' if ratio.num_runs > 1 else 'sets'}."
    if num < 10 and ratio.student:
        text += " Of {} {} a bootstrap is narrow: Student's t gives {:.3f} to {:.3f} for the first.".format(
            num, units, *ratio.student
        )
    return text + ("" if ratio.num_runs > 1 else " Another training may differ by more than other images do.")


def check_runs(runs: list[Contents]) -> None:
    """Require runs that are training seeds of one setting: only the seed and where they run may differ.

    Raises:
        UserError: two runs have one training seed, or they differ in a setting, which is named.
    """
    free = {"seed", "num_processes", "executor", "ray"}
    first, *others = runs
    for run in others:
        settings = [r.config.model_dump(mode="json", exclude=free) for r in (first, run)]
        differing = [k for k in settings[0] if settings[0][k] != settings[1][k]]
        if differing:
            raise UserError(
                f"{first.run.folder} and {run.run.folder} differ in {', '.join(differing)}, expected runs that differ "
                "in their training seed only: report on each alone, or compare arms with deme study"
            )
    seeds = [run.config.seed for run in runs]
    if twice := [s for s in seeds if seeds.count(s) > 1]:
        raise UserError(f"training seed {twice[0]} stands for several of the runs, expected each once: leave out one")
