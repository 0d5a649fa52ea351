"""Search strategies: generators of batches of merging weights, to which the caller sends the batch's values.

A strategy is a function of its space, of what is known and of a seed, and of nothing else: replayed with the values of
its finished batches it proposes the same again. That is how an interrupted search goes on, and why it finds the same
whoever evaluates a batch.

It may propose what is known already; the caller answers from memory. Values are minimised.
"""

import itertools
import math
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from cmaes import CMA

Weights = tuple[float, ...]
Known = dict[Weights, float]
Strategy = Generator[list[Weights], list[float], None]
# Random candidates that are proposed at once.
NUM_DRAWN = 64


@dataclass(frozen=True)
class Space:
    """The weights that may be chosen: one in [low, high] for each expert, but for those that are frozen.

    Strategies see a cube: all that is free lies in [low, high] for them, settings that are tuned along too.

    Attributes:
        frozen: for each expert its fixed weight, or None where it is free.
        total: what the weights of each block add up to; None leaves them free.
        num_blocks: the weights are those of the first block, then of the second, ….
        tuned: bounds of the settings that stand behind the weights.
    """

    low: float
    high: float
    frozen: tuple[float | None, ...]
    total: float | None = None
    num_blocks: int = 1
    tuned: tuple[tuple[float, float], ...] = ()

    @property
    def num_free(self) -> int:
        return self.frozen.count(None) + len(self.tuned)

    def embed(self, free: Sequence[float]) -> Weights:
        """Put free weights in their places, moved into the space and rounded, so that equal candidates are equal."""
        size, moved = len(self.frozen) // self.num_blocks, iter(free)
        rows = [self.frozen[i : i + size] for i in range(0, len(self.frozen), size)]
        weights = [w for fixed in rows for w in self._embed_block(fixed, moved)]
        shares = [min(max((place - self.low) / (self.high - self.low), 0.0), 1.0) for place in moved]
        settings = [round(least + s * (most - least), 6) for s, (least, most) in zip(shares, self.tuned, strict=True)]
        return (*weights, *settings)

    def _embed_block(self, fixed: Sequence[float | None], free: Iterator[float]) -> list[float]:
        own = [float(next(free)) for weight in fixed if weight is None]
        rest = None if self.total is None else self.total - math.fsum(w for w in fixed if w is not None)
        moved = iter(_clamped(own, self.low, self.high) if rest is None else onto_sum(own, rest, self.low, self.high))
        return [next(moved) if weight is None else weight for weight in fixed]

    def free(self, weights: Weights) -> list[float]:
        """Pick out the free weights, and the settings as places in [low, high]."""
        num, span = len(self.frozen), self.high - self.low
        chosen = [w for w, fixed in zip(weights[:num], self.frozen, strict=True) if fixed is None]
        shares = [(v - least) / (most - least) for v, (least, most) in zip(weights[num:], self.tuned, strict=True)]
        # Rounding would put the upper bound beyond it.
        return chosen + [min(self.low + share * span, self.high) for share in shares]

    def __contains__(self, weights: Weights) -> bool:
        # Candidates are rounded, but for those that everyone asks for: a third each is one of three experts.
        return all(abs(a - b) <= 1e-6 for a, b in zip(self.embed(self.free(weights)), weights, strict=True))

    def start(self, known: Known) -> Weights:
        """Return the best known candidate, moved into the space."""
        return self.embed(self.free(min(known, key=lambda w: known[w])))

    def draw(self, chance: random.Random) -> Weights:
        return self.embed([chance.uniform(self.low, self.high) for _ in range(self.num_free)])


def _clamped(weights: Sequence[float], low: float, high: float) -> list[float]:
    return [round(min(max(w, low), high), 6) for w in weights]


def onto_sum(weights: Sequence[float], total: float, low: float, high: float) -> list[float]:
    """Find the nearest weights in [low, high] that add up to a total, rounded to 6 digits.

    They are clamp(w_i - λ), with the λ for which the sum is right: the projection onto a box that a plane cuts. There
    is one where n·low <= total <= n·high.
    """
    if not weights:
        return []
    # Between them the sum falls from n·high to n·low.
    least, most = min(weights) - high, max(weights) - low
    for _ in range(60):
        middle = (least + most) / 2
        above = math.fsum(min(max(w - middle, low), high) for w in weights) > total
        least, most = (middle, most) if above else (least, middle)
    found = _clamped([w - (least + most) / 2 for w in weights], low, high)
    # What rounding left over goes where there is room for it.
    left = round(total - math.fsum(found), 6)
    place = max(range(len(found)), key=lambda i: high - found[i] if left > 0 else found[i] - low)
    found[place] = round(found[place] + left, 6)
    return found


def uniform_random(space: Space, seed: int) -> Strategy:
    """Draw every weight uniformly; no draw waits for another's value."""
    chance = random.Random(seed)
    while True:
        yield [space.draw(chance) for _ in range(NUM_DRAWN)]


def axis(space: Space, step: float) -> list[float]:
    """List the coordinates of the coarse grid along one weight."""
    return [round(space.low + i * step, 6) for i in range(int((space.high - space.low) / step + 1e-9) + 1)]


def num_grid(space: Space, step: float) -> int:
    """Count the candidates of a grid, and of the finer one around its best point."""
    return len(axis(space, step)) ** space.num_free + 3**space.num_free


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


def greedy_soup(num_experts: int, settings: Weights = (), num_blocks: int = 1) -> Strategy:
    """Add experts to a uniform soup, best first, each kept where it helps (Wortsman et al. 2022, algorithm 1).

    Args:
        settings: that stand behind the weights of each candidate.
        num_blocks: each has a soup of its own, and experts are added block by block.
    """
    places = range(num_experts * num_blocks)
    single = [(*(float(i == j) for j in places), *settings) for i in places]
    values = yield single
    order = sorted(places, key=lambda i: values[i])
    members, best = [order[0]], values[order[0]]
    for i in order[1:]:
        joined = [*members, i]
        sizes = [sum(k // num_experts == block for k in joined) for block in range(num_blocks)]
        soup = [round(1 / sizes[j // num_experts], 6) if j in joined else 0.0 for j in places]
        (value,) = yield [(*soup, *settings)]
        if value <= best:
            members, best = joined, value
