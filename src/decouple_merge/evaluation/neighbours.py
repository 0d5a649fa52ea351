"""Precision, recall, density and coverage, from the nearest neighbours of features; in float64."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError


def squared_distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Compute ‖a_i - b_j‖² in float64."""
    a, b = a.double(), b.double()
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def squared_radii(features: Float[Tensor, "n d"], k: int) -> Float[Tensor, " n"]:
    """Compute the squared distance of every row to its k-th nearest other row, 1,024 rows at a time.

    Raises:
        UserError: there are not more than k rows.
    """
    if len(features) <= k:
        raise UserError(f"found {len(features)} features, expected more than k = {k}: each needs k neighbours")
    # Once, and not for every block.
    features = features.double()
    radii = []
    for rows in torch.arange(len(features)).split(1024):
        distances = squared_distances(features[rows], features)
        # Rounding would make a row's distance to itself a tiny number, or a larger one than to its copy.
        distances[torch.arange(len(rows)), rows] = 0
        radii.append(distances.kthvalue(k + 1, dim=1).values)
    return torch.cat(radii)


def precision_recall(real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"], k: int = 3) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al. 2019, Eqs. 1 and 2).

    Precision is the share of generated features that lie in a ball around some real one, whose radius is the distance
    to its k-th nearest other real one. Recall is the same with the two exchanged.

    Returns:
        Both, in [0, 1]. They depend on the numbers of features: compare only equal numbers.

    Raises:
        UserError: a sample has no more than k features.
    """
    real, generated = real.double(), generated.double()
    real_radii, generated_radii = squared_radii(real, k), squared_radii(generated, k)
    num_precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool)
    for rows in torch.arange(len(generated)).split(1024):
        distances = squared_distances(real, generated[rows])
        num_precise += int((distances <= real_radii[:, None]).any(0).sum())
        recalled |= (distances <= generated_radii[rows]).any(1)
    return num_precise / len(generated), int(recalled.sum()) / len(real)


def density_coverage(real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"], k: int = 5) -> tuple[float, float]:
    """Compute density and coverage (Naeem et al. 2020, Eqs. 4 and 6).

    The balls are those of ``precision_recall`` around the real features. Density is 1/k of the number of balls that
    hold a generated feature, on average over these; coverage is the share of balls that hold at least one.

    Returns:
        Density, at least 0 and about 1 for equal distributions, and coverage in [0, 1].

    Raises:
        UserError: there are no more than k real features, or no generated ones.
    """
    if len(generated) == 0:
        raise UserError("found no generated features, expected at least 1")
    real, generated = real.double(), generated.double()
    radii = squared_radii(real, k)
    num_pairs, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for rows in torch.arange(len(generated)).split(1024):
        inside = squared_distances(real, generated[rows]) <= radii[:, None]
        num_pairs += int(inside.sum())
        covered |= inside.any(1)
    return num_pairs / (k * len(generated)), int(covered.sum()) / len(real)
