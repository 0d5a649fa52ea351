"""The ranges of a run's experts, and the density that it draws timesteps by."""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import Clusters, Finetune, Training
from ..diffusion.clustering import cluster_ranges
from ..diffusion.process import Flow, Process
from ..diffusion.ranges import cut_ranges, listed_ranges
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..storage.arrays import open_arrays
from ..storage.reading import check_file
from .base import Base


def ranges_of(base: Base, settings: Finetune) -> list[TimestepRange]:
    """Make the ranges that a run's settings ask for, or those that its base's process has by default.

    Raises:
        UserError: they are no partition of the base's timesteps, or their unit isn't the base's.
    """
    if settings.experts == "denoisers":
        return list(base.family.turns(base.pipeline).values())
    if settings.ranges is None:
        return base.process.split(settings.num_ranges)
    if isinstance(settings.ranges, Clusters):
        everything = base.process.split(1)[0]
        return clusters_of(base.process, everything, settings.ranges, settings.num_ranges)
    if isinstance(settings.ranges, list):
        return listed_ranges(base.process, settings.ranges)
    return cut_ranges(base.process, settings.ranges.unit, settings.ranges.edges)


def clusters_of(process: Process, own: TimestepRange, settings: Clusters, num_clusters: int) -> list[TimestepRange]:
    """Cut a range of timesteps into clusters as settings ask for.

    Raises:
        UserError: there are more clusters than timesteps, or the file of similarities is missing or another.
    """
    similarity = None if settings.similarity is None else read_similarity(settings.similarity)
    return cluster_ranges(process, own, settings.clusters, num_clusters, similarity)


def read_similarity(path: Path) -> tuple[list[float], Float[Tensor, "n n"]]:
    """Read the timesteps and the map of the base that the analysis gradient-similarity writes.

    Its estimate from two halves of the images is taken, which noise doesn't shrink.

    Raises:
        UserError: the file is missing, or holds no such map.
    """
    advice = "give the gradient-similarity.npz that deme analyze RUN --only gradient-similarity writes"
    check_file(path, advice)
    with open_arrays(path) as arrays:
        if lacking := [name for name in ("timesteps", "halves-base") if name not in arrays]:
            raise UserError(f"{path}: no map of similarities, it has no array {lacking[0]}; {advice}")
        t, found = (arrays[name] for name in ("timesteps", "halves-base"))
        if t.ndim != 1 or found.shape != (len(t), len(t)) or not len(t):
            raise UserError(f"{path}: found timesteps {t.shape} and a map {found.shape} of them; {advice}")
        if not {t.dtype.kind, found.dtype.kind} <= set("fiu"):
            raise UserError(f"{path}: found timesteps of {t.dtype} and a map of {found.dtype}; {advice}")
        similarity = torch.from_numpy(found.astype(float))
        if not similarity.isfinite().all():
            raise UserError(f"{path}: its map has numbers that aren't finite; {advice}")
        return t.astype(float).tolist(), similarity


def with_density(base: Base, settings: Training) -> Base:
    """Have the base's process draw timesteps as a training's settings ask for.

    Raises:
        UserError: a density is set for a base whose timesteps are a table.
    """
    density = settings.density
    if density is None:
        return base
    if not isinstance(base.process, Flow):
        raise UserError(
            f"density is {density.name}, which is for flow-matching bases; the timesteps of this base are a table, "
            "drawn uniformly: leave it out, or set weighting"
        )
    return replace(base, process=replace(base.process, density=density.name, mean=density.mean, std=density.std))
