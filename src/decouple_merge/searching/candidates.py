"""Which weight vectors a search may hold, tries first, counts, and chooses from."""

import math
from collections.abc import Sequence

from ..config import Search, validate
from ..errors import UserError
from ..merging.rules import RULES, check_method
from ..merging.rules.rule import Bounds
from .strategies import Space, Weights, num_grid
from .trial import Trial

# Of the learned weights: the loss knows their direction better than their length.
MULTIPLES = (0.5, 1.5, 2.0)
# Of sums of weights, which have 6 digits.
TOLERANCE = 1e-4


def space_of(settings: Search, num_experts: int) -> Space:
    """Say within what a strategy may choose."""
    num_weights = num_experts * len(settings.blocks)
    frozen = tuple(settings.frozen.get(i) for i in range(num_weights))
    bounds = tuple(_tuned_bounds(settings, name) for name in settings.tune)
    return Space(settings.low, settings.high, frozen, settings.total, len(settings.blocks), bounds)


def tuned_defaults(settings: Search) -> Weights:
    """List the settings that are tuned, as they are where nothing else is chosen: they stand behind the weights."""
    return tuple(float(getattr(settings, name)) for name in settings.tune)


def parted(candidate: Sequence[float], settings: Search) -> tuple[list[float], dict[str, float]]:
    """Part a candidate into its merging weights and the settings that are tuned, by name."""
    num = len(candidate) - len(settings.tune)
    return list(candidate[:num]), dict(zip(settings.tune, candidate[num:], strict=True))


def _tuned_bounds(settings: Search, name: str) -> Bounds:
    """Say within what a setting of the method is tuned.

    Raises:
        UserError: the method doesn't read it, it is no number, it has no bounds, or is outside of them.
    """
    check_method(settings.method)
    params, given = RULES[settings.method].params, settings.tune[name]
    numbers = [key for key in params if isinstance(getattr(settings, key, None), float)]
    if name not in numbers:
        raise UserError(
            f"search.tune has {name}, and method {settings.method} reads no such number: expected some of "
            f"{', '.join(numbers) or 'none'}"
        )
    bounds = given or params[name]
    if bounds is None:
        raise UserError(f"search.tune has {name} without bounds, and the method has none: give [low, high]")
    for bound in bounds:
        validate(
            Search, settings.model_dump(mode="json") | {name: bound}, f"search.tune in [{bounds[0]:g}, {bounds[1]:g}]"
        )
    if not bounds[0] < bounds[1] or not bounds[0] <= getattr(settings, name) <= bounds[1]:
        raise UserError(
            f"search.tune has {name} in [{bounds[0]:g}, {bounds[1]:g}], expected low below high, and "
            f"search.{name}, {getattr(settings, name):g}, between them: searches start there"
        )
    return bounds


def fixed_candidates(num_experts: int) -> list[Weights]:
    """List the merges every search reports: the base itself, uniform (1/N each) and the sum of all (1 each)."""
    candidates = [(0.0,) * num_experts, (1.0 / num_experts,) * num_experts, (1.0,) * num_experts]
    return list(dict.fromkeys(candidates))


def first_candidates(settings: Search, num_experts: int) -> list[Weights]:
    """List what is evaluated before a strategy chooses: the fixed candidates, the start points and, where none is
    given and no grid covers it, more of the diagonal, or the last model alone where the weights have a total; what is
    frozen, the total and the bounds are held in all but the fixed ones.

    A sampler in N dimensions would hardly meet the line of equal weights, which uniform and sum lie on.
    """
    tail = tuned_defaults(settings)
    if settings.strategy == "uniform":
        return [w * len(settings.blocks) + tail for w in fixed_candidates(num_experts)]
    given = [tuple(map(float, point)) + tail for point in settings.start]
    diagonal = [] if given or settings.strategy == "grid" else [(0.5,) * num_experts, (1.5,) * num_experts]
    inside = [w for w in diagonal if settings.low <= w[0] <= settings.high]
    last = [] if given or settings.total is None else [(0.0,) * (num_experts - 1) + (settings.total,)]
    equal = [w * len(settings.blocks) + tail for w in (*fixed_candidates(num_experts), *inside, *last)]
    space = space_of(settings, num_experts)
    is_bound = settings.frozen or settings.total is not None
    held = [space.embed(space.free(w)) if is_bound or _out_of_bounds(w, settings) is not None else w for w in equal]
    return list(dict.fromkeys([*equal[: len(fixed_candidates(num_experts))], *given, *held]))


def num_candidates(settings: Search, num_experts: int) -> int:
    """Count the candidates a search will screen at most."""
    first = len(first_candidates(settings, num_experts)) + settings.learns_start
    if settings.strategy == "uniform":
        return first
    if settings.strategy == "grid":
        wanted = first + num_grid(space_of(settings, num_experts), settings.grid_step)
    elif settings.strategy == "greedy":
        wanted = first + 2 * num_experts * len(settings.blocks) - 1
    elif settings.strategy == "gradient":
        wanted = first + len(MULTIPLES)
    else:
        wanted = settings.num_trials
    if settings.max_images is not None:
        wanted = min(wanted, settings.max_images // settings.num_images)
    return max(wanted, first)


def check_weights(settings: Search, num_experts: int) -> None:
    """Require that frozen weights and start points belong to experts and agree.

    Raises:
        UserError: they don't, or the strategy can't hold a weight.
    """
    num_weights = num_experts * len(settings.blocks)
    for index in settings.frozen:
        if index >= num_weights:
            raise UserError(f"search.frozen fixes weight {index}, which doesn't exist: expected 0 to {num_weights - 1}")
    for point in settings.start:
        if len(point) != num_weights:
            raise UserError(
                f"search.start holds {point}, expected {num_weights} weights, one for each expert and block"
            )
        if (at := _out_of_bounds(point, settings)) is not None:
            bounds = f"search.low to search.high, {settings.low:g} to {settings.high:g}"
            raise UserError(f"search.start holds {point}, whose weight {at} lies outside {bounds}: change it or them")
        sums = [math.fsum(point[i : i + num_experts]) for i in range(0, num_weights, num_experts)]
        if settings.total is not None and any(abs(s - settings.total) > TOLERANCE for s in sums):
            raise UserError(
                f"search.start holds {point}, which adds up to {sums[0]:g}, expected search.total, {settings.total:g}, "
                "in each block"
            )
        if moved := [i for i, w in settings.frozen.items() if point[i] != w]:
            raise UserError(
                f"search.start holds {point}, whose weight {moved[0]} search.frozen fixes at "
                f"{settings.frozen[moved[0]]:g}"
            )
    if settings.frozen and settings.strategy in ("greedy", "uniform"):
        raise UserError(
            f"search.frozen fixes weights, and strategy {settings.strategy}, a soup of equal ones, can't: take another"
        )
    if settings.total is not None:
        _check_total(settings, settings.total, num_experts)
    if settings.tune and settings.strategy in ("greedy", "uniform", "gradient"):
        raise UserError(f"search.tune has {', '.join(settings.tune)}, and strategy {settings.strategy} tunes nothing")
    space = space_of(settings, num_experts)
    # What it pays for would be one corner of the grid.
    paid = math.inf if settings.max_images is None else settings.max_images // settings.num_images
    if settings.strategy == "grid" and (num := num_grid(space, settings.grid_step)) > paid:
        raise UserError(
            f"search.strategy is grid, which has up to {num:,} candidates, and search.max_images pays for {paid:,}: "
            "raise it or search.grid_step, or take another strategy"
        )


def _check_total(settings: Search, total: float, num_experts: int) -> None:
    if settings.strategy in ("greedy", "uniform") and total != 1:
        raise UserError(f"search.total is {total:g}, and the weights of strategy {settings.strategy} add up to 1")
    frozen = space_of(settings, num_experts).frozen
    for row in (frozen[i : i + num_experts] for i in range(0, len(frozen), num_experts)):
        fixed = math.fsum(w for w in row if w is not None)
        least, most = (fixed + row.count(None) * bound for bound in (settings.low, settings.high))
        if not least - TOLERANCE <= total <= most + TOLERANCE:
            raise UserError(
                f"search.total is {total:g}, and {num_experts} weights add up to {least:g} to {most:g}: change low, "
                "high or frozen"
            )


def ranked(found: list[Trial], settings: Search | None = None) -> list[Trial]:
    """Sort the trials that may be chosen, best first and of equal ones the first; lost ones may not.

    The fixed candidates are reported whatever is asked for; they can't win where that has other weights.
    """
    allowed = [t for t in found if not t.failure and (settings is None or _may_win(t.weights, settings))]
    return sorted(allowed, key=lambda t: (t.value, t.number))


def _may_win(candidate: Weights, settings: Search) -> bool:
    weights, _ = parted(candidate, settings)
    num = len(weights) // len(settings.blocks)
    if settings.strategy == "uniform":
        return weights == [1.0 / num] * len(weights)
    if _out_of_bounds(weights, settings) is not None:
        return False
    sums = [math.fsum(weights[i : i + num]) for i in range(0, len(weights), num)]
    adds_up = settings.total is None or all(abs(s - settings.total) <= TOLERANCE for s in sums)
    return adds_up and all(weights[i] == w for i, w in settings.frozen.items())


def _out_of_bounds(weights: Sequence[float], settings: Search) -> int | None:
    """Find the first weight that is free and isn't from low to high; a greedy soup has its own bounds."""
    low, high = settings.low - TOLERANCE, settings.high + TOLERANCE
    outside = [i for i, w in enumerate(weights) if i not in settings.frozen and not low <= w <= high]
    return outside[0] if outside and settings.strategy != "greedy" else None
