"""What a run's folder says of its search: every trial, the candidates that everyone asks for, two figures."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from ..analysis.figures import search_cost, search_surfaces
from ..errors import NotFiniteError
from ..searching.candidates import fixed_candidates, parted, ranked, tuned_defaults
from ..searching.trial import Level, Trial
from ..storage.files import write_json, write_records
from ..storage.reading import AGAIN, read_record
from .planned import Plan


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
        for trial in trials:
            weights, settings = parted(trial.weights, plan.config.search)
            own = {"weights": weights} | ({"settings": settings} if settings else {})
            # JSON has no infinity.
            records.append(asdict(trial) | own | extra | ({"value": None} if trial.failure else {}))
    write_records(plan.run.trials, records)


def draw_search(plan: Plan, found: list[tuple[Level, list[Trial]]]) -> None:
    """Draw what the search cost, and the surface that its first level suggests."""
    metric = plan.config.search.metric
    found = [(level, [t for t in trials if not t.failure]) for level, trials in found]
    (_, screened), *_ = found
    search_cost(found, metric, plan.run.search_figure("cost"))
    search_surfaces(screened, metric, plan.run.search_figure("surfaces"), list(plan.config.search.tune))


def report_candidates(plan: Plan, screened: list[Trial], score_ensemble: Callable[[], float]) -> Iterator[str]:
    """Write the candidates everyone asks for as they were screened: base, uniform, sum of all, ensemble, best.

    Those that are lost have no value.
    """
    if not plan.run.candidates.exists():
        search, values = plan.config.search, {t.weights: None if t.failure else t.value for t in screened}
        num_blocks, tail = len(search.blocks), tuned_defaults(search)
        fixed = fixed_candidates(len(parted(screened[0].weights, search)[0]) // num_blocks)
        named = zip(("pretrained", "uniform", "sum"), fixed, strict=False)
        table = {name: values[w * num_blocks + tail] for name, w in named}
        if search.combines_experts:
            try:
                table["ensemble"] = score_ensemble()
            except NotFiniteError:
                table["ensemble"] = None
        table["best"] = ranked(screened, search)[0].value
        write_json(plan.run.candidates, {"metric": search.metric, **table})
    found = read_record(plan.run.candidates, AGAIN, metric=str)
    said = {name: "lost" if value is None else f"{value:.4g}" for name, value in found.items() if name != "metric"}
    yield f"on the search seeds, {found['metric']}: " + ", ".join(f"{name} {value}" for name, value in said.items())
