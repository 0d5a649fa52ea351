"""Search for merging weights: the objective is a callable on a weight vector, the studies are Optuna's.

One process proposes. Any number of workers may evaluate what it proposed: a batch is queued in the study's storage,
whoever is free takes the next candidate from there, and the proposer goes on when the batch is finished. So the trials
are the same with one worker as with many, and with or without an interruption.
"""

import itertools
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from .config import Config, Search
from .seeds import stream_seed
from .strategies import (
    Known,
    Space,
    Strategy,
    Weights,
    axis,
    cma_es,
    coordinate,
    evolution,
    greedy_soup,
    grid,
    uniform_random,
)

# A worker that was silent for so long is dead, and its candidate is evaluated again.
HEARTBEAT_SECONDS, GRACE_SECONDS = 5, 30
# Candidates that wait in the storage at once: enough for any number of workers, few enough to stop soon.
NUM_QUEUED = 64
MAIN = "main"
# Of the learned weights: the loss knows their direction better than their length.
MULTIPLES = (0.5, 1.5, 2.0)


@dataclass(frozen=True)
class Score:
    """What an objective says of a candidate: the value (smaller is better) and the hash of the tensors it ran."""

    value: float
    merged_sha256: str


@dataclass(frozen=True)
class Trial:
    """One evaluated candidate.

    Attributes:
        level: of fidelity, by name.
        number: its place in the order in which the level's candidates were proposed.
        worker: who evaluated it.
    """

    level: str
    number: int
    weights: Weights
    value: float
    merged_sha256: str
    seconds: float
    worker: str


@dataclass(frozen=True)
class Level:
    """A fidelity at which candidates are compared, all from the same initial noise.

    Attributes:
        num_candidates: that are compared; those of the first level are proposed by the strategy, those of the next
            are the best of the one before.
        num_steps: of the sampler; None as the config's ``sample`` says.
    """

    name: str
    num_candidates: int
    seeds: range
    num_steps: int | None

    @property
    def num_images(self) -> int:
        return self.num_candidates * len(self.seeds)


Study = optuna.Study
Objective = Callable[[Weights, Level], Score]


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
    """Require that frozen weights and start points belong to experts.

    Raises:
        ValueError: one doesn't.
    """
    num_weights = num_experts * len(settings.blocks)
    for index in settings.frozen:
        if index >= num_weights:
            raise ValueError(
                f"search.frozen fixes weight {index}, which doesn't exist: expected 0 to {num_weights - 1}"
            )
    for point in settings.start:
        if len(point) != num_weights:
            raise ValueError(
                f"search.start holds {point}, expected {num_weights} weights, one for each expert and block"
            )


def open_storage(url: str) -> RDBStorage:
    """Connect to a study storage by URL, SQLite or any other that SQLAlchemy reaches.

    Raises:
        ValueError: there is nothing at the URL that answers, or its driver isn't installed.
    """
    is_file = url.startswith("sqlite")
    try:
        # Several workers write to one file: each waits for its turn.
        storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}} if is_file else {})
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"search.storage is {url!r}, which doesn't open ({type(error).__name__}: {reason}); expected a URL such as "
            "postgresql://user@host/database, with the server running and its driver (psycopg2-binary) installed"
        ) from error
    if is_file:
        _lock_before_reading(storage)
    return storage


def _lock_before_reading(storage: RDBStorage) -> None:
    """Make every SQLite transaction take the file's lock at its start.

    Otherwise Python locks at the first write only: two workers that read the same candidate as waiting both take it.
    """
    storage.engine.dispose()

    @event.listens_for(storage.engine, "connect")
    def leave_transactions_alone(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(storage.engine, "begin")
    def begin_with_the_lock(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def open_study(storage: RDBStorage | None, name: str) -> Study:
    """Open a study by name, or make it; without a storage it lives in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)


def trials(study: Study) -> list[Trial]:
    """List the finished trials in the order in which they were proposed."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    # A trial taken over from a worker that was only slow may be finished twice.
    return list({t.number: t for t in sorted(map(_trial, finished), key=lambda t: t.number)}.values())


def best(found: list[Trial]) -> Trial:
    """Return the best trial; of equal ones the first."""
    return min(found, key=lambda t: (t.value, t.number))


def fixed_candidates(num_experts: int) -> list[Weights]:
    """List the merges every search reports: the base itself, uniform (1/N each) and the sum of all (1 each)."""
    candidates = [(0.0,) * num_experts, (1.0 / num_experts,) * num_experts, (1.0,) * num_experts]
    return list(dict.fromkeys(candidates))


def first_candidates(settings: Search, num_experts: int) -> list[Weights]:
    """List what is evaluated before a strategy chooses: the fixed candidates, the start points and, where none is
    given and no grid covers it, more of the diagonal.

    A sampler in N dimensions would hardly meet the line of equal weights, which uniform and sum lie on.
    """
    given = [tuple(map(float, point)) for point in settings.start]
    diagonal = [] if given or settings.strategy == "grid" else [(0.5,) * num_experts, (1.5,) * num_experts]
    inside = [w for w in diagonal if settings.low <= w[0] <= settings.high]
    equal = [w * len(settings.blocks) for w in (*fixed_candidates(num_experts), *inside)]
    return list(dict.fromkeys([*equal[:3], *given, *equal[3:]]))


def num_candidates(settings: Search, num_experts: int) -> int:
    """Count the candidates a search will screen at most."""
    first = len(first_candidates(settings, num_experts)) + bool(settings.gradient_batches)
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
    # Only a proposer that was killed leaves trials of its own running.
    for study in studies:
        for running in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if running.user_attrs.get("worker", MAIN) == MAIN:
                study.tell(running.number, state=TrialState.FAIL)
    for level, study in zip(every, studies, strict=True):
        if level.name == "screen":
            batches = _proposals(settings, num_experts, config.seed, learned)
        else:
            batches = _one_batch(promoted[: level.num_candidates])
        yield from _drive(study, batches, level, settings, objective)
        promoted = [t.weights for t in sorted(trials(study), key=lambda t: (t.value, t.number))]
    studies[0].set_user_attr("finished", True)


def work(open_level: Callable[[str], Study], config: Config, num_experts: int, objective: Objective) -> Iterator[Trial]:
    """Evaluate what a search proposes, until it is finished; yields each trial of this worker."""
    name = f"{socket.gethostname()}-{os.getpid()}"
    every = [(level, open_level(level.name)) for level in levels(config, num_experts)]
    while not every[0][1].user_attrs.get("finished"):
        for level, study in every:
            taken = _take(study, name)
            if taken is not None:
                done = _evaluate(study, taken, level, config.search, objective)
                if done is not None:
                    yield done
                break
        else:
            time.sleep(0.5)


def _space(settings: Search, num_experts: int) -> Space:
    num_weights = num_experts * len(settings.blocks)
    return Space(settings.low, settings.high, tuple(settings.frozen.get(i) for i in range(num_weights)))


def _proposals(settings: Search, num_experts: int, seed: int, learned: Weights | None) -> Strategy:
    space, drawn = _space(settings, num_experts), stream_seed(seed, "search", 0)
    first = first_candidates(settings, num_experts)
    if learned is not None:
        first.append(space.embed(space.free(learned)))
    known = dict(zip(first, (yield first), strict=True))
    if space.num_free == 0:
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
        yield from _sampled(space, known, settings, seed)


def _sampled(space: Space, known: Known, settings: Search, seed: int) -> Strategy:
    """Propose by an Optuna sampler, from a study in memory that holds what is known."""
    ranges: dict[str, BaseDistribution] = {
        f"w{i}": FloatDistribution(space.low, space.high) for i in range(space.num_free)
    }
    num = 0
    while True:
        num += 1
        # The sampler of proposal k is seeded by k: it has no state that an interruption could lose.
        study = optuna.create_study(sampler=_sampler(settings, stream_seed(seed, "search", num)))
        inside = {w: v for w, v in known.items() if w in space}
        # Distances grow by factors, not by sums: a far corner would hide the differences near the optimum.
        positive = all(v > 0 for v in inside.values())
        for weights, value in inside.items():
            params = dict(zip(ranges, space.free(weights), strict=True))
            seen = math.log(value) if positive else value
            study.add_trial(optuna.create_trial(params=params, distributions=ranges, value=seen))
        batch = []
        for _ in range(settings.batch_size):
            params = study.ask(ranges).params
            batch.append(space.embed([params[name] for name in ranges]))
        known |= dict(zip(batch, (yield batch), strict=True))


def _sampler(settings: Search, seed: int) -> BaseSampler:
    if settings.strategy == "gp":
        return GPSampler(seed=seed, n_startup_trials=8)
    return TPESampler(seed=seed, n_startup_trials=8, multivariate=True, constant_liar=settings.batch_size > 1)


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
        for chunk in (places[i : i + NUM_QUEUED] for i in range(0, len(places), NUM_QUEUED)):
            if level.name == "screen" and _out_of_time(study, settings, chunk):
                return
            yield from _evaluate_all(study, dict(chunk), level, settings, objective)
        num_idle = 0 if fresh else num_idle + 1
        # A strategy that has converged may propose the same for ever.
        if len(proposed) >= level.num_candidates or num_idle > 100:
            return
        values = {t.weights: t.value for t in trials(study)}
        try:
            batch = batches.send([values[w] for w in batch])
        except StopIteration:
            return


def _out_of_time(study: Study, settings: Search, next_places: list[tuple[int, Weights]]) -> bool:
    """Say whether the minutes are spent, on trials before the next ones: a replay takes none."""
    if settings.max_minutes is None:
        return False
    before = [t.seconds for t in trials(study) if t.number < next_places[0][0]]
    return sum(before) >= 60 * settings.max_minutes


def _evaluate_all(
    study: Study, places: dict[int, Weights], level: Level, settings: Search, objective: Objective
) -> Iterator[Trial]:
    """Queue the candidates that nobody has and evaluate what waits, until all are finished; yields them as they are."""
    reported = {t.number for t in trials(study)}
    beats: dict[int, tuple[int, float]] = {}
    # A storage may miss, for a moment, a trial that others finish while it is read: what was queued is counted here.
    queued = Counter(t.user_attrs.get("place") for t in study.get_trials(deepcopy=False))
    while True:
        for trial in trials(study):
            if trial.number not in reported:
                reported.add(trial.number)
                yield trial
        missing = [place for place in places if place not in reported]
        if not missing:
            return
        _fail_silent(study, beats)
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        num_failed = Counter(t.user_attrs.get("place") for t in failed)
        for place in missing:
            if queued[place] <= num_failed[place]:
                queued[place] += 1
                params = {f"w{i}": w for i, w in enumerate(places[place])}
                attributes = {"level": level.name, "place": place, "weights": places[place]}
                study.enqueue_trial(params, user_attrs=attributes)
        taken = _take(study, MAIN)
        if taken is None:
            time.sleep(0.2)
        else:
            _evaluate(study, taken, level, settings, objective)


def _fail_silent(study: Study, beats: dict[int, tuple[int, float]]) -> None:
    """Give up trials whose worker has died: their count of heartbeats stands still.

    Args:
        beats: for each running trial its last new count and when this process saw it, which no other clock enters.
    """
    now = time.monotonic()
    for running in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        count = running.user_attrs.get("beats", 0)
        last, since = beats.get(running.number, (-1, now))
        if count != last:
            beats[running.number] = (count, now)
        elif now - since > GRACE_SECONDS:
            study.tell(running.number, state=TrialState.FAIL, skip_if_finished=True)


def _take(study: Study, worker: str) -> optuna.Trial | None:
    """Take a waiting candidate, which nobody else then has."""
    if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        return None
    trial = study.ask()
    if "place" not in trial.user_attrs:  # Somebody was faster, and Optuna made a new trial instead.
        study.tell(trial, state=TrialState.FAIL)
        return None
    trial.set_user_attr("worker", worker)
    return trial


@contextmanager
def _heartbeat(trial: optuna.Trial) -> Iterator[None]:
    """Count in the trial's record while its candidate is being evaluated."""
    stop = threading.Event()

    def beat() -> None:
        for count in itertools.count(1):
            if stop.wait(HEARTBEAT_SECONDS):
                return
            try:
                trial.set_user_attr("beats", count)
            except UpdateFinishedTrialError:
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _evaluate(study: Study, trial: optuna.Trial, level: Level, settings: Search, objective: Objective) -> Trial | None:
    """Score a candidate; None where others took it over meanwhile, whose value then counts."""
    weights: Weights = tuple(trial.user_attrs["weights"])
    for i, w in enumerate(weights):
        trial.suggest_float(f"w{i}", min(settings.low, w), max(settings.high, w))
    started = time.monotonic()
    with _heartbeat(trial):
        score = objective(weights, level)
    try:
        trial.set_user_attr("merged_sha256", score.merged_sha256)
        trial.set_user_attr("seconds", round(time.monotonic() - started, 3))
        return _trial(study.tell(trial, score.value))
    except UpdateFinishedTrialError:
        return None


def _trial(frozen: FrozenTrial) -> Trial:
    assert frozen.value is not None
    attributes = frozen.user_attrs
    return Trial(
        attributes["level"],
        attributes["place"],
        tuple(attributes["weights"]),
        frozen.value,
        attributes["merged_sha256"],
        attributes["seconds"],
        attributes["worker"],
    )
