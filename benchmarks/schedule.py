"""How long the workers of a search wait: its schedule on any number of them, by the search's code on a made-up loss.

    python benchmarks/schedule.py configs/sd14.yaml --workers 1 8 64 512

A candidate takes as long as its images times their steps, give or take a spread. Nothing is drawn. The numbers are
those of the strategy, its batches and the levels of halving: who proposes waits for the whole batch. Workers share the
images of a candidate, as the search does; what each of them takes to merge it is not counted.
"""

import argparse
import heapq
import random
from pathlib import Path

import decouple_merge.searching.levels as levels
from decouple_merge.config import Config, Sample, load_config
from decouple_merge.evaluation.shared_features import SharedFeatures
from decouple_merge.searching.strategies import Weights
from decouple_merge.searching.study import open_study
from decouple_merge.searching.trial import Level, Score

Batch = tuple[Level, int]


def batches_of(config: Config) -> list[Batch]:
    """Search with a parabola as the distance; returns how many candidates each batch had, and of which level."""
    found: list[Batch] = []
    evaluate_all = levels.evaluate_all

    def noting(study, places, level, *others):  # type: ignore[no-untyped-def]
        found.append((level, len(places)))
        return evaluate_all(study, places, level, *others)

    def objective(weights: Weights, level: Level) -> Score:
        return Score(1 + sum((w - 0.6 - 0.2 * i) ** 2 for i, w in enumerate(weights)), "")

    studies: dict[str, object] = {}
    learned = (0.5,) * config.num_combined if config.search.learns_start else None
    levels.evaluate_all = noting  # type: ignore[assignment]
    try:
        opened = lambda name: studies.setdefault(name, open_study(None, name))  # noqa: E731
        list(levels.search(opened, config, config.num_combined, objective, learned))  # type: ignore[arg-type]
    finally:
        levels.evaluate_all = evaluate_all  # type: ignore[assignment]
    return found


def num_shares(num_images: int, sample: Sample) -> int:
    """Count the shares that a set of images is cut into."""
    return len(SharedFeatures(Path(), num_images, sample.batch_size).shares)


def makespan(batches: list[Batch], num_workers: int, sample: Sample, spread: float) -> tuple[float, float]:
    """Let the workers take shares as they become free; returns when all is done, and the work in it, in steps."""
    chance, now, work = random.Random(0), 0.0, 0.0
    for level, num in batches:
        free, num_each = [now] * num_workers, num_shares(len(level.seeds), sample)
        for _ in range(num):
            takes = len(level.seeds) * (level.num_steps or sample.num_steps) * max(0.1, chance.gauss(1, spread))
            for _ in range(num_each):
                heapq.heapreplace(free, free[0] + takes / num_each)
            work += takes
        now = max(free)
    return now, work


def main() -> None:
    """Print for each number of workers how long the search takes, and which share of them waits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 512])
    parser.add_argument("--spread", type=float, default=0.1, help="of the time of equal candidates")
    arguments = parser.parse_args()
    print("strategy | batch | candidates | workers | time / one worker's | speed-up | idle")
    for strategy, size in (("gp", 1), ("gp", 8), ("gp", 16), ("evolution", 1), ("random", 1), ("grid", 1)):
        chosen = [f"search.strategy={strategy}", f"search.batch_size={size}"]
        config = load_config(arguments.config, chosen)
        batches = batches_of(config)
        for num in arguments.workers:
            took, work = makespan(batches, num, config.sample, arguments.spread)
            print(
                f"{strategy} | {size} | {sum(n for _, n in batches)} | {num} | {took / work:.3f} | {work / took:.1f} | "
                f"{1 - work / took / num:.0%}"
            )


if __name__ == "__main__":
    main()
