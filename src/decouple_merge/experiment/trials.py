"""What a run's folder says of its search: every trial, the candidates that everyone asks for, two figures."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from ..analysis.figures import search_cost, search_surfaces
from ..searching.levels import fixed_candidates, ranked
from ..searching.trial import Level, Trial
from ..storage.files import write_json, write_records
from .plan import Plan


def write_trials(plan: Plan, found: list[tuple[Level, list[Trial]]]) -> None:
    """Write the trials of all levels to ``search/trials.jsonl``."""
    records: list[dict[str, Any]] = []
    for level, trials in found:
        extra = {
            "num_images": len(level.seeds),
            "num_steps": level.num_steps or plan.config.sample.num_steps,
            "seeds": [level.seeds.start, level.seeds.stop - 1],
            "metric": plan.config.search.metric,
        }
        records += [asdict(t) | extra for t in trials]
    write_records(plan.run.trials, records)


def draw_search(plan: Plan, found: list[tuple[Level, list[Trial]]]) -> None:
    """Draw what the search cost, and the surface that its first level suggests."""
    metric, (_, screened) = plan.config.search.metric, found[0]
    search_cost(found, metric, plan.run.search_figure("cost"))
    search_surfaces(screened, metric, plan.run.search_figure("surfaces"))


def report_candidates(plan: Plan, screened: list[Trial], score_ensemble: Callable[[], float]) -> Iterator[str]:
    """Write the candidates everyone asks for as they were screened: base, uniform, sum of all, ensemble, best."""
    if not plan.run.candidates.exists():
        search, values = plan.config.search, {t.weights: t.value for t in screened}
        num_blocks = len(search.blocks)
        fixed = fixed_candidates(len(screened[0].weights) // num_blocks)
        table = {n: values[w * num_blocks] for n, w in zip(("pretrained", "uniform", "sum"), fixed, strict=False)}
        if not search.checkpoints:
            table["ensemble"] = score_ensemble()
        table["best"] = ranked(screened, search.frozen)[0].value
        write_json(plan.run.candidates, {"metric": search.metric, **table})
    found = json.loads(plan.run.candidates.read_text())
    yield f"on the search seeds, {found.pop('metric')}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items())
