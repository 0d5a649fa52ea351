"""Mixtures: which networks a router chooses from, opened from a file, a run or names."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import Mixture as Settings
from ..config import Schedule, load_mixture, load_schedule, validate
from ..diffusion.ranges import end_of, filled_ranges, in_timesteps
from ..diffusion.routing import RangeRouter, Router
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..merging.keys import has_trunk
from ..storage.hub import pipeline_folder
from ..storage.reading import is_document
from .base import Base, load_base
from .ensemble import TimestepEnsemble
from .identity import model_sha256
from .members import Member, Place, open_member
from .network import blank_network, num_parameters
from .run_experts import open_run
from .schedulers import make_scheduler


@dataclass(frozen=True)
class Mixture:
    """Networks and what chooses among them.

    Attributes:
        members: by the router's numbers.
        step_shares: of each range, by the scheduler that the base had in training, where experts' record has them.
        num_slots: of a schedule, how many steps the sampler's grid has, of which ``kept`` run, by their places.
    """

    base: Base
    members: list[Member]
    router: Router
    step_shares: list[float] | None = None
    num_slots: int | None = None
    kept: tuple[int, ...] | None = None

    @property
    def sha256(self) -> str:
        """The hash of all that is read, as ``models.identity`` counts it."""
        others = [None if m.base is self.base else m.base.network.config for m in self.members]
        routing = self.router.record()
        if self.kept is not None:
            routing = {"router": routing, "num_slots": self.num_slots, "kept": self.kept}
        return model_sha256(self.base, [m.weights for m in self.members], routing, others)

    def module(self, one_resident: bool, build: Callable[[Member], nn.Module]) -> TimestepEnsemble:
        """Make one denoiser of it.

        Args:
            one_resident: hold one network in memory at a time.
            build: makes a network of a member's architecture, which is filled here.
        """
        if one_resident:
            made: dict[tuple[int, bool], nn.Module] = {}
            kinds = [(id(m.base), has_trunk(m.weights)) for m in self.members]
            networks = []
            for member, kind in zip(self.members, kinds, strict=True):
                made[kind] = made[kind] if kind in made else build(member)
                networks.append(made[kind])
            weights = [m.weights for m in self.members]
            return TimestepEnsemble(networks, self.router, self.base.timestep_of, weights)
        networks = [build(member) for member in self.members]
        for network, member in zip(networks, self.members, strict=True):
            fill(network, member)
        return TimestepEnsemble(networks, self.router, self.base.timestep_of)


@torch.no_grad()
def fill(network: nn.Module, member: Member) -> None:
    """Copy the weights of a member into a network of its architecture."""
    for key, value in network.state_dict().items():
        value.copy_(member.weights[key])


def mixture_of(
    base: Base,
    ranges: Sequence[TimestepRange],
    experts: Sequence[dict[str, Tensor]],
    step_shares: list[float] | None = None,
) -> Mixture:
    """Make the mixture of a base's experts, one for each range."""
    members = [Member(f"expert {i}", base, tensors) for i, tensors in enumerate(experts)]
    return Mixture(base, members, RangeRouter(ranges, base.num_train_timesteps), step_shares)


def open_mixture(settings: Settings) -> Mixture:
    """Open the networks that a mixture names, and require that they go together.

    Raises:
        UserError: ranges overlap, leave a gap or are narrower than the band, or as ``open_member``.
    """
    base = load_base(settings.base)
    parts = [(part.low, part.high, part.model) for part in settings.ranges]
    filled = filled_ranges(base.process, settings.unit, parts, settings.rest)
    names = list(dict.fromkeys(name for _, name in filled))
    band = in_timesteps(base.process, settings.unit, settings.band)
    router = RangeRouter(
        [own for own, _ in filled], base.num_train_timesteps, [names.index(name) for _, name in filled], band
    )
    place = Place(pipeline_folder(settings.base), base)
    return Mixture(base, [open_member(name, place) for name in names], router)


def open_schedule(settings: Schedule) -> Mixture:
    """Open the networks that a schedule's steps name, and require that they go together.

    Raises:
        UserError: as ``open_member``; or the base's sampler can't leave steps out.
    """
    base = load_base(settings.base)
    place, names = Place(pipeline_folder(settings.base), base), list(dict.fromkeys(s for s in settings.steps if s))
    members = [open_member(settings.models[name], place) for name in names]
    numbers = [names.index(step) if step else None for step in settings.steps]
    kept = tuple(i for i, number in enumerate(numbers) if number is not None)
    return Mixture(base, members, step_router(base, numbers), num_slots=len(numbers), kept=kept)


def step_router(base: Base, numbers: Sequence[int | None]) -> RangeRouter:
    """Make the router of a schedule: each timestep has the network of the nearest step that runs.

    Args:
        numbers: the number of each step's network, the noisiest step first; None where it is skipped.
    """
    kept = [i for i, number in enumerate(numbers) if number is not None]
    scheduler = make_scheduler(base, None, len(numbers), None, kept)
    visited = base.process.visited(scheduler.timesteps).tolist()[::-1]
    edges = [0, *((low + high) / 2 for low, high in pairwise(visited)), base.num_train_timesteps]
    networks = [number for number in reversed(numbers) if number is not None]
    return RangeRouter([TimestepRange(*ends) for ends in pairwise(edges)], base.num_train_timesteps, networks)


def load_ensemble(
    model: str | Path | Settings,
    models: Sequence[str | Path] = (),
    ranges: Sequence[tuple[int | float, int | float]] | None = None,
    one_resident: bool = False,
    band: int | float = 0,
) -> TimestepEnsemble:
    """Build one denoiser of networks: a mixture file's, a run's experts, or any of one family; float32, on the CPU.

    Args:
        model: a mixture's YAML file or settings, or a run folder with finished experts; where models are given, the
            base by folder or hub name.
        models: ``base``, pipelines by folder or hub name, networks' folders, expert folders, weight files or LoRAs, the
            cleanest range's first.
        ranges: [low, high) in timesteps, one for each of the models; where not given equal parts of [0, T), or of a
            flow's sampling steps. A file and a run have their own.
        one_resident: hold one network in memory, and read the others from their files when t comes to them.
        band: of models, the width of the soft hand-over around every edge, in timesteps.

    Raises:
        UserError: as ``open_mixture``; or the model is neither a file nor a run, and no models are given.
    """
    mixture = _opened(model, models, ranges, band)
    return mixture.module(
        one_resident, lambda member: blank_network(member.base, torch.float32, "cpu", has_trunk(member.weights))
    )


def _opened(
    model: str | Path | Settings,
    models: Sequence[str | Path],
    ranges: Sequence[tuple[int | float, int | float]] | None,
    band: int | float,
) -> Mixture:
    if isinstance(model, Settings):
        return open_mixture(model)
    if not models:
        return open_any(Path(model))
    pairs = ranges
    if pairs is None:
        pairs = [(own.low, own.high) for own in load_base(str(model)).process.split(len(models))]
    if len(pairs) != len(models):
        raise UserError(f"{len(models)} models for {len(pairs)} ranges, expected one each")
    parts = [{"low": low, "high": high, "model": str(m)} for (low, high), m in zip(pairs, models, strict=True)]
    given = {"base": str(model), "ranges": parts, "band": band}
    return open_mixture(validate(Settings, given, "load_ensemble"))


def open_any(path: Path) -> Mixture:
    """Open the mixture or the schedule of a YAML file, or the mixture of a run's experts.

    Raises:
        UserError: as ``load_mixture``, ``open_mixture`` and ``open_schedule``, or ``open_run``.
    """
    if is_document(str(path)):
        schedule = load_schedule(path)
        return open_mixture(load_mixture(path)) if schedule is None else open_schedule(schedule)
    run = open_run(path)
    return mixture_of(run.base, run.ranges, run.experts, run.step_shares)


def describe_mixture(path: Path) -> Iterator[str]:
    """Say what a mixture's file holds, after everything in it was opened and checked.

    Raises:
        UserError: as ``open_any``.
    """
    if (schedule := load_schedule(path)) is not None:
        yield from _describe_schedule(path, schedule)
        return
    settings = load_mixture(path)
    mixture = open_mixture(settings)
    end = end_of(mixture.base.process, settings.unit, "the mixture has")
    yield (
        f"{path}: {len(mixture.members)} networks of {settings.base}, a {type(mixture.base.pipeline).__name__}, on "
        f"[0, {end}) in {settings.unit}s, band {settings.band:g}"
    )
    assert isinstance(mixture.router, RangeRouter)
    for own, number in zip(mixture.router.ranges, mixture.router.numbers, strict=True):
        member = mixture.members[number]
        share = mixture.base.process.step_share(own)
        yield (
            f"timesteps {own}, {share:.0%} of even steps: {member.name}, "
            f"{num_parameters(member.base.network):,} parameters"
        )
    yield f"sha256 of all that is drawn with: {mixture.sha256}"


def _describe_schedule(path: Path, settings: Schedule) -> Iterator[str]:
    mixture = open_schedule(settings)
    assert mixture.kept is not None
    yield (
        f"{path}: {len(mixture.members)} networks of {settings.base}, a {type(mixture.base.pipeline).__name__}, on "
        f"{len(mixture.kept)} of {mixture.num_slots} steps"
    )
    names = [step for step in settings.steps if step]
    for name, member in zip(dict.fromkeys(names), mixture.members, strict=True):
        yield f"{name}, {names.count(name)} steps: {member.name}, {num_parameters(member.base.network):,} parameters"
    yield f"sha256 of all that is drawn with: {mixture.sha256}"
