"""Model schedules (OMS-DPM, Liu et al. 2023): which network runs at each step of a sampler, or none; pure functions.

A schedule has a slot for each step of an even grid of timesteps, the noisiest first: 0 skips the step, k runs model k.
"""

import random
from collections.abc import Callable, Sequence

Slots = tuple[int, ...]
# A list of schedules to a list of numbers, the smaller the better.
Predict = Callable[[list[Slots]], list[float]]
# Concentration of the random shares of models in a schedule (OMS-DPM, appendix).
CONCENTRATION = 0.4
# So many slots of a child are drawn again, at most, and so many children are tried for one that is wanted.
MAX_MUTATIONS, NUM_TRIES = 10, 5
# A random schedule costs between these shares of the budget.
SHARES = (0.2, 1.1)


def cost_of(slots: Slots, seconds: Sequence[float]) -> float:
    """Sum what the steps of a schedule take, Σ seconds[k] over its slots; those that are skipped take nothing.

    Args:
        seconds: of a call of each model; that of model k is number k - 1.
    """
    return sum(seconds[k - 1] for k in slots if k)


def even_slots(model: int, num_steps: int, num_slots: int) -> Slots:
    """Spread the steps of one model evenly over the slots, from the first on."""
    kept = {i * num_slots // num_steps for i in range(num_steps)}
    return tuple(model if i in kept else 0 for i in range(num_slots))


def longest_even(model: int, num_slots: int, seconds: Sequence[float], budget: float) -> Slots | None:
    """Spread as many steps of one model as the budget pays for; None where it pays for none."""
    num = min(num_slots, int(budget / seconds[model - 1] + 1e-9))
    return even_slots(model, num, num_slots) if num else None


def random_slots(num_slots: int, seconds: Sequence[float], budget: float, chance: random.Random) -> Slots:
    """Draw a schedule: how much it costs, shares of the models, and slots in a random order until that is spent.

    Shares are from a Dirichlet distribution. At least one step runs, of the cheapest model where no other is paid for.
    """
    left = chance.uniform(*SHARES) * budget
    weights = [chance.gammavariate(CONCENTRATION, 1) + 1e-12 for _ in seconds]
    slots = [0] * num_slots
    for place in chance.sample(range(num_slots), num_slots):
        paid = [k for k, price in enumerate(seconds) if price <= left]
        if not paid:
            break
        (chosen,) = chance.choices(paid, [weights[k] for k in paid])
        slots[place] = chosen + 1
        left -= seconds[chosen]
    if not any(slots):
        slots[0] = min(range(len(seconds)), key=lambda k: seconds[k]) + 1
    return tuple(slots)


def evolve(
    predict: Predict,
    start: Sequence[Slots],
    seconds: Sequence[float],
    budget: float,
    num_generations: int,
    population_size: int,
    chance: random.Random,
) -> list[Slots]:
    """Search for the schedules with the smallest prediction under a budget, by mutation and selection.

    A child is the better of two random parents with 1 to 10 of its slots drawn again. Children over the budget are
    dropped. The best of parents and children are the next parents (OMS-DPM, section 4.4).

    Args:
        start: the first parents, of which those within the budget count.

    Returns:
        The last population, the best first, each schedule once.
    """
    alive = [slots for slots in dict.fromkeys(start) if any(slots) and cost_of(slots, seconds) <= budget]
    population = dict(zip(alive, predict(alive), strict=True)) if alive else {}
    for _ in range(num_generations if population else 0):
        parents, children = list(population), dict[Slots, None]()
        for _ in range(NUM_TRIES * population_size):
            if len(children) == population_size:
                break
            mother, father = chance.choice(parents), chance.choice(parents)
            child = list(mother if population[mother] <= population[father] else father)
            for place in chance.sample(range(len(child)), min(len(child), chance.randint(1, MAX_MUTATIONS))):
                child[place] = chance.randint(0, len(seconds))
            slots = tuple(child)
            if any(slots) and slots not in population and cost_of(slots, seconds) <= budget:
                children[slots] = None
        if children:
            population |= dict(zip(children, predict(list(children)), strict=True))
        best = sorted(population, key=lambda slots: population[slots])[:population_size]
        population = {slots: population[slots] for slots in best}
    return sorted(population, key=lambda slots: population[slots])
