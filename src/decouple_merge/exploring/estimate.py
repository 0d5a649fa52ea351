"""What a run's search knows of a merge's distance, and what a Gaussian process makes of it elsewhere."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..searching.strategies import Weights
from ..storage.files import read_records

# Candidates below which a Gaussian process has nothing to learn from.
MIN_TRIALS = 5
# Weights that differ by less are those of one candidate: a slider has steps.
CLOSE = 5e-4


@dataclass(frozen=True)
class Estimate:
    """A distance that nobody measured: its median, and the interval that holds it with 95 %."""

    value: float
    low: float
    high: float


class SearchKnowledge:
    """The trials of a run's search.

    Args:
        trials: ``search/trials.jsonl``; there need be none.
        config: of the run, which says by which method and density the search merged. Of one that tuned settings
            with the weights nothing is known here.
    """

    def __init__(self, trials: Path, config: Config) -> None:
        self.metric, self.method = config.search.metric, config.search.method
        self.is_tuned = bool(config.search.tune)
        density = config.search.density
        # A page has one for all experts.
        self.density = None if isinstance(density, list) else density
        found = [] if config.search.tune else read_records(trials, level=str, weights=list)
        self.trials = [t for t in found if t.get("value") is not None]

    def knows(self, method: str, density: float) -> bool:
        """Say whether the search merged so: only then its distances are this merge's."""
        own = self.density
        return method == self.method and (method != "ties" or (own is not None and abs(density - own) < CLOSE))

    def known(self, weights: Weights) -> dict[str, tuple[float, int]]:
        """Look up a candidate: level to its distance and the number of images."""
        alike = [t for t in self.trials if _distance(t["weights"], weights) < CLOSE]
        return {t["level"]: (float(t["value"]), int(t["num_images"])) for t in alike}

    def estimate(self, weights: Weights) -> Estimate | None:
        """Estimate the distance of a candidate on the first level; None where too few were measured.

        By a Gaussian process on log distances, with a Matérn-5/2 kernel that has a length for each weight, and noise
        (Rasmussen & Williams 2006, chapter 4): as the search's own sees them.
        """
        if self._process is None:
            return None
        means, deviations = self._process.predict(np.array([weights]), return_std=True)
        mean, deviation = float(means[0]), float(deviations[0])
        bounds = (mean, mean - 1.96 * deviation, mean + 1.96 * deviation)
        return Estimate(*(math.exp(b) if self._is_log else b for b in bounds))

    @property
    def screened(self) -> list[dict[str, Any]]:
        """The trials of the first level, which has the most of them."""
        return [t for t in self.trials if t["level"] == self.trials[0]["level"]]

    @property
    def _is_log(self) -> bool:
        return all(t["value"] > 0 for t in self.screened)

    @cached_property
    def _process(self) -> Any:
        if len(self.screened) < MIN_TRIALS:
            return None
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        points = np.array([t["weights"] for t in self.screened])
        values = np.array([t["value"] for t in self.screened])
        shape = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(np.ones(points.shape[1]), (0.1, 20.0), nu=2.5)
        kernel = shape + WhiteKernel(1e-3, (1e-6, 1.0))
        process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0)
        with warnings.catch_warnings():
            # A length at its bound is a weight that hardly matters, or hardly any noise.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return process.fit(points, np.log(values) if self._is_log else values)


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)
