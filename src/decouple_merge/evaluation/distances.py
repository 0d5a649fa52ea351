"""Fréchet and kernel distances between distributions of features, Inception and CLIP score, R-precision; in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from .neighbours import squared_distances


@dataclass
class FeatureStats:
    """Mean and covariance of features, from sums that are streamed in float64.

    Attributes:
        num: samples seen.
        total: their sum, [d].
        outer: the sum of their outer products, [d, d].
        few: the samples themselves, as long as they are fewer than the features.
    """

    num: int
    total: Float[Tensor, " d"]
    outer: Float[Tensor, "d d"]
    few: list[Float[Tensor, "_ d"]] = field(default_factory=list)

    @classmethod
    def empty(cls, num_features: int) -> "FeatureStats":
        """Start with no samples."""
        return cls(
            0,
            torch.zeros(num_features, dtype=torch.float64),
            torch.zeros(num_features, num_features, dtype=torch.float64),
        )

    def add(self, features: Float[Tensor, "n d"]) -> None:
        """Take in a batch of features."""
        x = features.cpu().double()
        self.num += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x
        self.few = [*self.few, x] if self.num < len(self.total) else []

    @property
    def mean(self) -> Float[Tensor, " d"]:
        return self.total / self.num

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance, as numpy.cov computes it; needs two samples."""
        mean = self.mean
        return (self.outer - self.num * torch.outer(mean, mean)) / (self.num - 1)


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features in float64.

    Attributes:
        make_root: finds the covariance's square root, where it is kept from another time.
    """

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    make_root: Callable[[], Float[Tensor, "d d"]] | None = None

    @cached_property
    def root(self) -> Float[Tensor, "d d"]:
        """The covariance's square root, made where it is first needed."""
        return matrix_root(self.covariance) if self.make_root is None else self.make_root()


def matrix_root(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Compute the symmetric square root of a positive semi-definite matrix through ``eigh``.

    Eigenvalues that rounding made negative count as zero, so that rank-deficient covariances are fine.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(
    mean_a: Float[Tensor, " d"],
    covariance_a: Float[Tensor, "d d"],
    mean_b: Float[Tensor, " d"],
    covariance_b: Float[Tensor, "d d"],
    root_b: Float[Tensor, "d d"] | None = None,
) -> float:
    """Compute ‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_b^½ Σ_a Σ_b^½)^½) (Dowson & Landau 1982; FID, Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of a symmetric matrix, which needs no general
    matrix root.

    Args:
        root_b: ``matrix_root(covariance_b)`` where it is known already: a reference is compared with often.
    """
    root = matrix_root(covariance_b) if root_b is None else root_b.double()
    product = root @ covariance_a.double() @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0)
    difference = (mean_a.double() - mean_b.double()).square().sum()
    trace = covariance_a.double().trace() + covariance_b.double().trace() - 2 * eigenvalues.sqrt().sum()
    return float(difference + trace)


def frechet_of(found: FeatureStats, real: Moments) -> float:
    """Compute ``frechet_distance`` of summed features from a reference; quickly where they are few.

    Of n < d samples with covariance AᵀA, the eigenvalues of Σ_b^½ AᵀA Σ_b^½ are those of the n×n matrix A Σ_b Aᵀ and
    zeros. So no root of Σ_b is needed, and no rounded zero adds its root.
    """
    if not found.few:
        return frechet_distance(found.mean, found.covariance, real.mean, real.covariance, real.root)
    factor = (torch.cat(found.few) - found.mean) / math.sqrt(found.num - 1)
    eigenvalues = torch.linalg.eigvalsh(factor @ real.covariance.double() @ factor.T).clamp(min=0)
    difference = (found.mean - real.mean.double()).square().sum()
    trace = factor.square().sum() + real.covariance.double().trace() - 2 * eigenvalues.sqrt().sum()
    return float(difference + trace)


def frechet_infinity(
    features: Float[Tensor, "n d"],
    real: Moments,
    num_points: int = 15,
    seed: int = 0,
) -> float:
    """Extrapolate the Fréchet distance to infinitely many images (Chong & Forsyth 2020, section 3.2).

    The distance of n images is biased by about c/n. It is computed on ``num_points`` random subsets, of sizes evenly
    spaced from 5,000 (half of the features where they are fewer than 10,000, a tenth where more than 50,000) to all of
    them, and the intercept of a straight line in 1/n is returned. The bias of the reference stays.

    Args:
        features: of the generated images.
        real: moments of the reference.

    Raises:
        UserError: there are fewer than 20 features, or fewer than two points.
    """
    if len(features) < 20 or num_points < 2:
        raise UserError(
            f"the extrapolation has {len(features)} images and {num_points} points, expected at least 20 and 2"
        )
    generator = torch.Generator().manual_seed(seed)
    smallest = max(len(features) // 10, min(5000, len(features) // 2))
    sizes = torch.linspace(smallest, len(features), num_points, dtype=torch.float64).long()
    distances = []
    for size in sizes.tolist():
        stats = FeatureStats.empty(features.shape[1])
        for rows in torch.randperm(len(features), generator=generator)[:size].split(1024):
            stats.add(features[rows])
        distances.append(frechet_of(stats, real))
    inverse, values = 1 / sizes.double(), torch.tensor(distances, dtype=torch.float64)
    centred = inverse - inverse.mean()
    return float(values.mean() - inverse.mean() * (centred * values).sum() / centred.square().sum())


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Compute the unbiased squared maximum mean discrepancy with kernel (x·y/d + 1)³ (KID, Bińkowski et al. 2018).

    All pairs enter, not random subsets: the same expectation with less variance. It may be below zero. Products
    are float32 and summed in float64.

    Raises:
        UserError: a sample has fewer than two members.
    """
    if len(a) < 2 or len(b) < 2:
        raise UserError(f"the kernel distance has {len(a)} and {len(b)} samples, expected at least 2 each")
    return _mean_off_diagonal(a) + _mean_off_diagonal(b) - 2 * _kernel_sum(a, b) / (len(a) * len(b))


def _kernel(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (a.float() @ b.float().T / a.shape[1] + 1).double() ** 3


def _kernel_sum(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    return float(sum(_kernel(block, b).sum() for block in a.split(1024)))


def _mean_off_diagonal(a: Float[Tensor, "n d"]) -> float:
    diagonal = ((a.float().square().sum(1) / a.shape[1] + 1).double() ** 3).sum()
    return (_kernel_sum(a, a) - float(diagonal)) / (len(a) * (len(a) - 1))


def gaussian_kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], bandwidth: float = 10.0) -> float:
    """Compute the squared maximum mean discrepancy with kernel exp(-‖x - y‖²/2σ²) (CMMD, Jayasumana et al. 2024).

    As in the authors' program, rows are normalised to length 1 and the pairs of a row with itself enter, so that the
    value is never negative. That program reports 1000 times this number.

    Args:
        bandwidth: σ.

    Raises:
        UserError: a sample is empty.
    """
    if len(a) == 0 or len(b) == 0:
        raise UserError(f"the kernel distance has {len(a)} and {len(b)} samples, expected at least 1 each")
    a, b = F.normalize(a.double()), F.normalize(b.double())

    def mean_kernel(x: Tensor, y: Tensor) -> float:
        blocks = (squared_distances(block, y).div(-2 * bandwidth**2).exp().sum() for block in x.split(1024))
        return float(sum(blocks)) / (len(x) * len(y))

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def inception_score(logits: Float[Tensor, "n classes"], num_splits: int = 10) -> tuple[float, float]:
    """Compute exp(E KL(p(y|x) ‖ p(y))) with p = softmax(logits) (Salimans et al. 2016, section 4).

    Returns:
        Mean and standard deviation over ``num_splits`` consecutive parts, cut where the authors' program does; the
        deviation is that of the parts themselves (divisor ``num_splits``). Between 1 and the number of classes.

    Raises:
        UserError: there are fewer rows than splits.
    """
    if not 1 <= num_splits <= len(logits):
        raise UserError(f"found {len(logits)} images in {num_splits} splits, expected at least one image in each")
    scores = []
    cuts = [i * len(logits) // num_splits for i in range(num_splits + 1)]
    for start, stop in pairwise(cuts):
        part = logits[start:stop]
        log_p = part.double().log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_p.logsumexp(0) + math.log(len(part)))).sum(1).mean()
        scores.append(divergence.exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def clip_score(images: Float[Tensor, "n d"], texts: Float[Tensor, "n d"]) -> float:
    """Compute the mean of 100·max(cos(image, text), 0) over pairs of embeddings, between 0 and 100.

    The scale is that of text-to-image papers, in which released models have values about 30. Hessel et al. 2021, who
    define the score for captions, take 2.5 in place of 100, and texts that begin with "A photo depicts".

    Raises:
        UserError: there are no pairs.
    """
    if len(images) == 0:
        raise UserError("the CLIP score has 0 pairs of image and text, expected at least 1")
    return 100 * float(F.cosine_similarity(images.double(), texts.double()).clamp(min=0).mean())


def r_precision(images: Float[Tensor, "n d"], texts: Float[Tensor, "n d"], num_candidates: int = 100) -> float:
    """Compute in how many percent of the images their own text is the nearest of 100 (Xu et al. 2018).

    The 99 others are drawn from the texts that differ. Not one draw is counted but the expectation over all: where b of
    m other texts are at least as near as the own, C(m - b, 99) / C(m, 99). With fewer texts all are candidates.

    Args:
        images, texts: embeddings of pairs, compared by their cosine.

    Raises:
        UserError: all texts are the same.
    """
    different, own = torch.unique(texts.double(), dim=0, return_inverse=True)
    num_others = len(different) - 1
    if num_others < 1:
        raise UserError(f"the R-precision has {len(different)} different text(s), expected at least 2 to choose among")
    candidates = F.normalize(different, dim=1).T
    counted = []
    for rows, own_rows in zip(images.split(1024), own.split(1024), strict=True):
        similarity = F.normalize(rows.double(), dim=1) @ candidates
        counted.append((similarity >= similarity.gather(1, own_rows[:, None])).sum(1) - 1)
    num_nearer = torch.cat(counted)
    drawn = torch.arange(min(num_candidates - 1, num_others), device=own.device)
    ratios = (num_others - num_nearer[:, None] - drawn).clamp(min=0) / (num_others - drawn)
    return 100 * float(ratios.prod(1).mean())
