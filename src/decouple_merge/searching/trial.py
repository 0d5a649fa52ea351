"""What is known of candidates: levels, scores and trials, as plain data."""

from collections.abc import Callable
from dataclasses import dataclass

from .strategies import Weights


@dataclass(frozen=True)
class Score:
    """What an objective says of a candidate: the value (smaller is better) and the hash of the tensors it ran.

    Attributes:
        failure: why the candidate is lost, and the value infinite: its images or features are NaN or infinite.
        seconds_of_others: that other workers drew its images for, less what was waited for them.
    """

    value: float
    merged_sha256: str
    failure: str = ""
    seconds_of_others: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One evaluated candidate.

    Attributes:
        level: of fidelity, by name.
        number: its place in the order in which the level's candidates were proposed.
        weights: its merging weights, and behind them the settings that are tuned.
        seconds: of all who drew its images.
        worker: who evaluated it.
        started: when, ISO 8601 by that worker's clock.
        failure: why the candidate is lost; its value is infinite, and nobody chooses it.
    """

    level: str
    number: int
    weights: Weights
    value: float
    merged_sha256: str
    seconds: float
    worker: str
    started: str = ""
    failure: str = ""


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


Objective = Callable[[Weights, Level], Score]
# Does a part of the work on a candidate that another worker evaluates; says whether there was any left.
Helper = Callable[[Weights, Level], bool]


def help_nobody(weights: Weights, level: Level) -> bool:
    """Leave to others what is theirs: a candidate is whole, or it is small."""
    return False
