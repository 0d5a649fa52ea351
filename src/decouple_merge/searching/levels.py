"""Search for merging weights: what is evaluated, at which level of fidelity, and when it is enough.

One process proposes, any number evaluate. The proposer goes on when a batch is finished, so the trials are the same
with one worker as with many, and with or without an interruption. The objective is a callable on a weight vector.
"""

import math
from collections.abc import Iterator

from ..config import Config, Search
from ..errors import UserError
from ..seeds import stream_seed
from .candidates import MULTIPLES, first_candidates, num_candidates, ranked, space_of, tuned_defaults
from .strategies import Strategy, Weights, cma_es, coordinate, evolution, greedy_soup, grid, uniform_random
from .study import OpenLevel, Study, evaluate_all, give_up_own, sampled, trials
from .trial import Helper, Level, Objective, Trial, help_nobody


def levels(config: Config, num_experts: int) -> list[Level]:
    """List the levels of successive halving (Jamieson & Talwalkar 2016): fewer candidates, more images each.

    The last compares the finalists on seeds that chose nobody before.
    """
    settings = config.search
    num = num_candidates(settings, num_experts)
    found = [Level("screen", num, config.search_seeds, settings.num_steps)]
    size, final = settings.num_images, len(config.final_seeds)
    while settings.num_finalists and num > settings.num_finalists:
        num = max(math.ceil(num / settings.halving), settings.num_finalists)
        size = max(size, min(size * settings.halving, final))
        # The images of the level before would say nothing new.
        is_new = size > len(found[-1].seeds) or found[-1].num_steps not in (None, config.sample.num_steps)
        if num > settings.num_finalists and is_new:
            found.append(Level(f"rung-{len(found)}", num, range(settings.first_seed, settings.first_seed + size), None))
    if settings.num_finalists:
        found.append(Level("final", num, config.final_seeds, None))
    return found


def search(
    open_level: OpenLevel,
    config: Config,
    num_experts: int,
    objective: Objective,
    learned: Weights | None = None,
    helper: Helper = help_nobody,
) -> Iterator[Trial]:
    """Propose candidates, evaluate them beside any workers, promote the best; yields each trial as it is finished.

    A search that was interrupted goes on where it stopped and ends with the same trials.

    Args:
        open_level: returns the study of a level by the level's name.
        learned: weights to start with, from ``gradient_batches``.
    """
    settings, promoted = config.search, list[Weights]()
    every = levels(config, num_experts)
    studies = [open_level(level.name) for level in every]
    if studies[0].user_attrs.get("finished"):
        return
    for study in studies:
        give_up_own(study)
    for place, (level, study) in enumerate(zip(every, studies, strict=True)):
        if level.name == "screen":
            batches = _proposals(settings, num_experts, config.seed, learned)
        else:
            batches = _one_batch(promoted)
        yield from _drive(study, batches, level, settings, objective, helper)
        found = trials(study)
        # A level may have ended early, so that fewer than planned go on.
        num = max(math.ceil(len(found) / settings.halving), settings.num_finalists)
        planned = every[place + 1].num_candidates if place + 1 < len(every) else num
        promoted = [t.weights for t in ranked(found, settings)][: min(num, planned)]
        if not promoted:
            reason = next((t.failure for t in found if t.failure), "none has the weights that search asks for")
            raise UserError(f"search: no candidate of {len(found)} on level {level.name} may be chosen: {reason}")
    studies[0].set_user_attr("finished", True)


def _proposals(settings: Search, num_experts: int, seed: int, learned: Weights | None) -> Strategy:
    space, drawn = space_of(settings, num_experts), stream_seed(seed, "search", 0)
    first = first_candidates(settings, num_experts)
    tail = tuned_defaults(settings)
    if learned is not None:
        first.append(space.embed(space.free((*learned, *tail))))
    known = dict(zip(first, (yield first), strict=True))
    if space.num_free == 0 or settings.strategy == "uniform":
        return
    if settings.strategy == "gradient" and learned is not None:
        yield [space.embed(space.free((*(factor * w for w in learned), *tail))) for factor in MULTIPLES]
        return
    if settings.strategy == "grid":
        yield from grid(space, settings.grid_step)
    elif settings.strategy == "coordinate":
        yield from coordinate(space, known)
    elif settings.strategy == "cmaes":
        yield from cma_es(space, known, drawn)
    elif settings.strategy == "evolution":
        yield from evolution(space, known, drawn)
    elif settings.strategy == "greedy":
        yield from greedy_soup(num_experts, tail, len(settings.blocks))
    elif settings.strategy == "random":
        yield from uniform_random(space, drawn)
    else:
        yield from sampled(space, known, settings.strategy, settings.batch_size, seed)


def _one_batch(candidates: list[Weights]) -> Strategy:
    yield candidates


def _drive(
    study: Study, batches: Strategy, level: Level, settings: Search, objective: Objective, helper: Helper
) -> Iterator[Trial]:
    """Evaluate batch after batch until the strategy ends or the budget is spent; yields the new trials."""
    # Places are counted over what was proposed, not over what is finished: workers may have been ahead of a kill.
    proposed: set[Weights] = set()
    batch, num_idle = next(batches), 0
    while True:
        # Everyone asks for the first, however little time there is.
        is_first = not proposed
        fresh = [w for w in dict.fromkeys(batch) if w not in proposed][: level.num_candidates - len(proposed)]
        places = list(enumerate(fresh, start=len(proposed)))
        proposed |= set(fresh)
        # Whoever is free finds one that waits, unless a search that has so many minutes is to stop soon.
        size = max(1, len(places)) if settings.max_minutes is None else settings.batch_size
        for chunk in (places[i : i + size] for i in range(0, len(places), size)):
            if level.name == "screen" and not is_first and _out_of_time(study, settings, chunk):
                return
            yield from evaluate_all(study, dict(chunk), level, (settings.low, settings.high), objective, helper)
        num_idle = 0 if fresh else num_idle + 1
        # A strategy that has converged may propose the same for ever.
        if len(proposed) >= level.num_candidates or num_idle > 100:
            return
        values = _values([t for t in trials(study) if t.weights in proposed])
        try:
            batch = batches.send([values[w] for w in batch])
        except StopIteration:
            return


def _values(found: list[Trial]) -> dict[Weights, float]:
    """Say what a strategy is told: of a lost candidate a value that is worse than all others."""
    largest = max((t.value for t in found if not t.failure), default=1.0)
    return {t.weights: largest + abs(largest) + 1e-9 if t.failure else t.value for t in found}


def _out_of_time(study: Study, settings: Search, next_places: list[tuple[int, Weights]]) -> bool:
    """Say whether the minutes are spent, on trials before the next ones: a replay takes none."""
    if settings.max_minutes is None:
        return False
    before = [t.seconds for t in trials(study) if t.number < next_places[0][0]]
    return sum(before) >= 60 * settings.max_minutes
