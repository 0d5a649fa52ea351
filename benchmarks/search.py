"""Every search strategy against the paper's grid: the distance on held-out seeds for what it spent.

    python benchmarks/search.py runs/fashion-1
    python benchmarks/search.py runs/fashion-1 --strategies --races 14:32:3 --metrics fd_effnetlite0 kd_effnetlite0

All strategies choose on the same few images of few steps, so that the whole grid can be run; their best candidates
after so many evaluations are then scored on images from other seeds, which chose nothing. A race begins with fewer
images for each candidate, and the best of every so many go on with that many times the images. One expert's weight is
frozen, or the grid would take hours. Repeated with other search seeds.
"""

import argparse
import statistics
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from decouple_merge.config import Config, load_config
from decouple_merge.experiment.plan import check, load_experts
from decouple_merge.experiment.selection import hashes_of, open_merger, open_scorer
from decouple_merge.experiment.start import learn_start
from decouple_merge.models.base import tensors_sha256
from decouple_merge.searching.candidates import ranked
from decouple_merge.searching.levels import levels, search
from decouple_merge.searching.strategies import Weights
from decouple_merge.searching.study import open_study
from decouple_merge.searching.trial import Level, Score, Trial
from decouple_merge.storage.files import append_record
from decouple_merge.storage.provenance import git_commit

STRATEGIES = ["grid", "gp", "tpe", "cmaes", "evolution", "coordinate", "random", "gradient"]


@dataclass(frozen=True)
class Arm:
    """One way to search: what it minimises, what it sets of ``search``, and the candidates after which it is judged."""

    name: str
    metric: str
    settings: dict[str, Any]
    budgets: list[int]


def arms_of(arguments: argparse.Namespace) -> list[Arm]:
    """List the strategies on one level, and the races over several, each by every metric."""
    found = []
    for metric in arguments.metrics:
        for strategy in arguments.strategies:
            settings = {"strategy": strategy, "num_trials": max(arguments.budgets), "num_images": arguments.images}
            budgets = [] if strategy == "grid" else arguments.budgets
            found.append(Arm(strategy, metric, settings | {"num_finalists": 0}, budgets))
        for race in arguments.races:
            trials, images, halving = map(int, race.split(":"))
            settings = {"num_trials": trials, "num_images": images, "halving": halving, "num_finalists": 1}
            found.append(Arm(f"race {race}", metric, settings | {"num_final_images": trials * images}, []))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with finished experts")
    parser.add_argument("--images", type=int, default=128, help="a candidate")
    parser.add_argument("--held-out", type=int, default=1000, help="images from seeds that chose nothing")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--frozen", default="0:0.0", help="expert:weight")
    parser.add_argument("--low", type=float, default=-0.2)
    parser.add_argument("--high", type=float, default=1.8)
    parser.add_argument("--grid-step", type=float, default=0.4)
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES)
    parser.add_argument("--budgets", type=int, nargs="+", default=[12, 24, 48], help="candidates of a strategy")
    parser.add_argument("--races", nargs="*", default=[], help="candidates:images:one of so many goes on")
    parser.add_argument("--metrics", nargs="+", default=["fd_effnetlite0"], help="that choose; the first judges all")
    parser.add_argument("--out", type=Path, help="where the values go, as JSON lines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    index, weight = arguments.frozen.split(":")
    values = load_config(arguments.run / "config.yaml").model_dump(mode="json")
    values["search"] |= {
        "low": arguments.low,
        "high": arguments.high,
        "grid_step": arguments.grid_step,
        "frozen": {int(index): float(weight)},
    }
    plan = check(load_config(arguments.run / "config.yaml"), arguments.run)
    experts = load_experts(plan)
    merger = open_merger(plan, experts, hashes_of(experts))
    scorer, known = open_scorer(plan, merger), dict[tuple[str, range, Weights], Score]()

    def scored(weights: Weights, seeds: range, metric: str) -> Score:
        # Strategies meet at some candidates; each counts it, nobody need draw it again.
        if (metric, seeds, weights) not in known:
            scorer.metric = metric
            known[metric, seeds, weights] = scorer(weights, Level("", 1, seeds, arguments.steps))
        return known[metric, seeds, weights]

    rows: dict[tuple[str, str, int], list[float]] = {}
    learned = learn_start(plan, merger, [tensors_sha256(e) for e in experts])
    for repeat in arguments.repeats:
        first_seed = 2_000_000 + 100_000 * repeat
        held_out = range(first_seed + 50_000, first_seed + 50_000 + arguments.held_out)
        for arm in arms_of(arguments):
            changed = arm.settings | {"first_seed": first_seed}
            config = Config.model_validate({**values, "seed": repeat, "search": values["search"] | changed})

            def on_this_metric(weights: Weights, level: Level, metric: str = arm.metric) -> Score:
                return scored(weights, level.seeds, metric)

            raced = [level for level in levels(config, len(experts)) if level.name != "final"]
            trials = search(lambda name: open_study(None, name), config, len(experts), on_this_metric, learned)
            # What is promoted to the final level is the winner.
            found = list(islice(trials, sum(level.num_candidates for level in raced)))
            spent = {level.name: len(level.seeds) for level in raced}
            for budget in [*(b for b in arm.budgets if b < len(found)), len(found)]:
                tried: list[Trial] = found[:budget]
                winner = ranked([t for t in tried if t.level == tried[-1].level], config.search)[0]
                value = scored(winner.weights, held_out, arguments.metrics[0]).value
                num_images = sum(spent[t.level] for t in tried)
                rows.setdefault((arm.name, arm.metric, num_images), []).append(value)
                record = {"arm": arm.name, "metric": arm.metric, "repeat": repeat, "num_images": num_images}
                record |= {"held_out": value, "screened": winner.value, "weights": winner.weights}
                if arguments.out:
                    append_record(arguments.out, record)
                print(record, flush=True)
    print(f"\ncommit {git_commit()}, {arguments.run}, {len(arguments.repeats)} repeats of {arguments.steps} steps")
    print("| search | by | images | held-out distance | range |\n|---|---|---|---|---|")
    for (name, metric, num_images), found_values in rows.items():
        mean, spread = statistics.fmean(found_values), f"{min(found_values):.1f} to {max(found_values):.1f}"
        print(f"| {name} | {metric} | {num_images:,} | {mean:.1f} | {spread} |")


if __name__ == "__main__":
    main()
