"""Ratios of two models that were scored on the same seeds, and how sure they are; in float64."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..seeds import generator


@dataclass(frozen=True)
class Ratio:
    """A ratio of two models' numbers.

    Attributes:
        value: the mean over training seeds.
        low, high: the ends of its bootstrap interval; equal to it where there is one training seed and one set.
        by_seed: of each training seed.
    """

    value: float
    low: float
    high: float
    by_seed: list[float]


def paired_ratio(
    a: Float[Tensor, "seeds sets"], b: Float[Tensor, "seeds sets"], num_resamples: int = 10_000, level: float = 0.95
) -> Ratio:
    """Compute the mean over training seeds of (mean of a) / (mean of b), each over the sets of images.

    The interval is the percentile bootstrap's (Efron & Tibshirani 1993, chapter 13). Training seeds and sets of images
    are crossed, since all models draw the same sets, so both are drawn again with replacement, each as a whole. What is
    drawn again is the same for a and b, which keeps what they share out of the interval. The draws are always the same.

    Args:
        a, b: a number for each training seed and each set of images.
        level: the share of the resamples that lie in the interval, in (0, 1).

    Returns:
        NaN and infinity where means of b are zero.
    """
    a, b = a.double(), b.double()
    by_seed = a.mean(1) / b.mean(1)
    num_seeds, num_sets = a.shape
    draws = generator("bootstrap", num_seeds, num_sets)
    seeds = torch.randint(num_seeds, (num_resamples, num_seeds), generator=draws)
    sets = torch.randint(num_sets, (num_resamples, num_sets), generator=draws)
    means = [x[seeds[:, :, None], sets[:, None, :]].mean(2) for x in (a, b)]
    found = (means[0] / means[1]).mean(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(found, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Ratio(float(by_seed.mean()), low, high, by_seed.tolist())


def student_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Compute Student's interval of a mean, x̄ ± t s / √n; None of a single value.

    Of a few values it is wide, as it should be: a bootstrap of three lies between the smallest and the largest.
    """
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values) - half, statistics.fmean(values) + half
