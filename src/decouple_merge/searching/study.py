"""Studies of candidates in Optuna's storage, which any number of processes evaluate; the adapter to Optuna.

A batch of candidates is queued in the storage, and whoever is free takes the next one from there. Each has a place in
the order in which candidates were proposed, so that trials are the same whoever evaluates them, and when.
"""

import itertools
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from ..errors import UserError
from ..seeds import stream_seed
from ..storage.locks import turn_lock
from ..storage.reading import AGAIN
from .strategies import Known, Space, Strategy, Weights
from .trial import Helper, Level, Objective, Trial, help_nobody

# A worker that was silent for so long is dead, and its candidate is evaluated again.
HEARTBEAT_SECONDS, GRACE_SECONDS = 5, 30
MAIN = "main"
# Longer than any line of a journal, in bytes.
MAX_LINE = 1 << 16
# How every line of a journal begins.
START = b'{"op_code":'


Study = optuna.Study
# Opens the study of a level by the level's name.
OpenLevel = Callable[[str], Study]


def open_storage(path: Path) -> JournalStorage:
    """Open the file that studies are kept in, or make it: a line for every operation, whoever did it.

    Any number of processes may work on it, of all machines that reach the file and see each other's locks.

    Raises:
        UserError: the file is something else.
    """
    path.touch()
    with path.open("rb") as file:
        first = file.read(len(START))
    if not START.startswith(first):
        raise UserError(f"{path}: no journal of studies (it begins with {first!r}); {AGAIN}")
    try:
        return JournalStorage(JournalFileBackend(str(path), _Turn(path)))
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: no journal of studies ({str(error) or type(error).__name__}); {AGAIN}") from error


class _Turn(JournalFileOpenLock):
    """A process's turn to write to a journal; it ends with the process, where Optuna's own locks outlive it."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, turn_lock(path.with_suffix(".lock"))

    def acquire(self) -> bool:
        self.lock.acquire()
        # Half a line is left where the disk was full or the power failed; the next would be lost with it.
        with self.path.open("rb+") as file:
            start = max(0, file.seek(0, os.SEEK_END) - MAX_LINE)
            file.seek(start)
            end = file.read()
            if b"\n" in end or start == 0:
                file.truncate(start + end.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.lock.release()


def open_study(storage: JournalStorage | None, name: str) -> Study:
    """Open a study by name, or make it; without a storage it lives in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with suppress(KeyError):
        if storage is not None:
            # Making it again would add a line to the journal.
            return optuna.load_study(storage=storage, study_name=name)
    return optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)


def trials(study: Study) -> list[Trial]:
    """List the finished trials in the order in which they were proposed."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    # A trial taken over from a worker that was only slow may be finished twice.
    return list({t.number: t for t in sorted(map(_trial, finished), key=lambda t: t.number)}.values())


def evaluate_all(
    study: Study,
    places: dict[int, Weights],
    level: Level,
    bounds: tuple[float, float],
    objective: Objective,
    helper: Helper = help_nobody,
) -> Iterator[Trial]:
    """Queue the candidates that nobody has and evaluate what waits, until all are finished; yields them as they are.

    Where none waits, others are helped with theirs.
    """
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
            if not help_others(study, level, helper):
                time.sleep(0.2)
        else:
            _evaluate(study, taken, level, bounds, objective)


def evaluate_next(
    study: Study, worker: str, level: Level, bounds: tuple[float, float], objective: Objective
) -> Iterator[Trial]:
    """Evaluate the next candidate that waits, if there is one."""
    taken = _take(study, worker)
    done = taken and _evaluate(study, taken, level, bounds, objective)
    if done:
        yield done


def help_others(study: Study, level: Level, helper: Helper) -> bool:
    """Do a part of a candidate that another evaluates, if one is left; says whether there was one."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(helper(tuple(t.user_attrs["weights"]), level) for t in running if "weights" in t.user_attrs)


def give_up_own(study: Study) -> None:
    """Give up the trials that a proposer left running when it was killed."""
    for running in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if running.user_attrs.get("worker", MAIN) == MAIN:
            study.tell(running.number, state=TrialState.FAIL)


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
    try:
        trial.set_user_attr("worker", worker)
    except UpdateFinishedTrialError:  # A leader that began again has given it up, and waits for another.
        return None
    return trial


@contextmanager
def beating(beat: Callable[[int], None]) -> Iterator[None]:
    """Call a function every few seconds with a count, while the context lasts."""
    stop = threading.Event()

    def go_on() -> None:
        for count in itertools.count(1):
            if stop.wait(HEARTBEAT_SECONDS):
                return
            try:
                beat(count)
            except UpdateFinishedTrialError:
                return
            except OSError:
                # The disk may be full for now; who evaluates finds that, too, and says so.
                continue

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _evaluate(
    study: Study, trial: optuna.Trial, level: Level, bounds: tuple[float, float], objective: Objective
) -> Trial | None:
    """Score a candidate; None where others took it over meanwhile, whose value then counts."""
    weights: Weights = tuple(trial.user_attrs["weights"])
    for i, w in enumerate(weights):
        trial.suggest_float(f"w{i}", min(bounds[0], w), max(bounds[1], w))
    started = time.monotonic()
    with beating(lambda count: trial.set_user_attr("beats", count)):
        score = objective(weights, level)
    try:
        trial.set_user_attr("merged_sha256", score.merged_sha256)
        trial.set_user_attr("failure", score.failure)
        trial.set_user_attr("seconds", round(time.monotonic() - started + score.seconds_of_others, 3))
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
        frozen.datetime_start.isoformat(timespec="seconds") if frozen.datetime_start else "",
        attributes.get("failure", ""),
    )


def sampled(space: Space, known: Known, name: str, batch_size: int, seed: int) -> Strategy:
    """Propose by an Optuna sampler, from a study in memory that holds what is known.

    Args:
        name: ``gp`` or ``tpe``.
        batch_size: candidates proposed at once.
    """
    ranges: dict[str, BaseDistribution] = {
        f"w{i}": FloatDistribution(space.low, space.high) for i in range(space.num_free)
    }
    num = 0
    while True:
        num += 1
        # The sampler of proposal k is seeded by k: it has no state that an interruption could lose.
        study = optuna.create_study(sampler=_sampler(name, batch_size, stream_seed(seed, "search", num)))
        inside = {w: v for w, v in known.items() if w in space}
        # Distances grow by factors, not by sums: a far corner would hide the differences near the optimum.
        positive = all(v > 0 for v in inside.values())
        for weights, value in inside.items():
            params = dict(zip(ranges, space.free(weights), strict=True))
            seen = math.log(value) if positive else value
            study.add_trial(optuna.create_trial(params=params, distributions=ranges, value=seen))
        batch: list[Weights] = []
        for place in range(batch_size):
            params = study.ask(ranges).params
            proposed = space.embed([params[key] for key in ranges])
            # A Gaussian process that is sure of a corner proposes it for ever: look elsewhere instead.
            is_old = proposed in known or proposed in batch
            chance = random.Random(stream_seed(seed, "search", num, place))
            batch.append(space.draw(chance) if is_old else proposed)
        known |= dict(zip(batch, (yield batch), strict=True))


def _sampler(name: str, batch_size: int, seed: int) -> BaseSampler:
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=8)
    return TPESampler(seed=seed, n_startup_trials=8, multivariate=True, constant_liar=batch_size > 1)
