"""The choice of a run's merge: its search, led by one process and helped by others."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..evaluation.metrics import METRICS
from ..executors import run_all
from ..executors.devices import default_device
from ..merging.arithmetic import Tensors
from ..merging.merger import Merger
from ..merging.survival import survival_line
from ..models.base import tensors_sha256
from ..searching.candidates import ranked, tuned_defaults
from ..searching.leader import leading
from ..searching.levels import levels, search
from ..searching.scorer import Scorer
from ..searching.study import OpenLevel, open_storage, open_study, trials
from ..searching.trial import Helper, Level, Objective, Trial
from ..searching.worker import work
from ..storage.locks import enter, hold
from ..storage.made_from import digest_of
from .combined import held_models, load_combined
from .costs import timed
from .export import export_merge
from .manifest import check_claimed
from .planned import Plan
from .provenance import begin_search, check_search, search_record
from .rule_inputs import contexts, rule_records, write_rule_inputs
from .start import learn_start
from .trials import draw_search, report_candidates, write_trials
from .watch import compared_of

Event = str | Trial


def open_merger(plan: Plan, experts: list[Tensors], experts_sha256: list[str]) -> Merger:
    """Make what merges a run's candidates."""
    search = plan.config.search
    return Merger(
        plan.base.network.state_dict(),
        held_models(plan, experts),
        method=search.method,
        context_of=contexts(plan, experts_sha256),
        patterns=search.blocks,
        tuned=dict(zip(search.tune, tuned_defaults(search), strict=True)),
        dtype=plan.base.dtype,
        device=default_device(),
    )


def open_scorer(plan: Plan, merger: Merger, folder: Path | None = None) -> Scorer:
    """Open what a run's candidates are scored with: a network, features, a reference, prompts; folder as ``Scorer``."""
    metric = plan.config.search.metric
    compared, prompts = compared_of(plan, METRICS[metric].extractor), plan.open_prompts(merger.device)
    return Scorer(plan.base, merger, metric, compared, plan.config.sample, prompts, folder)


def search_weights(plan: Plan, wait: bool = False) -> Iterator[Event]:
    """Search the merging weights of a run's experts; leaves the studies and the best model in the run folder.

    The best merge so far is always on disk. ``num_processes`` of the config evaluate candidates side by side, and any
    number of ``deme search RUN --worker`` with them.

    Args:
        wait: until no other process works on the folder, instead of refusing.

    Raises:
        UserError: an expert or checkpoint is missing or doesn't fit, a start point or frozen weight belongs to no
            expert, another process works on the folder, or it holds a search or a merged model that was made from
            something else.
    """
    yield from enter(plan.run.lock("run"), wait)
    with hold(plan.run.lock("run"), "deme search", wait):
        check_claimed(plan.run, plan.config)
        hashes = hashes_of(load_combined(plan))
        check_search(plan, hashes)
        yield from write_rule_inputs(plan, hashes)
        begin_search(plan, hashes, rule_records(plan))
        first = level_opener(plan, hashes)("screen")
        # Whoever helps waits for candidates; nobody need wait for a search that is finished.
        num = 1 if first.user_attrs.get("finished") else plan.config.num_processes
        calls = [(plan, hashes, i == 0) for i in range(num)]
        options, folder = plan.config.executor_options, plan.run.folder
        events = run_all(_lead_or_help, calls, num, plan.config.executor, options, folder)
        yield from timed(plan.run, "search", events)
        shutil.rmtree(plan.run.shares, ignore_errors=True)


def help_search(plan: Plan) -> Iterator[Event]:
    """Evaluate the candidates of a search that is led elsewhere, until it is finished.

    Raises:
        UserError: an expert is missing or doesn't fit, or there was no leader for ``leader.LEADERLESS_SECONDS``.
    """
    experts = load_combined(plan)
    hashes = hashes_of(experts)
    yield from _help(plan, experts, hashes)
    if level_opener(plan, hashes)("screen").user_attrs.get("finished"):
        yield f"the search of {plan.run.folder} is finished"


def _help(plan: Plan, experts: list[Tensors], hashes: list[str]) -> Iterator[Event]:
    scorer = _scorer_when_asked(plan, open_merger(plan, experts, hashes), hashes)
    yield from work(level_opener(plan, hashes), plan.config, len(experts), *_scoring(scorer))


def hashes_of(experts: list[Tensors]) -> list[str]:
    """Hash each of the models that a search combines."""
    return [tensors_sha256(e) for e in experts]


def _scorer_when_asked(plan: Plan, merger: Merger, hashes: list[str]) -> Callable[[], Scorer]:
    """Open the scorer once, for the first candidate: a search that is finished needs neither features nor networks."""
    return functools.cache(lambda: open_scorer(plan, merger, plan.run.shares / _digest(plan, hashes)))


def _scoring(scorer: Callable[[], Scorer]) -> tuple[Objective, Helper]:
    return lambda weights, level: scorer()(weights, level), lambda weights, level: scorer().help(weights, level)


def level_opener(plan: Plan, hashes: list[str]) -> OpenLevel:
    """Open a run's studies; the function that it returns opens the one of a level.

    A study's name has the digest of all that the search is made from: another search is another study.
    """
    plan.run.study.parent.mkdir(parents=True, exist_ok=True)
    storage, digest = open_storage(plan.run.study), _digest(plan, hashes)
    return lambda level: open_study(storage, f"{digest}-{level}")


def _digest(plan: Plan, hashes: list[str]) -> str:
    return digest_of(search_record(plan, hashes, rule_records(plan)))


def _lead_or_help(plan: Plan, hashes: list[str], is_leader: bool) -> Iterator[Event]:
    if is_leader:
        with leading(level_opener(plan, hashes)("screen")):
            yield from _lead(plan, hashes)
    else:
        for event in _help(plan, load_combined(plan), hashes):
            # The leader is silent. It may be about to be started again, and to need this place.
            if isinstance(event, str):
                return


def _lead(plan: Plan, hashes: list[str]) -> Iterator[Event]:
    """Search; put the best merge on disk whenever there is a better one."""
    config, experts = plan.config, load_combined(plan)
    merger, open_level = open_merger(plan, experts, hashes), level_opener(plan, hashes)
    scorer, every = _scorer_when_asked(plan, merger, hashes), levels(plan.config, len(experts))

    def done() -> list[tuple[Level, list[Trial]]]:
        return [(level, trials(open_level(level.name))) for level in every]

    if not plan.run.merged.exists():
        yield from _forecast(plan, done(), scorer)
    learned = learn_start(plan, merger, hashes) if config.search.learns_start else None
    objective, helper = _scoring(scorer)
    for trial in search(open_level, config, len(experts), objective, learned, helper):
        found = done()
        write_trials(plan, found)
        screen, screened = found[0]
        if trial.level == screen.name and ranked(screened, config.search)[:1] == [trial]:
            export_merge(plan, merger, hashes, screen, trial)
        yield trial
    found = done()
    write_trials(plan, found)
    (screen, screened), (last, finalists) = found[0], found[-1]
    winner = ranked(finalists, config.search)[0]
    record = export_merge(plan, merger, hashes, last, winner)
    if "delta" in record:
        yield survival_line(record["delta"])
    draw_search(plan, found)
    yield from report_candidates(
        plan, screened, lambda: scorer().distance(plan.ensemble(experts, merger.device), screen)
    )
    if config.search.num_finalists:
        yield f"best on {len(last.seeds)} fresh seeds: {winner.value:.5g}"


def _forecast(plan: Plan, found: list[tuple[Level, list[Trial]]], scorer: Callable[[], Scorer]) -> Iterator[str]:
    """Say what a search will draw and how long it will take, unless nothing is left to do."""
    if all(len(done) >= level.num_candidates for level, done in found):
        return
    every = [level for level, _ in found]
    num_steps = sum(level.num_images * (level.num_steps or plan.config.sample.num_steps) for level in every)
    seconds = num_steps * scorer().seconds_per_step(every[0].seeds)
    plan_line = ", ".join(f"{level.name} {level.num_candidates} x {len(level.seeds)} images" for level in every)
    yield f"search: {plan_line}; about {seconds / 60:.0f} min on one worker"
