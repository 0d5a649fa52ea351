"""Search for merging weights: the objective is a callable on a weight vector, the study is Optuna's."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from .config import Search
from .seeds import stream_seed

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Score:
    """What an objective says of a candidate: the value (smaller is better) and the hash of the tensors it ran."""

    value: float
    merged_sha256: str


@dataclass(frozen=True)
class Trial:
    """One evaluated candidate."""

    number: int
    weights: Weights
    value: float
    merged_sha256: str
    seconds: float


def open_study(url: str) -> optuna.Study:
    """Open the study at a storage URL, or make it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(storage=url, study_name="merge", direction="minimize", load_if_exists=True)


def trials(study: optuna.Study) -> list[Trial]:
    """List the finished trials in the order in which they were evaluated."""
    # Numbered anew: a trial that a kill cut short leaves a gap in Optuna's numbers.
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [_trial(number, frozen) for number, frozen in enumerate(finished)]


def best(study: optuna.Study) -> Trial:
    """Return the best trial; of equal ones the first."""
    return min(trials(study), key=lambda t: (t.value, t.number))


def num_candidates(settings: Search, num_experts: int) -> int:
    """Count the trials a search will need; the grid's is an upper bound, since its two levels share points."""
    if settings.strategy != "grid":
        return max(settings.num_trials, len(first_candidates(settings, num_experts)))
    return len(fixed_candidates(num_experts)) + len(_axis(settings)) ** num_experts + 3**num_experts


def fixed_candidates(num_experts: int) -> list[Weights]:
    """List the merges every search reports: the base itself, uniform (1/N each) and the sum of all (1 each)."""
    candidates = [(0.0,) * num_experts, (1.0 / num_experts,) * num_experts, (1.0,) * num_experts]
    return list(dict.fromkeys(candidates))


def first_candidates(settings: Search, num_experts: int) -> list[Weights]:
    """List what is evaluated before a strategy chooses: the fixed candidates, and for samplers more of the diagonal.

    A sampler in N dimensions would hardly meet the line of equal weights, which uniform and sum lie on.
    """
    diagonal = [] if settings.strategy == "grid" else [(0.5,) * num_experts, (1.5,) * num_experts]
    inside = [w for w in diagonal if settings.low <= w[0] <= settings.high]
    return list(dict.fromkeys([*fixed_candidates(num_experts), *inside]))


def search(
    study: optuna.Study, settings: Search, num_experts: int, objective: Callable[[Weights], Score], seed: int
) -> Iterator[Trial]:
    """Evaluate candidates until the study has all of them; yields each new trial.

    The fixed candidates come first. A study that was interrupted goes on where it stopped and ends with the same
    trials: what was running is evaluated again, and the sampler of trial k is seeded by (seed, k) and sees only
    finished trials. A candidate that was evaluated before takes its value from then.
    """
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.ask()
    for running in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(running.number, state=TrialState.FAIL)
    done = trials(study)
    known = {t.weights: Score(t.value, t.merged_sha256) for t in done}
    grid = _grid(settings, num_experts, known) if settings.strategy == "grid" else None
    fixed = first_candidates(settings, num_experts)
    for k in itertools.count(len(done)):
        weights: Weights | None
        if k < len(fixed):
            weights = fixed[k]
        elif grid is not None:
            weights = next((w for w in grid if w not in known), None)
            if weights is None:
                return
        elif k < settings.num_trials:
            weights = None
        else:
            return
        # Optuna keeps no sampler state in the storage; a fresh one for each trial needs none.
        study.sampler = _sampler(settings, stream_seed(seed, "search", k))
        trial = _ask(study, weights, settings, num_experts)
        candidate = tuple(trial.params[f"w{i}"] for i in range(num_experts))
        started = time.monotonic()
        score = known.get(candidate) or objective(candidate)
        known[candidate] = score
        trial.set_user_attr("merged_sha256", score.merged_sha256)
        trial.set_user_attr("seconds", round(time.monotonic() - started, 3))
        yield _trial(k, study.tell(trial, score.value))


def _ask(study: optuna.Study, weights: Weights | None, settings: Search, num_experts: int) -> optuna.Trial:
    if weights is not None:
        study.enqueue_trial({f"w{i}": w for i, w in enumerate(weights)})
    space = optuna.distributions.FloatDistribution(settings.low, settings.high)
    return study.ask({f"w{i}": space for i in range(num_experts)})


def _sampler(settings: Search, seed: int) -> BaseSampler:
    if settings.strategy == "gp":
        return GPSampler(seed=seed, n_startup_trials=8)
    if settings.strategy == "tpe":
        return TPESampler(seed=seed, n_startup_trials=8, multivariate=True)
    return RandomSampler(seed=seed)


def _axis(settings: Search) -> list[float]:
    num = int((settings.high - settings.low) / settings.grid_step + 1e-9) + 1
    return [round(settings.low + i * settings.grid_step, 6) for i in range(num)]


def _grid(settings: Search, num_experts: int, known: dict[Weights, Score]) -> Iterator[Weights]:
    """Yield the coarse grid, then the neighbours at half the step around its best (DeMe, section 3.3)."""
    coarse = list(itertools.product(_axis(settings), repeat=num_experts))
    yield from coarse
    centre = min(coarse, key=lambda w: known[w].value)
    half = settings.grid_step / 2
    for offsets in itertools.product((-half, 0.0, half), repeat=num_experts):
        point = tuple(round(c + o, 6) for c, o in zip(centre, offsets, strict=True))
        if all(settings.low <= w <= settings.high for w in point):
            yield point


def _trial(number: int, frozen: FrozenTrial) -> Trial:
    assert frozen.value is not None
    return Trial(
        number,
        tuple(frozen.params[f"w{i}"] for i in range(len(frozen.params))),
        frozen.value,
        frozen.user_attrs["merged_sha256"],
        frozen.user_attrs["seconds"],
    )
