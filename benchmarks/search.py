"""Every search strategy against the paper's grid: the distance on held-out seeds for what it spent.

    python benchmarks/search.py runs/fashion-1

All strategies choose on the same few images of few steps, so that the whole grid can be run; their best candidates
after so many evaluations are then scored on images from other seeds, which chose nothing. One expert's weight is
frozen, or the grid would take hours. Repeated with other search seeds.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch

from decouple_merge.config import Config, load_config
from decouple_merge.experiment.plan import check, load_experts
from decouple_merge.experiment.selection import hashes_of, open_merger, open_scorer
from decouple_merge.experiment.start import learn_start
from decouple_merge.models.base import tensors_sha256
from decouple_merge.searching.candidates import ranked
from decouple_merge.searching.levels import search
from decouple_merge.searching.strategies import Weights
from decouple_merge.searching.study import Study, open_study
from decouple_merge.searching.trial import Level, Score
from decouple_merge.storage.provenance import git_commit

STRATEGIES = ["grid", "gp", "tpe", "cmaes", "evolution", "coordinate", "random", "gradient"]
BUDGETS = [12, 24, 48]


def the_same(study: Study, level: str) -> Study:
    """Give the study of a search's one level."""
    return study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with finished experts")
    parser.add_argument("--images", type=int, default=128, help="a candidate")
    parser.add_argument("--held-out", type=int, default=1000, help="images from seeds that chose nothing")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frozen", default="0:0.0", help="expert:weight")
    parser.add_argument("--low", type=float, default=-0.2)
    parser.add_argument("--high", type=float, default=1.8)
    parser.add_argument("--grid-step", type=float, default=0.4)
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES)
    parser.add_argument("--out", type=Path, help="where the values go, as JSON lines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    index, weight = arguments.frozen.split(":")
    values = load_config(arguments.run / "config.yaml").model_dump(mode="json")
    values["search"] |= {
        "num_images": arguments.images,
        "num_steps": arguments.steps,
        "num_finalists": 0,
        "low": arguments.low,
        "high": arguments.high,
        "grid_step": arguments.grid_step,
        "frozen": {int(index): float(weight)},
    }
    plan = check(load_config(arguments.run / "config.yaml"), arguments.run)
    experts = load_experts(plan)
    merger = open_merger(plan, experts, hashes_of(experts))
    objective, known = open_scorer(plan, merger), dict[tuple[str, Weights], Score]()

    def scored(weights: Weights, level: Level) -> Score:
        # Strategies meet at some candidates; each counts it, nobody need draw it again.
        if (level.name, weights) not in known:
            known[level.name, weights] = objective(weights, level)
        return known[level.name, weights]

    rows: dict[tuple[str, int], list[float]] = {}
    learned = learn_start(plan, merger, [tensors_sha256(e) for e in experts])
    for repeat in range(arguments.repeats):
        first_seed = 2_000_000 + 100_000 * repeat
        seeds = range(first_seed + 50_000, first_seed + 50_000 + arguments.held_out)
        held_out = Level(f"held-out-{repeat}", 1, seeds, arguments.steps)
        for strategy in arguments.strategies:
            changed = {"strategy": strategy, "num_trials": max(BUDGETS), "first_seed": first_seed}
            config = Config.model_validate({**values, "seed": repeat, "search": values["search"] | changed})
            study = open_study(None, f"{strategy}-{repeat}")

            def on_this_seed(weights: Weights, level: Level, repeat: int = repeat) -> Score:
                return scored(weights, Level(f"screen-{repeat}", 1, level.seeds, level.num_steps))

            found = list(search(partial(the_same, study), config, len(experts), on_this_seed, learned))
            budgets = [b for b in BUDGETS if b < len(found)] if strategy != "grid" else []
            for budget in [*budgets, len(found)]:
                winner = ranked(found[:budget], config.search)[0]
                value = scored(winner.weights, held_out).value
                rows.setdefault((strategy, budget), []).append(value)
                record = {"strategy": strategy, "repeat": repeat, "num_candidates": budget, "held_out": value}
                record |= {"screened": winner.value, "weights": winner.weights}
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                print(record, flush=True)
    calls = arguments.images * arguments.steps
    print(f"\ncommit {git_commit()}, {arguments.run}, {plan.config.search.metric}, {arguments.repeats} repeats")
    print("| strategy | candidates | network calls × images | held-out distance | range |\n|---|---|---|---|---|")
    for (strategy, budget), found_values in rows.items():
        mean, spread = statistics.fmean(found_values), f"{min(found_values):.1f} to {max(found_values):.1f}"
        print(f"| {strategy} | {budget} | {budget * calls:,} | {mean:.1f} | {spread} |")


if __name__ == "__main__":
    main()
