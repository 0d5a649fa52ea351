"""The numbers of a run: every model of the table on every set of report seeds."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..config import Config
from ..evaluation.extractors import EXTRACTORS, load_extractor, weights_of
from ..evaluation.metrics import METRICS, extractors_of
from ..evaluation.records import make_record
from ..evaluation.references import Compared, names_of, text_reference
from ..evaluation.score import score
from ..executors import run_all
from ..executors.devices import default_device
from ..merging.arithmetic import Tensors
from ..models.network import build_network, load_network, num_parameters
from ..sampling.folder import write_images
from ..sampling.sampler import Denoiser, denoiser, sample_images, sampling_copy, sampling_fields
from ..storage.files import append_record, read_records, read_tensors
from .plan import BASELINE, Plan, load_experts
from .watch import reported_with


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


def report_models(plan: Plan) -> list[str]:
    """List the models of the result table; the ensemble of a base's own denoisers is the pretrained model."""
    over, is_trained = plan.config.search.over, plan.config.finetune.experts == "trained"
    models = {
        "pretrained": is_trained,
        BASELINE: is_trained and plan.config.finetune.baseline,
        "ensemble": over == "experts",
        "merged": over != "nothing",
    }
    return [name for name, is_made in models.items() if is_made]


def _weights_of(plan: Plan, model: str) -> Tensors:
    if model == "pretrained":
        return plan.base.network.state_dict()
    if model == BASELINE:
        return read_tensors(plan.run.baseline(BASELINE) / "model.safetensors")[0]
    return load_network(plan.run.merged)


def denoiser_of(plan: Plan, model: str, device: torch.device) -> Denoiser:
    if model == "ensemble":
        return plan.ensemble(load_experts(plan), device)
    network = build_network(plan.base, _weights_of(plan, model))
    return denoiser(plan.base, sampling_copy(network, plan.config.sample, device))


def _seed_set(config: Config, index: int) -> range:
    first = config.evaluate.first_seed + index * config.evaluate.num_images
    return range(first, first + config.evaluate.num_images)


def _evaluate_model(plan: Plan, model: str, seeds: range, metrics: list[str]) -> Iterator[dict[str, Any]]:
    """Score one model on one set of seeds; the images are drawn once for all metrics."""
    config, device = plan.config, default_device()
    prompts = plan.open_prompts(device)
    compared: dict[str, Compared] = {}
    for name in extractors_of(metrics):
        if EXTRACTORS[name].reads_texts:
            assert prompts is not None
            extractor = load_extractor(name, device, weights_of(name, config.evaluate))
            compared[name] = extractor, text_reference(prompts.prompts, prompts.choose(seeds), extractor)
        else:
            compared[name] = reported_with(plan, name)
    batches = sample_images(denoiser_of(plan, model, device), plan.base, seeds, config.sample, device, prompts=prompts)
    drawn = sampling_fields(plan.base, config.sample, prompts.label if prompts else None)
    for metric, value in score(batches, metrics, list(compared.values())).items():
        used = names_of(metric, compared[METRICS[metric].extractor])
        yield make_record(model, metric, value, len(seeds), seeds, used | drawn)


def evaluate_models(plan: Plan, models: list[str]) -> Iterator[dict[str, Any]]:
    """Score models on every set of report seeds; yields the records that were missing, which are then in the run's."""
    config = plan.config
    done = {
        (r["model"], r["metric"], r["seeds"][0])
        for r in read_records(plan.run.metrics, model=str, metric=str, seeds=list)
    }
    calls: list[tuple[Any, ...]] = []
    for index in range(config.evaluate.num_seed_sets):
        seeds = _seed_set(config, index)
        for model in models:
            missing = [m for m in config.evaluate.metrics if (model, m, seeds.start) not in done]
            if missing:
                calls.append((plan, model, seeds, missing))
    # Cached before several processes ask for it at once.
    for name in extractors_of([m for *_, missing in calls for m in missing]):
        if not EXTRACTORS[name].reads_texts:
            reported_with(plan, name)
    for record in run_all(_evaluate_model, calls, config.num_processes, config.executor):
        append_record(plan.run.metrics, record)
        yield record


def evaluate_run(plan: Plan) -> Iterator[dict[str, Any] | Row]:
    """Score every model of the result table on every set of report seeds; yields the table's rows."""
    yield from evaluate_models(plan, report_models(plan))
    for model in report_models(plan):
        _write_samples(plan, model, default_device())
    yield from result_table(plan)


def _write_samples(plan: Plan, model: str, device: torch.device) -> None:
    first = plan.config.evaluate.first_seed
    seeds = [
        s
        for s in range(first, first + plan.config.evaluate.num_sample_images)
        if not (plan.run.samples(model) / f"{s}.png").exists()
    ]
    if seeds:
        network, prompts = denoiser_of(plan, model, device), plan.open_prompts(device)
        drawn = sample_images(network, plan.base, seeds, plan.config.sample, device, prompts=prompts)
        write_images(drawn, seeds, plan.run.samples(model))


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
