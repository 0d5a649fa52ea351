"""Search for merging weights: what is evaluated, at which level of fidelity, and when it is enough.

One process proposes, any number evaluate. The proposer goes on when a batch is finished, so the trials are the same
with one worker as with many, and with or without an interruption. The objective is a callable on a weight vector.
"""

import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from ..config import Config, Search
from ..errors import UserError
from ..seeds import stream_seed
from .leader import LeaderWatch
from .strategies import Space, Strategy, Weights, axis, cma_es, coordinate, evolution, greedy_soup, grid, uniform_random
from .study import Study, evaluate_all, evaluate_next, give_up_own, sampled, trials
from .trial import Level, Objective, Trial

# Of the learned weights: the loss knows their direction better than their length.
MULTIPLES = (0.5, 1.5, 2.0)
# Of sums of weights, which have 6 digits.
TOLERANCE = 1e-4


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
        size = min(size * settings.halving, final)
        if num > settings.num_finalists:
            found.append(Level(f"rung-{len(found)}", num, range(settings.first_seed, settings.first_seed + size), None))
    if settings.num_finalists:
        found.append(Level("final", num, config.final_seeds, None))
    return found


def check_weights(settings: Search, num_experts: int) -> None:
    """Require that frozen weights and start points belong to experts and agree.

    Raises:
        UserError: they don't, or the strategy can't hold a weight.
    """
    num_weights = num_experts * len(settings.blocks)
    for index in settings.frozen:
        if index >= num_weights:
            raise UserError(f"search.frozen fixes weight {index}, which doesn't exist: expected 0 to {num_weights - 1}")
    for point in settings.start:
        if len(point) != num_weights:
            raise UserError(
                f"search.start holds {point}, expected {num_weights} weights, one for each expert and block"
            )
        if (at := _out_of_bounds(point, settings)) is not None:
            bounds = f"search.low to search.high, {settings.low:g} to {settings.high:g}"
            raise UserError(f"search.start holds {point}, whose weight {at} lies outside {bounds}: change it or them")
        sums = [math.fsum(point[i : i + num_experts]) for i in range(0, num_weights, num_experts)]
        if settings.total is not None and any(abs(s - settings.total) > TOLERANCE for s in sums):
            raise UserError(
                f"search.start holds {point}, which adds up to {sums[0]:g}, expected search.total, {settings.total:g}, "
                "in each block"
            )
        if moved := [i for i, w in settings.frozen.items() if point[i] != w]:
            raise UserError(
                f"search.start holds {point}, whose weight {moved[0]} search.frozen fixes at "
                f"{settings.frozen[moved[0]]:g}"
            )
    if settings.frozen and settings.strategy in ("greedy", "uniform"):
        raise UserError(
            f"search.frozen fixes weights, and strategy {settings.strategy}, a soup of equal ones, can't: take another"
        )
    if settings.total is not None:
        _check_total(settings, settings.total, num_experts)


def _check_total(settings: Search, total: float, num_experts: int) -> None:
    if settings.strategy in ("greedy", "uniform") and total != 1:
        raise UserError(f"search.total is {total:g}, and the weights of strategy {settings.strategy} add up to 1")
    frozen = _space(settings, num_experts).frozen
    for row in (frozen[i : i + num_experts] for i in range(0, len(frozen), num_experts)):
        fixed = math.fsum(w for w in row if w is not None)
        least, most = (fixed + row.count(None) * bound for bound in (settings.low, settings.high))
        if not least - TOLERANCE <= total <= most + TOLERANCE:
            raise UserError(
                f"search.total is {total:g}, and {num_experts} weights add up to {least:g} to {most:g}: change low, "
                "high or frozen"
            )


def ranked(found: list[Trial], settings: Search | None = None) -> list[Trial]:
    """Sort the trials that may be chosen, best first and of equal ones the first; lost ones may not.

    The fixed candidates are reported whatever is asked for; they can't win where that has other weights.
    """
    allowed = [t for t in found if not t.failure and (settings is None or _may_win(t.weights, settings))]
    return sorted(allowed, key=lambda t: (t.value, t.number))


def _may_win(weights: Weights, settings: Search) -> bool:
    num = len(weights) // len(settings.blocks)
    if settings.strategy == "uniform":
        return weights == (1.0 / num,) * len(weights)
    if _out_of_bounds(weights, settings) is not None:
        return False
    sums = [math.fsum(weights[i : i + num]) for i in range(0, len(weights), num)]
    adds_up = settings.total is None or all(abs(s - settings.total) <= TOLERANCE for s in sums)
    return adds_up and all(weights[i] == w for i, w in settings.frozen.items())


def _out_of_bounds(weights: Sequence[float], settings: Search) -> int | None:
    """Find the first weight that is free and isn't from low to high; a greedy soup has its own bounds."""
    low, high = settings.low - TOLERANCE, settings.high + TOLERANCE
    outside = [i for i, w in enumerate(weights) if i not in settings.frozen and not low <= w <= high]
    return outside[0] if outside and settings.strategy != "greedy" else None


def fixed_candidates(num_experts: int) -> list[Weights]:
    """List the merges every search reports: the base itself, uniform (1/N each) and the sum of all (1 each)."""
    candidates = [(0.0,) * num_experts, (1.0 / num_experts,) * num_experts, (1.0,) * num_experts]
    return list(dict.fromkeys(candidates))


def first_candidates(settings: Search, num_experts: int) -> list[Weights]:
    """List what is evaluated before a strategy chooses: the fixed candidates, the start points and, where none is
    given and no grid covers it, more of the diagonal, or the last model alone where the weights have a total; what is
    frozen, the total and the bounds are held in all but the fixed ones.

    A sampler in N dimensions would hardly meet the line of equal weights, which uniform and sum lie on.
    """
    if settings.strategy == "uniform":
        return [w * len(settings.blocks) for w in fixed_candidates(num_experts)]
    given = [tuple(map(float, point)) for point in settings.start]
    diagonal = [] if given or settings.strategy == "grid" else [(0.5,) * num_experts, (1.5,) * num_experts]
    inside = [w for w in diagonal if settings.low <= w[0] <= settings.high]
    last = [] if given or settings.total is None else [(0.0,) * (num_experts - 1) + (settings.total,)]
    equal = [w * len(settings.blocks) for w in (*fixed_candidates(num_experts), *inside, *last)]
    space = _space(settings, num_experts)
    is_bound = settings.frozen or settings.total is not None
    held = [space.embed(space.free(w)) if is_bound or _out_of_bounds(w, settings) is not None else w for w in equal]
    return list(dict.fromkeys([*equal[: len(fixed_candidates(num_experts))], *given, *held]))


def num_candidates(settings: Search, num_experts: int) -> int:
    """Count the candidates a search will screen at most."""
    first = len(first_candidates(settings, num_experts)) + settings.learns_start
    if settings.strategy == "uniform":
        return first
    if settings.strategy == "grid":
        num_free = _space(settings, num_experts).num_free
        wanted = first + len(axis(_space(settings, num_experts), settings.grid_step)) ** num_free + 3**num_free
    elif settings.strategy == "greedy":
        wanted = first + 2 * num_experts * len(settings.blocks) - 1
    elif settings.strategy == "gradient":
        wanted = first + len(MULTIPLES)
    else:
        wanted = settings.num_trials
    if settings.max_images is not None:
        wanted = min(wanted, settings.max_images // settings.num_images)
    return max(wanted, first)


def search(
    open_level: Callable[[str], Study],
    config: Config,
    num_experts: int,
    objective: Objective,
    learned: Weights | None = None,
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
    for level, study in zip(every, studies, strict=True):
        if level.name == "screen":
            batches = _proposals(settings, num_experts, config.seed, learned)
        else:
            batches = _one_batch(promoted[: level.num_candidates])
        yield from _drive(study, batches, level, settings, objective)
        found = trials(study)
        promoted = [t.weights for t in ranked(found, settings)]
        if not promoted:
            reason = next((t.failure for t in found if t.failure), "none has the weights that search asks for")
            raise UserError(f"search: no candidate of {len(found)} on level {level.name} may be chosen: {reason}")
    studies[0].set_user_attr("finished", True)


def work(
    open_level: Callable[[str], Study], config: Config, num_experts: int, objective: Objective
) -> Iterator[Trial | str]:
    """Evaluate what a search proposes, until it is finished; yields each trial of this worker, and lines for the user.

    Raises:
        UserError: the search has had no leader for too long.
    """
    name = f"{socket.gethostname()}-{os.getpid()}"
    every = [(level, open_level(level.name)) for level in levels(config, num_experts)]
    bounds = (config.search.low, config.search.high)
    watch = LeaderWatch(every[0][1])
    while not every[0][1].user_attrs.get("finished"):
        done = [t for level, study in every for t in evaluate_next(study, name, level, bounds, objective)]
        yield from done
        yield from watch.look()
        if not done:
            time.sleep(0.5)


def _space(settings: Search, num_experts: int) -> Space:
    num_weights = num_experts * len(settings.blocks)
    frozen = tuple(settings.frozen.get(i) for i in range(num_weights))
    return Space(settings.low, settings.high, frozen, settings.total, len(settings.blocks))


def _proposals(settings: Search, num_experts: int, seed: int, learned: Weights | None) -> Strategy:
    space, drawn = _space(settings, num_experts), stream_seed(seed, "search", 0)
    first = first_candidates(settings, num_experts)
    if learned is not None:
        first.append(space.embed(space.free(learned)))
    known = dict(zip(first, (yield first), strict=True))
    if space.num_free == 0 or settings.strategy == "uniform":
        return
    if settings.strategy == "gradient" and learned is not None:
        yield [space.embed([factor * w for w in space.free(learned)]) for factor in MULTIPLES]
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
        yield from greedy_soup(num_experts * len(settings.blocks))
    elif settings.strategy == "random":
        yield from uniform_random(space, drawn)
    else:
        yield from sampled(space, known, settings.strategy, settings.batch_size, seed)


def _one_batch(candidates: list[Weights]) -> Strategy:
    yield candidates


def _drive(study: Study, batches: Strategy, level: Level, settings: Search, objective: Objective) -> Iterator[Trial]:
    """Evaluate batch after batch until the strategy ends or the budget is spent; yields the new trials."""
    # Places are counted over what was proposed, not over what is finished: workers may have been ahead of a kill.
    proposed: set[Weights] = set()
    batch, num_idle = next(batches), 0
    while True:
        fresh = [w for w in dict.fromkeys(batch) if w not in proposed][: level.num_candidates - len(proposed)]
        places = list(enumerate(fresh, start=len(proposed)))
        proposed |= set(fresh)
        # Whoever is free finds one that waits, unless a search that has so many minutes is to stop soon.
        size = max(1, len(places)) if settings.max_minutes is None else settings.batch_size
        for chunk in (places[i : i + size] for i in range(0, len(places), size)):
            if level.name == "screen" and _out_of_time(study, settings, chunk):
                return
            yield from evaluate_all(study, dict(chunk), level, (settings.low, settings.high), objective)
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
