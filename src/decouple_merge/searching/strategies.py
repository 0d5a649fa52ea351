"""Search strategies: generators of batches of merging weights, to which the caller sends the batch's values.

A strategy is a function of its space, of what is known and of a seed, and of nothing else: replayed with the values of
its finished batches it proposes the same again. That is how an interrupted search goes on, and why it finds the same
whoever evaluates a batch.

It may propose what is known already; the caller answers from memory. Values are minimised.
"""

import itertools
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from cmaes import CMA

Weights = tuple[float, ...]
Known = dict[Weights, float]
Strategy = Generator[list[Weights], list[float], None]


@dataclass(frozen=True)
class Space:
    """The weights that may be chosen: one in [low, high] for each expert, but for those that are frozen.

    Attributes:
        frozen: for each expert its fixed weight, or None where it is free.
    """

    low: float
    high: float
    frozen: tuple[float | None, ...]

    @property
    def num_free(self) -> int:
        return self.frozen.count(None)

    def embed(self, free: Sequence[float]) -> Weights:
        """Put free weights in their places, moved into the bounds and rounded, so that equal candidates are equal."""
        rest = iter(free)
        return tuple(
            round(min(max(float(next(rest)), self.low), self.high), 6) if fixed is None else fixed
            for fixed in self.frozen
        )

    def free(self, weights: Weights) -> list[float]:
        """Pick out the free weights."""
        return [w for w, fixed in zip(weights, self.frozen, strict=True) if fixed is None]

    def __contains__(self, weights: Weights) -> bool:
        return self.embed(self.free(weights)) == weights

    def start(self, known: Known) -> Weights:
        """Return the best known candidate, moved into the space."""
        return self.embed(self.free(min(known, key=lambda w: known[w])))

    def draw(self, chance: random.Random) -> Weights:
        return self.embed([chance.uniform(self.low, self.high) for _ in range(self.num_free)])


def uniform_random(space: Space, seed: int) -> Strategy:
    """Draw every weight uniformly."""
    chance = random.Random(seed)
    while True:
        yield [space.draw(chance)]


def axis(space: Space, step: float) -> list[float]:
    """List the coordinates of the coarse grid along one weight."""
    return [round(space.low + i * step, 6) for i in range(int((space.high - space.low) / step + 1e-9) + 1)]


def grid(space: Space, step: float) -> Strategy:
    """Visit the whole grid, then the neighbours of its best point at half the step (DeMe, section 3.3)."""
    coarse = [space.embed(p) for p in itertools.product(axis(space, step), repeat=space.num_free)]
    values = yield coarse
    centre = space.free(coarse[int(np.argmin(values))])
    fine = []
    for offsets in itertools.product((-step / 2, 0.0, step / 2), repeat=space.num_free):
        point = [c + o for c, o in zip(centre, offsets, strict=True)]
        if all(space.low - 1e-9 <= w <= space.high + 1e-9 for w in point):
            fine.append(space.embed(point))
    yield fine


def coordinate(space: Space, known: Known, tolerance: float = 0.02) -> Strategy:
    """Compass search: one weight up or down at a time, the step halved where no move helps (Kolda et al. 2003)."""
    centre = space.start(known)
    (value,) = yield [centre]
    step = (space.high - space.low) / 4
    while step > tolerance:
        moves = [(i, sign * step) for i in range(space.num_free) for sign in (1, -1)]
        around = [space.embed([w + d * (i == j) for j, w in enumerate(space.free(centre))]) for i, d in moves]
        values = yield around
        if min(values) < value:
            value = min(values)
            centre = around[values.index(value)]
        else:
            step /= 2


def cma_es(space: Space, known: Known, seed: int) -> Strategy:
    """Evolve a normal distribution with an adapted covariance (CMA-ES, Hansen 2016), from the best known candidate."""
    # The library needs two dimensions: a single free weight is searched beside one that is ignored.
    num = max(2, space.num_free)
    start = space.free(space.start(known))
    mean = np.array([*start, *start[: num - len(start)]])
    bounds = np.array([[space.low, space.high]] * num)
    optimiser = CMA(mean=mean, sigma=(space.high - space.low) / 5, bounds=bounds, seed=seed % (1 << 32))
    while not optimiser.should_stop():
        points = [optimiser.ask() for _ in range(optimiser.population_size)]
        values = yield [space.embed(p.tolist()[: space.num_free]) for p in points]
        optimiser.tell(list(zip(points, values, strict=True)))


def evolution(space: Space, known: Known, seed: int, num_parents: int = 8, num_children: int = 4) -> Strategy:
    """Cross and mutate the best candidates (LCSC, Liu et al. 2025, whose experts are checkpoints of one training).

    A child takes each weight from one of two parents, or lies between them, then moves by normal noise whose scale
    shrinks as the parents come together.
    """
    chance = random.Random(seed)
    population = {space.embed(space.free(w)): v for w, v in known.items() if w in space}
    fresh = [space.draw(chance) for _ in range(max(2, num_parents - len(population)))]
    population |= dict(zip(fresh, (yield fresh), strict=True))
    while True:
        parents = [space.free(w) for w in sorted(population, key=lambda w: population[w])[:num_parents]]
        spread = float(np.std(parents, axis=0).mean())
        children = []
        for _ in range(num_children):
            mother, father = chance.sample(parents, 2)
            blend = chance.random() < 0.5
            shares = [chance.random() if blend else float(chance.random() < 0.5) for _ in mother]
            crossed = [a * s + b * (1 - s) for a, b, s in zip(mother, father, shares, strict=True)]
            children.append(space.embed([w + chance.gauss(0, 0.5 * spread + 0.01) for w in crossed]))
        population |= dict(zip(children, (yield children), strict=True))


def greedy_soup(num_experts: int) -> Strategy:
    """Add experts to a uniform soup, best first, each kept where it helps (Wortsman et al. 2022, algorithm 1)."""
    single = [tuple(float(i == j) for j in range(num_experts)) for i in range(num_experts)]
    values = yield single
    order = sorted(range(num_experts), key=lambda i: values[i])
    members, best = [order[0]], values[order[0]]
    for i in order[1:]:
        joined = [*members, i]
        (value,) = yield [tuple(round(1 / len(joined), 6) if j in joined else 0.0 for j in range(num_experts))]
        if value <= best:
            members, best = joined, value
