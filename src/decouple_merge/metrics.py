"""Distances between distributions of features: Fréchet and kernel; float64 throughout."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class FeatureStats:
    """Mean and covariance of features, from sums that are streamed in float64.

    Attributes:
        num: samples seen.
        total: their sum, [d].
        outer: the sum of their outer products, [d, d].
    """

    num: int
    total: Float[Tensor, " d"]
    outer: Float[Tensor, "d d"]

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
        x = features.double().cpu()
        self.num += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    @property
    def mean(self) -> Float[Tensor, " d"]:
        return self.total / self.num

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance, as numpy.cov computes it; needs two samples."""
        mean = self.mean
        return (self.outer - self.num * torch.outer(mean, mean)) / (self.num - 1)


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


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Compute the unbiased squared maximum mean discrepancy with kernel (x·y/d + 1)³ (KID, Bińkowski et al. 2018).

    All pairs enter, not random subsets: the same expectation with less variance. It may be below zero. Products
    are float32 and summed in float64.

    Raises:
        ValueError: a sample has fewer than two members.
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"the kernel distance has {len(a)} and {len(b)} samples, expected at least 2 each")
    return _mean_off_diagonal(a) + _mean_off_diagonal(b) - 2 * _kernel_sum(a, b) / (len(a) * len(b))


def _kernel(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (a.float() @ b.float().T / a.shape[1] + 1).double() ** 3


def _kernel_sum(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    return float(sum(_kernel(block, b).sum() for block in a.split(1024)))


def _mean_off_diagonal(a: Float[Tensor, "n d"]) -> float:
    diagonal = ((a.float().square().sum(1) / a.shape[1] + 1).double() ** 3).sum()
    return (_kernel_sum(a, a) - float(diagonal)) / (len(a) * (len(a) - 1))
