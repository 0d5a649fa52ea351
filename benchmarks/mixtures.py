"""Models and mixtures side by side: networks, parameters, operations, distance, time (the supplement's table 1).

    python benchmarks/mixtures.py base=fashion-ddpm ensemble=runs/fashion-quick masks=masks/mixture.yaml \
        --seeds 0 500 1000 --out table.jsonl

A model is whatever ``deme evaluate`` draws with: a pipeline, a run (its ensemble), a mixture or a schedule. Ratios are
to the first. Every model is scored on the same seeds, and timed on batches in turn. What ``--out`` holds is not scored
again. ``--table FILE FILE …`` puts such files of several training seeds together.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from decouple_merge.config import Protocol, Sample, Text
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.models.costs import num_macs
from decouple_merge.models.members import Member
from decouple_merge.models.network import num_parameters
from decouple_merge.models.schedulers import make_scheduler
from decouple_merge.sampling.model import OpenedModel, open_model
from decouple_merge.storage.files import append_record, read_records
from decouple_merge.storage.provenance import git_commit
from interleaved import interleaved


def routed(model: OpenedModel) -> Iterator[Member]:
    """List the networks that run while an image is drawn, step by step."""
    if model.mixture is None:
        assert model.network is not None
        yield from [Member("base", model.base, model.network.state_dict())] * model.settings.num_steps
        return
    settings, mixture = model.settings, model.mixture
    scheduler = make_scheduler(model.base, None, settings.num_steps, settings.timestep_spacing, mixture.kept)
    for t in scheduler.timesteps:
        visited = model.base.process.visited(t).item()
        yield from (mixture.members[number] for number, _ in mixture.router.route(visited))


def cost_of(model: OpenedModel) -> dict[str, Any]:
    """Count networks, the parameters of all that run, and the calls and multiply-accumulates of an image."""
    run = list(routed(model))
    used = {id(member.base): member.base for member in run}
    macs = {key: num_macs(base) for key, base in used.items()}
    networks = {member.name: num_parameters(member.base.network) for member in run}
    return {
        "num_networks": len(networks),
        "num_parameters": sum(networks.values()),
        "num_calls": len(run),
        "gmacs": sum(macs[id(member.base)] for member in run) / 1e9,
    }


def mean_range(values: list[float], form: str = ".3f") -> str:
    """Say the mean of values, and their range where they are several; nothing of none."""
    if not values:
        return ""
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def paired(records: list[dict[str, Any]], model: str, metric: str) -> list[float]:
    """List a model's values over those of the first one, by set of seeds."""
    scored = [r for r in records if "values" in r]
    first = {r["seed"]: r["values"][metric] for r in scored if r["model"] == scored[0]["model"]}
    return [r["values"][metric] / first[r["seed"]] for r in scored if r["model"] == model]


def table(files: list[list[dict[str, Any]]]) -> Iterator[str]:
    """Put files of several training seeds together: means and ranges over them, ratios paired by set of seeds."""
    metrics = list(dict.fromkeys(metric for record in files[0] for metric in record.get("values", {})))
    head = ["model", "networks", "parameters", "calls", "GMAC an image"]
    head += [f"{metric} / {files[0][0]['model']}" for metric in metrics] + ["time / the first"]
    yield "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|"
    for model in dict.fromkeys(record["model"] for record in files[0]):
        own = [[r for r in records if r["model"] == model] for records in files]
        cost = next(r for r in own[0] if "gmacs" in r)
        cells = [model, str(cost["num_networks"]), f"{cost['num_parameters']:,}", str(cost["num_calls"])]
        cells.append(f"{cost['gmacs']:.2f}")
        for metric in metrics:
            by_file = [paired(records, model, metric) for records in files]
            cells.append(mean_range([statistics.fmean(found) for found in by_file if found]))
        cells.append(mean_range([r["time_ratio"] for of_model in own for r in of_model if "time_ratio" in r], ".2f"))
        yield "| " + " | ".join(cells) + " |"


def draw(model: OpenedModel, num_images: int) -> None:
    """Draw images and drop them."""
    for _ in model.draw(range(num_images), torch.device("cpu")):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL")
    parser.add_argument("--reference", default="fashion-mnist")
    parser.add_argument("--split", default="train", help="of the reference")
    parser.add_argument("--metrics", default="fd_effnetlite0,kd_effnetlite0")
    parser.add_argument("--judge", help="a classifier's folder or name, for fd_judge and others")
    parser.add_argument("--num-images", type=int, default=500, help="of each set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first seed of each set")
    parser.add_argument("--batch-size", type=int, default=125)
    parser.add_argument("--timed", type=int, default=32, help="images of each model that are timed")
    parser.add_argument("--repeats", type=int, default=5, help="how often; 0 times nothing")
    parser.add_argument("--out", type=Path, default=Path("mixtures.jsonl"))
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of such files instead")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.table:
        print("\n".join(table([read_records(path) for path in asked.table])))
        return
    named = dict(given.split("=", 1) for given in asked.models)
    sample = Sample(num_steps=50, batch_size=asked.batch_size)
    opened = {name: open_model(model, sample, Text()) for name, model in named.items()}
    done = read_records(asked.out) if asked.out.exists() else []

    def write(record: dict[str, Any]) -> None:
        append_record(asked.out, record)
        print(json.dumps(record), flush=True)

    for name, model in opened.items():
        if not any(r["model"] == name and "gmacs" in r for r in done):
            write(
                {"model": name, "path": named[name], "sha256": model.sha256, "commit": git_commit(), **cost_of(model)}
            )
        for seed in asked.seeds:
            if any(r["model"] == name and r.get("seed") == seed for r in done):
                continue
            protocol = Protocol(
                metrics=asked.metrics.split(","),
                num_images=asked.num_images,
                seed=seed,
                sample=sample,
                judge=asked.judge,
                split=asked.split,
            )
            records = evaluate_model(named[name], asked.reference, protocol, name=name)
            values = {r["metric"]: r["value"] for r in records if isinstance(r, dict)}
            write({"model": name, "seed": seed, "num_images": asked.num_images, "values": values})
    if not asked.repeats:
        return
    seconds = interleaved({n: partial(draw, model, asked.timed) for n, model in opened.items()}, asked.repeats)
    first = seconds[next(iter(seconds))]
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        write({"model": name, "time_ratio": ratio, "seconds_of_1000": 1000 * statistics.median(own) / asked.timed})


if __name__ == "__main__":
    main()
