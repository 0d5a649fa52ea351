"""Interval clustering of timesteps: contiguous ranges whose members are alike, by dynamic programming."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .process import Process, Timesteps
from .timesteps import TimestepRange

# A real interval of timesteps is cut at so many places at most.
NUM_CELLS = 1000


def interval_edges(distance: Float[Tensor, "n n"], num_clusters: int) -> list[int]:
    """Cut n points into k contiguous intervals [l, r) that minimise Σ over intervals of Σ_{l <= t < r} d(c, t).

    c = ⌊(l + r) / 2⌋ is the interval's centre (Go et al. 2023, section 4.3: ANT). Of cuts that cost the same the more
    even one is taken. Float64, O(k·n²) by Bellman's recursion over the right edge.

    Args:
        distance: d(c, t) between a centre (row) and a member; any real numbers.

    Returns:
        The k + 1 edges, from 0 to n.

    Raises:
        UserError: k is not in 1 to n.
    """
    num = len(distance)
    if not 1 <= num_clusters <= num:
        raise UserError(f"found {num_clusters} clusters of {num} timesteps, expected 1 to {num}")
    sums = torch.cat([torch.zeros(num, 1, dtype=torch.float64), distance.double().cumsum(1)], 1)
    left, right = torch.meshgrid(torch.arange(num + 1), torch.arange(num + 1), indexing="ij")
    centre = ((left + right) // 2).clamp(max=num - 1)
    cost = sums[centre, right] - sums[centre, left]
    # Breaks ties: intervals of 249 and 251 points have no other cost than two of 250.
    cost = cost + 1e-10 * cost.abs().mean() * ((right - left) / num).square()
    cost = torch.where(left < right, cost, torch.inf)
    # best[r]: the least cost of [0, r) in as many intervals as rounds are done.
    best, starts = cost[0], []
    for _ in range(num_clusters - 1):
        best, start = (best[:, None] + cost).min(0)
        starts.append(start)
    edges = [num]
    for start in reversed(starts):
        edges.append(int(start[edges[-1]]))
    return [0, *reversed(edges)]


def log_snr(process: Process, t: Timesteps) -> Float[Tensor, " n"]:
    """Compute ln(a²/s²); where that is infinite, at zero terminal SNR or no noise, the schedule's last finite one."""
    every = process.snr(process.spread(process.split(1)[0], process.num_train_timesteps)).log()
    finite = every[every.isfinite()]
    return process.snr(t).log().clamp(finite.min().item(), finite.max().item())


def cluster_ranges(
    process: Process,
    own: TimestepRange,
    cost: str,
    num_clusters: int,
    similarity: tuple[Sequence[float], Float[Tensor, "m m"]] | None = None,
) -> list[TimestepRange]:
    """Cut a range of timesteps into clusters by a cost: ``timestep``, ``log_snr`` or ``gradient``.

    The distance d(c, t) is |t - c|, |λ_t - λ_c| with λ = ln SNR, or minus the similarity of the gradients of the two
    timesteps. (On the SNR itself DDPM's schedule would be cut at 4, 8 and 20.)

    Args:
        similarity: of ``gradient``: timesteps, and the cosine of the gradients of each two of them; a timestep
            between them has that of the nearest.

    Raises:
        UserError: there are more clusters than timesteps, or no similarity.
    """
    width = own.high - own.low
    is_table = not process.spread(own, 1).is_floating_point()
    num = int(width) if is_table else min(NUM_CELLS, math.ceil(width))
    t = process.spread(own, num)
    if cost == "gradient":
        if similarity is None:
            raise UserError("the cost gradient needs the similarity of gradients, which deme analyze writes")
        known = torch.as_tensor(similarity[0], dtype=torch.float64)
        nearest = (t.double()[:, None] - known).abs().argmin(1)
        distance = -similarity[1].double()[nearest][:, nearest]
    else:
        place = t.double() if cost == "timestep" else log_snr(process, t).double().cpu()
        distance = (place - place[:, None]).abs()
    inner = interval_edges(distance, num_clusters)[1:-1]
    edges = [own.low, *(own.low + (e if is_table else e * width / num) for e in inner), own.high]
    return [TimestepRange(low, high) for low, high in pairwise(edges)]
