"""Summarise runs that differ only in their training seed: python benchmarks/results.py RUN RUN …"""

import argparse
import statistics
from pathlib import Path

from decouple_merge.evaluation.records import COMPARED_FIELDS
from decouple_merge.storage.files import read_records
from decouple_merge.storage.run_folder import Run


def main() -> None:
    """Print a Markdown table of each metric: mean and range over training seeds, ratios paired by run and seed set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = {folder: read_records(Run(folder).metrics) for folder in parser.parse_args().runs}
    records = [r for found in runs.values() for r in found]
    for metric in dict.fromkeys(r["metric"] for r in records):
        same = [r for r in records if r["metric"] == metric]
        for key in COMPARED_FIELDS:
            if len({str(r.get(key)) for r in same}) > 1:
                raise SystemExit(f"{metric}: the runs differ in {key}: {sorted({str(r.get(key)) for r in same})}")
        print(f"\n{metric}: {same[0]['sampler']} {same[0]['num_steps']}, {same[0]['num_images']} images a seed set\n")
        print("| model | mean | over training seeds | largest spread over seed sets | / pretrained | / baseline |")
        print("|---|---|---|---|---|---|")
        values = {
            (folder, r["model"], r["seeds"][0]): r["value"]
            for folder, found in runs.items()
            for r in found
            if r["metric"] == metric
        }
        for model in dict.fromkeys(r["model"] for r in same):
            print("| " + " | ".join([model, *_row(values, model)]) + " |")


def _row(values: dict[tuple[Path, str, int], float], model: str) -> list[str]:
    by_run: dict[Path, list[float]] = {}
    for (folder, name, _), value in values.items():
        if name == model:
            by_run.setdefault(folder, []).append(value)
    means = [statistics.fmean(v) for v in by_run.values()]
    spread = max(max(v) - min(v) for v in by_run.values())
    cells = [f"{statistics.fmean(means):.4g}", f"{min(means):.4g} to {max(means):.4g}", f"{spread:.2g}"]
    for other in ("pretrained", "baseline-finetuned"):
        ratios: dict[Path, list[float]] = {}
        for (folder, name, seed), value in values.items():
            if name == model and (folder, other, seed) in values:
                ratios.setdefault(folder, []).append(value / values[folder, other, seed])
        paired = [statistics.fmean(r) for r in ratios.values()]
        cells.append(f"{statistics.fmean(paired):.3f} ({min(paired):.3f} to {max(paired):.3f})" if paired else "")
    return cells


if __name__ == "__main__":
    main()
