"""The Monge Inception distance: two samples compared along many random directions; in float64."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..seeds import generator

NUM_DIRECTIONS = 1000


def monge_distance(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], num_directions: int = NUM_DIRECTIONS, seed: int = 0
) -> float:
    """Compute 3d · mean over unit directions u and ranks j of (sort(a·u)_j - sort(b·u)_j)² (MIND, Berthet et al. 2026).

    This is 3d times the sliced squared 2-Wasserstein distance. Of distributions that differ in their mean alone it is
    3·‖μ_a - μ_b‖². It sees shapes, where the Fréchet distance sees moments. Of the larger sample as many rows are taken
    at random as the smaller one has. Directions and rows are the same for every call with the same sizes and seed.

    Raises:
        UserError: a sample is empty.
    """
    num = min(len(a), len(b))
    if num == 0:
        raise UserError(f"MIND has {len(a)} and {len(b)} samples, expected at least 1 each")
    a, b = (_some(x, num, seed).double() for x in (a, b))
    directions = torch.randn(num_directions, a.shape[1], dtype=torch.float64, generator=generator("directions", seed))
    directions /= directions.norm(dim=1, keepdim=True)
    total = sum(
        float(((a @ some.T).sort(0).values - (b @ some.T).sort(0).values).square().sum())
        for some in directions.split(100)
    )
    return 3 * a.shape[1] * total / (num * num_directions)


def _some(rows: Float[Tensor, "n d"], num: int, seed: int) -> Float[Tensor, "num d"]:
    if len(rows) == num:
        return rows
    return rows[torch.randperm(len(rows), generator=generator("rows", seed, len(rows)))[:num]]
