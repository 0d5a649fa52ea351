"""The one place where the stages meet: finetune, search, merge, sample, evaluate; each verb of ``deme`` is a function here."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from . import __version__
from .config import Config, Data, Sample, Training, dump_config, load_config
from .data import Images, load_images, open_images
from .evaluate import Reference, make_reference, read_statistics, score, write_statistics
from .executors import run_all
from .features import METRICS, Extractor, check_metrics, load_extractor
from .finetune import StepRecord, Task, train
from .models import (
    PROJECTIONS_FILE,
    Base,
    create_base,
    export_pipeline,
    load_base,
    load_network,
    make_scheduler,
    new_network,
    num_parameters,
    tensors_sha256,
)
from .runs import Run, append_record, read_records, read_tensors, write_json, write_records, write_tensors, write_text
from .sample import Denoiser, denoiser, ensemble, sample_images, sampling_copy
from .search import Score, Trial, Weights, best, num_candidates, open_study, search, trials
from .timesteps import TimestepRange, check_ranges, split_timesteps
from .weights import Tensors, check_same_keys, merge, task_vector_norms

BASELINE = "baseline-finetuned"


@dataclass(frozen=True)
class Note:
    """A line for the user."""

    text: str


@dataclass(frozen=True)
class Row:
    """A line of the result table: values of one metric over the sets of report seeds."""

    model: str
    num_parameters: int
    metric: str
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        return max(self.values) - min(self.values)


Event = Note | StepRecord | Trial | Row


@dataclass
class Plan:
    """A config with everything it names opened and checked."""

    config: Config
    run: Run
    base: Base
    images: Images
    ranges: tuple[TimestepRange, ...]


def default_device() -> torch.device:
    """Pick the accelerator of this machine, or its CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def prepare(config: Config, out: Path) -> Plan:
    """Open and check everything a run needs, before any compute is spent, and make its folder.

    Raises:
        ValueError: base, data, ranges, sampler, metrics or seeds are wrong, or ``out`` belongs to another config.
    """
    base = load_base(config.base)
    if config.finetune.ranges is None:
        ranges = split_timesteps(base.num_train_timesteps, config.finetune.num_ranges)
    else:
        ranges = [TimestepRange(low, high) for low, high in config.finetune.ranges]
    check_ranges(ranges, base.num_train_timesteps)
    for num_steps in {config.sample.num_steps, config.search.num_steps or config.sample.num_steps}:
        make_scheduler(base, config.sample.sampler, num_steps, config.sample.timestep_spacing)
    check_metrics([*config.evaluate.metrics, config.search.metric], config.evaluate.inception_weights)
    images = load_images(config.data, base.channels, base.image_size)
    if len(images) <= config.data.num_held_out:
        raise ValueError(
            f"the data has {len(images)} images and data.num_held_out is {config.data.num_held_out}: nothing is left "
            "to train on"
        )
    run = Run(out)
    _claim(run, config)
    write_json(run.manifest, _manifest(config, base, images))
    return Plan(config, run, base, images, tuple(ranges))


def _claim(run: Run, config: Config) -> None:
    """Write the config into a new run folder; require that an old one holds the same."""
    if run.config.exists():
        old = load_config(run.config).model_dump(mode="json")
        new = config.model_dump(mode="json")
        differing = sorted(_differing_keys(old, new))
        if differing:
            raise ValueError(
                f"{run.folder} belongs to another config, which differs in {', '.join(differing)}; "
                "give another --out, or remove the folder"
            )
    elif run.folder.exists() and any(run.folder.iterdir()):
        raise ValueError(f"{run.folder} is not empty and not a run folder (no config.yaml); give another --out")
    else:
        write_text(run.config, dump_config(config))


def _differing_keys(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differing_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _manifest(config: Config, base: Base, images: Images) -> dict[str, Any]:
    return {
        "versions": {
            "decouple_merge": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "git": _git_commit(),
        "device": str(default_device()),
        "base": {"name": config.base, "sha256": base.sha256},
        "data": {"source": config.data.source, "num_images": len(images), "sha256": images.sha256},
        "seeds": {
            "training": config.seed,
            "search": [config.search_seeds.start, config.search_seeds.stop - 1],
            "report": [config.report_seeds.start, config.report_seeds.stop - 1],
        },
    }


# Finetune


def _expert_task(plan: Plan, index: int) -> Task:
    settings = plan.config.finetune
    return Task(
        f"expert-{index}",
        plan.ranges[index],
        plan.ranges,
        settings.global_prob,
        settings.consistency_weight,
        settings.projection.placement,
        settings.projection.learning_rate_scale,
    )


def _baseline_task(plan: Plan) -> Task:
    return Task(BASELINE, TimestepRange(0, plan.base.num_train_timesteps), plan.ranges)


def _train(plan: Plan, task: Task, settings: Training, folder: Path) -> Iterator[StepRecord]:
    yield from train(plan.base, plan.images, plan.config.data, task, settings, plan.config.seed, folder)


def finetune(plan: Plan, only: int | None = None) -> Iterator[StepRecord]:
    """Finetune the experts, or one of them, and the baseline where the config asks for it.

    Raises:
        ValueError: there is no range of that index.
    """
    settings, num = plan.config.finetune, len(plan.ranges)
    if only is not None and not 0 <= only < num:
        raise ValueError(f"range {only} doesn't exist, expected 0 to {num - 1}")
    calls: list[tuple[Any, ...]] = [
        (plan, _expert_task(plan, i), settings, plan.run.expert(i)) for i in range(num) if only in (None, i)
    ]
    if settings.baseline and only is None:
        # Equal compute: as many updates as all experts together. It is the longest, so it starts first.
        longer = settings.model_copy(update={"num_updates": settings.num_updates * num})
        calls.insert(0, (plan, _baseline_task(plan), longer, plan.run.baseline(BASELINE)))
    calls = [c for c in calls if not (c[3] / "model.safetensors").exists()]
    yield from run_all(_train, calls, plan.config.num_processes)


def load_experts(plan: Plan) -> list[Tensors]:
    """Read a run's experts.

    Raises:
        ValueError: one is missing, damaged, or was finetuned from another base.
    """
    experts = []
    for index in range(len(plan.ranges)):
        folder = plan.run.expert(index)
        if not (folder / "model.safetensors").exists():
            raise ValueError(f"{folder} has no finished expert; run deme finetune first")
        record = json.loads((folder / "expert.json").read_text())
        if record["base_sha256"] != plan.base.sha256:
            raise ValueError(
                f"{folder} was finetuned from another base ({record['base_sha256'][:16]}, expected {plan.base.sha256[:16]})"
            )
        tensors, _ = read_tensors(folder / "model.safetensors")
        check_same_keys(plan.base.network.state_dict(), tensors, str(folder))
        experts.append(tensors)
    return experts


# Search and export


def _network(plan: Plan, weights: Tensors) -> nn.Module:
    """Build the network that holds some weights, trunk projections included."""
    network = new_network(plan.base, "trunk" if any(k.endswith("projection.weight") for k in weights) else "none")
    network.load_state_dict(weights)
    return network


class Objective:
    """The distance between the images of a merge and the reference, always from the same initial noise."""

    def __init__(self, plan: Plan, experts: list[Tensors]) -> None:
        self.plan, self.experts = plan, experts
        self.device = default_device()
        self.extractor = load_extractor(
            METRICS[plan.config.search.metric], self.device, plan.config.evaluate.inception_weights
        )
        self.reference = _reference(plan, self.extractor.name, self.device)
        self.start = plan.base.network.state_dict()
        self.network = sampling_copy(
            _network(plan, merge(self.start, experts, [0.0] * len(experts))), plan.config.sample, self.device
        )

    def load(self, weights: Weights) -> str:
        """Put a merge into the network's own storage; returns the hash of its tensors."""
        merged = merge(self.start, self.experts, list(weights))
        with torch.no_grad():
            for key, value in self.network.state_dict().items():
                value.copy_(merged[key])
        return tensors_sha256(merged)

    def score(self, model: Denoiser) -> float:
        settings = self.plan.config
        batches = sample_images(
            model, self.plan.base, settings.search_seeds, settings.sample, self.device, settings.search.num_steps
        )
        return score(batches, [settings.search.metric], self.extractor, self.reference)[settings.search.metric]

    def __call__(self, weights: Weights) -> Score:
        sha256 = self.load(weights)
        return Score(self.score(denoiser(self.network)), sha256)

    def seconds_per_candidate(self) -> float:
        """Estimate the cost of a candidate from one batch of two steps, after one to warm up."""
        settings = self.plan.config
        num_steps = settings.search.num_steps or settings.sample.num_steps
        size = min(settings.sample.batch_size, settings.search.num_images)
        x = torch.randn(size, self.plan.base.channels, self.plan.base.image_size, self.plan.base.image_size)
        model = denoiser(self.network)
        with torch.no_grad():
            model(x.to(self.device), 0)
            started = time.monotonic()
            for _ in range(2):
                model(x.to(self.device), 0)
        return (time.monotonic() - started) / 2 * num_steps * settings.search.num_images / size


def search_weights(plan: Plan) -> Iterator[Event]:
    """Search the merging weights of a run's experts; the study and the best model are left in the run folder."""
    settings, experts = plan.config.search, load_experts(plan)
    plan.run.study.parent.mkdir(parents=True, exist_ok=True)
    study = open_study(f"sqlite:///{plan.run.study.resolve()}")
    objective = Objective(plan, experts)
    remaining = num_candidates(settings, len(experts)) - len(trials(study))
    if remaining > 0 and not plan.run.merged.exists():
        seconds = objective.seconds_per_candidate()
        yield Note(
            f"search: up to {remaining} candidates of {settings.num_images} images, about {seconds:.0f} s each, "
            f"{remaining * seconds / 60:.0f} min in all"
        )
    for trial in search(study, settings, len(experts), objective, plan.config.seed):
        _write_trials(plan, trials(study))
        yield trial
    _write_trials(plan, trials(study))
    winner = best(study)
    if not plan.run.merged.exists() or _merge_record(plan, winner) != json.loads(
        (plan.run.merged / "merge.json").read_text()
    ):
        merged = merge(objective.start, experts, list(winner.weights))
        record = _merge_record(plan, winner)
        export_pipeline(plan.base, merged, plan.run.merged, model_card(record), record)


def _write_trials(plan: Plan, done: list[Trial]) -> None:
    seeds = plan.config.search_seeds
    extra = {"num_images": len(seeds), "seeds": [seeds.start, seeds.stop - 1], "metric": plan.config.search.metric}
    write_records(plan.run.trials, (asdict(t) | extra for t in done))


def _merge_record(plan: Plan, winner: Trial) -> dict[str, Any]:
    return {
        "method": "linear",
        "weights": list(winner.weights),
        "ranges": [[r.low, r.high] for r in plan.ranges],
        "base": {"name": plan.config.base, "sha256": plan.base.sha256},
        "experts_sha256": [tensors_sha256(e) for e in load_experts(plan)],
        "merged_sha256": winner.merged_sha256,
        "search": {
            "strategy": plan.config.search.strategy,
            "metric": plan.config.search.metric,
            "value": winner.value,
            "seeds": [plan.config.search_seeds.start, plan.config.search_seeds.stop - 1],
        },
        "projection": plan.config.finetune.projection.placement,
        "decouple_merge": __version__,
    }


def model_card(record: dict[str, Any]) -> str:
    rows = "".join(
        f"| [{low}, {high}) | {weight:.4f} |\n"
        for (low, high), weight in zip(record["ranges"], record["weights"], strict=True)
    )
    trunk = (
        "\nThis model keeps its channel-wise projections (placement: trunk) in `projections.safetensors`; stock diffusers "
        "ignores them, load it with decouple_merge.\n"
        if record["projection"] == "trunk"
        else ""
    )
    return f"""---
library_name: diffusers
tags: [unconditional-image-generation, decouple-then-merge]
---

# Merged from {len(record["weights"])} timestep experts

Made with decouple-merge {record["decouple_merge"]} by Decouple-then-Merge (CVPR 2025, arXiv 2410.06664): copies of
`{record["base"]["name"]}` (sha256 {record["base"]["sha256"][:16]}) were finetuned on one timestep range each and merged
by task arithmetic, θ + Σ w_i (θ_i - θ). It has the base's architecture and sampling cost.

| timesteps | weight |
|---|---|
{rows}{trunk}
The weights were chosen by {record["search"]["strategy"]} search for the smallest {record["search"]["metric"]} on seeds
{record["search"]["seeds"][0]} to {record["search"]["seeds"][1]}. `merge.json` has every hash.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/of/this/folder")
pipeline(num_inference_steps=50).images[0].save("image.png")
```
"""


# Evaluate


def _reference(plan: Plan, extractor: str, device: torch.device) -> Reference:
    loaded = load_extractor(extractor, device, plan.config.evaluate.inception_weights)
    return make_reference(plan.config.data.source, plan.images, loaded, plan.config.evaluate.num_reference_images)


def report_models(plan: Plan) -> list[str]:
    """List the models of the result table."""
    return ["pretrained", *([BASELINE] if plan.config.finetune.baseline else []), "ensemble", "merged"]


def _weights_of(plan: Plan, model: str) -> list[Tensors]:
    if model == "pretrained":
        return [plan.base.network.state_dict()]
    if model == "ensemble":
        return load_experts(plan)
    if model == BASELINE:
        return [read_tensors(plan.run.baseline(BASELINE) / "model.safetensors")[0]]
    return [load_network(plan.run.merged)]


def _denoiser_of(plan: Plan, model: str, device: torch.device) -> Denoiser:
    networks = [sampling_copy(_network(plan, w), plan.config.sample, device) for w in _weights_of(plan, model)]
    return (
        ensemble(networks, plan.ranges, plan.base.num_train_timesteps) if model == "ensemble" else denoiser(networks[0])
    )


def _seed_set(config: Config, index: int) -> range:
    first = config.evaluate.first_seed + index * config.evaluate.num_images
    return range(first, first + config.evaluate.num_images)


def _evaluate_model(plan: Plan, model: str, seeds: range, metrics: list[str]) -> Iterator[dict[str, Any]]:
    """Score one model on one set of seeds; the images are drawn once for all metrics."""
    config, device = plan.config, default_device()
    pixels = torch.cat(list(sample_images(_denoiser_of(plan, model, device), plan.base, seeds, config.sample, device)))
    for name in dict.fromkeys(METRICS[m] for m in metrics):
        extractor = load_extractor(name, device, config.evaluate.inception_weights)
        reference = _reference(plan, name, device)
        for metric, value in score(pixels.split(256), metrics, extractor, reference).items():
            yield {
                "model": model,
                "metric": metric,
                "value": value,
                "num_images": len(seeds),
                "seeds": [seeds.start, seeds.stop - 1],
                "extractor": extractor.label,
                "reference": reference.name,
                "sampler": config.sample.sampler,
                "num_steps": config.sample.num_steps,
                "timestep_spacing": _spacing(plan),
                "precision": config.sample.precision,
                "git": _git_commit(),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }


def _spacing(plan: Plan) -> str:
    settings = plan.config.sample
    scheduler = make_scheduler(plan.base, settings.sampler, settings.num_steps, settings.timestep_spacing)
    return str(scheduler.config.get("timestep_spacing"))


def evaluate_run(plan: Plan) -> Iterator[Event]:
    """Score every model of the result table on every set of report seeds; yields the table's rows."""
    config, device = plan.config, default_device()
    for extractor in dict.fromkeys(METRICS[m] for m in config.evaluate.metrics):
        _reference(plan, extractor, device)
    done = {(r["model"], r["metric"], r["seeds"][0]) for r in read_records(plan.run.metrics)}
    calls: list[tuple[Any, ...]] = []
    for index in range(config.evaluate.num_seed_sets):
        seeds = _seed_set(config, index)
        for model in report_models(plan):
            missing = [m for m in config.evaluate.metrics if (model, m, seeds.start) not in done]
            if missing:
                calls.append((plan, model, seeds, missing))
    for record in run_all(_evaluate_model, calls, config.num_processes):
        append_record(plan.run.metrics, record)
        yield Note(
            f"{record['model']}: {record['metric']} {record['value']:.4g} on seeds {record['seeds'][0]} to {record['seeds'][1]}"
        )
    for model in report_models(plan):
        _write_samples(plan, model, device)
    yield from result_table(plan)


def _write_samples(plan: Plan, model: str, device: torch.device) -> None:
    first = plan.config.evaluate.first_seed
    seeds = [
        s
        for s in range(first, first + plan.config.evaluate.num_sample_images)
        if not (plan.run.samples(model) / f"{s}.png").exists()
    ]
    if seeds:
        write_images(
            sample_images(_denoiser_of(plan, model, device), plan.base, seeds, plan.config.sample, device),
            seeds,
            plan.run.samples(model),
        )


def write_images(batches: Iterator[torch.Tensor], seeds: list[int], folder: Path) -> None:
    """Write uint8 batches [n, C, H, W] as ``<seed>.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    names = iter(seeds)
    for batch in batches:
        for pixels in batch:
            Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / f"{next(names)}.png")


def result_table(plan: Plan) -> Iterator[Row]:
    """Yield a row for each metric and model, from the run's records."""
    records = read_records(plan.run.metrics)
    size = num_parameters(plan.base.network)
    if plan.config.finetune.projection.placement == "trunk" and plan.run.merged.exists():
        merged_size = sum(v.numel() for v in load_network(plan.run.merged).values())
    else:
        merged_size = size
    sizes = {"ensemble": merged_size * len(plan.ranges), "merged": merged_size}
    for metric in plan.config.evaluate.metrics:
        for model in report_models(plan):
            values = [r["value"] for r in records if (r["model"], r["metric"]) == (model, metric)]
            if values:
                yield Row(model, sizes.get(model, size), metric, values)


# Verbs


def run(config: Config, out: Path) -> Iterator[Event]:
    """Do the whole job: finetune, search, export, evaluate. What is finished already is not done again."""
    plan = prepare(config, out)
    yield from finetune(plan)
    norms = task_vector_norms(plan.base.network.state_dict(), load_experts(plan))
    yield Note("task vector norms: " + ", ".join(f"{n:.3f}" for n in norms))
    yield from search_weights(plan)
    yield from evaluate_run(plan)


def describe(config: Config, out: Path) -> Iterator[Note]:
    """Check a config as ``run`` would and say what it will do; computes and writes nothing."""
    base = load_base(config.base)
    settings, total = (
        config.finetune,
        config.finetune.num_updates
        * (config.finetune.num_ranges if config.finetune.ranges is None else len(config.finetune.ranges)),
    )
    yield Note(
        f"base {config.base}: {num_parameters(base.network):,} parameters, {base.image_size}×{base.image_size}, T = {base.num_train_timesteps}"
    )
    yield Note(
        f"experts: {total // settings.num_updates} × {settings.num_updates} updates of {settings.batch_size * settings.accumulation} images"
        + (f"; baseline: {total} updates" if settings.baseline else "")
    )
    yield Note(
        f"search: {config.search.strategy}, up to {num_candidates(config.search, total // settings.num_updates)} candidates of {config.search.num_images} images"
    )
    yield Note(
        f"evaluation: {config.evaluate.num_seed_sets} × {config.evaluate.num_images} images, {config.sample.sampler} {config.sample.num_steps}"
    )
    yield Note(f"run folder: {out}")


def pretrain(config: Config, out: Path) -> Iterator[Event]:
    """Train a base from nothing; leaves a stock pipeline and its training curve in ``out/pipeline``."""
    settings = config.pretrain
    if settings is None:
        raise ValueError("the config has no section pretrain, which holds the model's and the training's settings")
    base = create_base(settings.model, settings.scheduler, config.seed)
    images = load_images(config.data, base.channels, base.image_size)
    ranges = tuple(split_timesteps(base.num_train_timesteps, settings.num_ranges))
    run = Run(out)
    _claim(run, config)
    write_json(run.manifest, _manifest(config, base, images))
    task = Task("pretrain", TimestepRange(0, base.num_train_timesteps), ranges)
    folder = out / "training"
    yield from train(base, images, config.data, task, settings, config.seed, folder)
    weights, _ = read_tensors(folder / "model.safetensors")
    export_pipeline(base, weights, out / "pipeline", "", {})
    yield Note(f"pipeline: {out / 'pipeline'}")


def merge_models(base: str, experts: list[Path], weights: list[float], out: Path) -> None:
    """Merge experts into a base by task arithmetic.

    Args:
        base: a pipeline (``out`` is then a pipeline folder) or a ``.safetensors`` file (``out`` is one).
        experts: expert folders of a run, pipeline folders, or ``.safetensors`` files.

    Raises:
        ValueError: the counts differ, a file is missing or damaged, or keys or shapes don't fit the base's.
    """
    if len(weights) != len(experts):
        raise ValueError(f"{len(weights)} weights for {len(experts)} experts, expected one each")
    single = Path(base).suffix == ".safetensors"
    if single != (out.suffix == ".safetensors"):
        raise ValueError(
            f"--out is {out}, expected a {'.safetensors file' if single else 'folder'}, as the base is one"
        )
    opened = None if single else load_base(base)
    start = read_tensors(Path(base))[0] if opened is None else opened.network.state_dict()
    loaded = [load_network(e) for e in experts]
    for expert, path in zip(loaded, experts, strict=True):
        check_same_keys(start, expert, str(path))
    merged = merge(start, loaded, weights)
    if opened is None:
        write_tensors(out, merged)
        return
    record = {
        "method": "linear",
        "weights": weights,
        "base": {"name": base, "sha256": opened.sha256},
        "experts_sha256": [tensors_sha256(e) for e in loaded],
        "merged_sha256": tensors_sha256(merged),
        "decouple_merge": __version__,
    }
    export_pipeline(opened, merged, out, model_card(record), record)


def _open_model(model: str, device: torch.device) -> tuple[Base, Denoiser]:
    """Open a pipeline, or the ensemble of a run folder."""
    settings = Sample()
    if (Path(model) / "config.yaml").exists():
        plan = prepare(load_config(Path(model) / "config.yaml"), Path(model))
        return plan.base, _denoiser_of(plan, "ensemble", device)
    base = load_base(model)
    if (Path(model) / PROJECTIONS_FILE).exists():
        network = new_network(base, "trunk")
        network.load_state_dict(load_network(Path(model)))
    else:
        network = base.network
    return base, denoiser(sampling_copy(network, settings, device))


def sample_model(model: str, out: Path, num_images: int, seed: int, num_steps: int, sampler: str) -> None:
    """Draw images from a pipeline, or from a run's ensemble, as ``<seed>.png``."""
    device = default_device()
    base, network = _open_model(model, device)
    settings = Sample(sampler=sampler, num_steps=num_steps)
    seeds = list(range(seed, seed + num_images))
    write_images(sample_images(network, base, seeds, settings, device), seeds, out)


def evaluate_model(
    model: str,
    reference: str,
    metrics: list[str],
    num_images: int,
    seed: int,
    out: Path,
    inception_weights: Path | None,
) -> Iterator[Event]:
    """Score a model, on images drawn on the fly, or images, against images or npz statistics.

    Raises:
        ValueError: a metric, the model, the images or the reference is wrong.
    """
    check_metrics(metrics, inception_weights)
    device, seeds, settings = default_device(), range(seed, seed + num_images), Sample()
    is_model = (Path(model) / "model_index.json").exists() or (Path(model) / "config.yaml").exists()
    for name in dict.fromkeys(METRICS[m] for m in metrics):
        extractor = load_extractor(name, device, inception_weights)
        if is_model:
            base, network = _open_model(model, device)
            batches = sample_images(network, base, seeds, settings, device)
            channels, size = base.channels, base.image_size
        else:
            images = open_images(model)
            channels, size = images[0].shape[0], images[0].shape[1]
            batches = (images.stack(b.tolist()) for b in torch.arange(len(images)).split(256))
            num_images = len(images)
        compared = _any_reference(reference, extractor, channels, size)
        for metric, value in score(batches, metrics, extractor, compared).items():
            record = {
                "model": model,
                "metric": metric,
                "value": value,
                "num_images": num_images,
                "seeds": [seed, seed + num_images - 1] if is_model else None,
                "extractor": extractor.label,
                "reference": compared.name,
                "sampler": settings.sampler if is_model else None,
                "num_steps": settings.num_steps if is_model else None,
                "git": _git_commit(),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            append_record(out, record)
            yield Note(f"{metric} {value:.6g} ({num_images} images against {compared.name}) → {out}")


def _any_reference(reference: str, extractor: Extractor, channels: int, size: int) -> Reference:
    path = Path(reference)
    if path.suffix == ".npz" and path.is_file() and "mu" in np.load(path, allow_pickle=False).files:
        return read_statistics(path, extractor.num_features)
    return make_reference(reference, load_images(Data(source=reference), channels, size), extractor)


def write_reference(images: str, out: Path, metric: str, inception_weights: Path | None) -> None:
    """Write the mean and covariance of a data set's features as an npz file."""
    check_metrics([metric], inception_weights)
    extractor = load_extractor(METRICS[metric], default_device(), inception_weights)
    write_statistics(make_reference(images, open_images(images), extractor), out)
