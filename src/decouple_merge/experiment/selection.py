"""The choice of a run's merge: its search, led by one process and helped by others, and the export of the best."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import __version__
from ..analysis.figures import search_cost, search_surfaces
from ..config import Merge
from ..data.batches import held_out_images, training_batches
from ..executors.devices import default_device
from ..executors.local import run_all
from ..merging.arithmetic import Tensors
from ..merging.card import model_card
from ..models.base import export_pipeline, tensors_sha256
from ..models.lora import FILE, merge_factors
from ..searching.checkpoints import load_checkpoints
from ..searching.learned import DenoisingLoss, learn_weights
from ..searching.levels import fixed_candidates, levels, ranked, search, work
from ..searching.objective import Objective
from ..searching.strategies import Weights
from ..searching.study import Level, Study, Trial, open_storage, open_study, trials
from ..seeds import stream_seed
from ..storage.files import read_tensors, remove_leftovers, write_json, write_records, write_tensors
from ..training.trainer import validation_losses
from .plan import Plan, load_experts

Event = str | Trial
OpenLevel = Callable[[str], Study]


def load_combined(plan: Plan) -> list[Tensors]:
    """Read what the search combines: the checkpoints that the config lists, or the run's experts."""
    return load_checkpoints(plan.config.search, plan.base) or load_experts(plan)


def search_weights(plan: Plan) -> Iterator[Event]:
    """Search the merging weights of a run's experts; leaves the studies and the best model in the run folder.

    The best merge so far is always on disk. ``num_processes`` of the config evaluate candidates side by side, and any
    number of ``deme search RUN --worker`` with them.

    Raises:
        ValueError: an expert or checkpoint is missing or doesn't fit, a start point or frozen weight belongs to no
            expert, or the storage doesn't open.
    """
    hashes = _hashes(load_combined(plan))
    first = level_opener(plan, hashes)("screen")
    # Whoever helps waits for candidates; nobody need wait for a search that is finished.
    num = 1 if first.user_attrs.get("finished") else plan.config.num_processes
    yield from run_all(_lead_or_help, [(plan, hashes, i == 0) for i in range(num)], num)


def help_search(plan: Plan) -> Iterator[Trial]:
    """Evaluate the candidates of a search that runs elsewhere, until it is finished.

    Raises:
        ValueError: as ``search_weights``.
    """
    experts = load_combined(plan)
    yield from work(level_opener(plan, _hashes(experts)), plan.config, len(experts), Objective(plan, experts))


def _hashes(experts: list[Tensors]) -> list[str]:
    return [tensors_sha256(e) for e in experts]


def level_opener(plan: Plan, hashes: list[str]) -> OpenLevel:
    """Connect to a run's study storage; the function that it returns opens the study of a level.

    A study's name has the hash of all that a candidate's value depends on, so that several runs may share a server.
    """
    settings = plan.config.search
    if settings.storage is None:
        plan.run.study.parent.mkdir(parents=True, exist_ok=True)
    storage = open_storage(settings.storage or f"sqlite:///{plan.run.study.resolve()}")
    parts = [settings.model_dump_json(exclude={"storage"}), plan.config.sample.model_dump_json(), plan.base.sha256]
    parts += [str(plan.config.seed), plan.images.sha256, *hashes]
    if plan.prompts:
        parts += [plan.config.text.model_dump_json(), *plan.prompts]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return lambda level: open_study(storage, f"{digest}-{level}")


def _lead_or_help(plan: Plan, hashes: list[str], is_leader: bool) -> Iterator[Event]:
    if is_leader:
        yield from _lead(plan, hashes)
    else:
        for _ in help_search(plan):
            pass


def _lead(plan: Plan, hashes: list[str]) -> Iterator[Event]:
    experts = load_combined(plan)
    objective, open_level = Objective(plan, experts), level_opener(plan, hashes)
    every = levels(plan.config, len(experts))

    def done() -> list[list[Trial]]:
        return [trials(open_level(level.name)) for level in every]

    num_left = sum((lv.num_candidates - len(found)) * len(lv.seeds) for lv, found in zip(every, done(), strict=True))
    if num_left > 0 and not plan.run.merged.exists():
        plan_line = ", ".join(f"{lv.name} {lv.num_candidates} x {len(lv.seeds)} images" for lv in every)
        seconds = sum(objective.seconds_per_image(lv) * lv.num_images for lv in every)
        yield f"search: {plan_line}; about {seconds / 60:.0f} min on one worker"
    learned = learn_start(plan, objective, hashes) if plan.config.search.gradient_batches else None
    for trial in search(open_level, plan.config, len(experts), objective, learned):
        found = done()
        _write_trials(plan, every, found)
        if trial.level == "screen" and ranked(found[0], plan.config.search.frozen)[:1] == [trial]:
            _export(plan, objective, hashes, every[0], trial)
        yield trial
    found = done()
    _write_trials(plan, every, found)
    winner = ranked(found[-1], plan.config.search.frozen)[0]
    _export(plan, objective, hashes, every[-1], winner)
    metric = plan.config.search.metric
    search_cost(list(zip(every, found, strict=True)), metric, plan.run.search_figure("cost"))
    search_surfaces(found[0], metric, plan.run.search_figure("surfaces"))
    yield from _write_candidates(plan, objective, every[0], found[0])
    if plan.config.search.num_finalists:
        yield f"best on {len(every[-1].seeds)} fresh seeds: {winner.value:.5g}"


def learn_start(plan: Plan, objective: Objective, hashes: list[str]) -> Weights:
    """Learn weights to start with by the gradient of the denoising loss, once in a run.

    The loss is divided by the square root of the base's own on each range. By the plain loss the cleanest timesteps
    decide alone, and the merges it likes best draw worse images than the base (docs/lab-notes.md).
    """
    path, config, experts = plan.run.learned, plan.config, objective.experts
    record = {"num_batches": config.search.gradient_batches, "experts_sha256": hashes}
    record |= {"blocks": config.search.blocks}
    if path.exists() and (found := json.loads(path.read_text())) | record == found:
        return tuple(found["weights"])
    seed = stream_seed(config.seed, "merging weights")
    num = config.search.gradient_batches
    batches = training_batches(plan.images, config.data, config.finetune.batch_size, seed, 0, num)
    blocks, low, high = config.search.blocks, config.search.low, config.search.high
    start = torch.full((len(blocks), len(experts)), min(max(1 / len(experts), low), high))
    loss_of = DenoisingLoss(plan.base, experts, default_device(), blocks, _loss_scale(plan), objective.stacked)
    *_, last = learn_weights(loss_of, batches, start, num, seed, (low, high))
    weights = [w for row in last.weights for w in row]
    write_json(path, record | {"weights": weights})
    return tuple(weights)


def _loss_scale(plan: Plan) -> Float[Tensor, " T"]:
    """Compute one over the square root of the base's loss on the range of each timestep."""
    base, device = plan.base, default_device()
    network = copy.deepcopy(base.network).to(device).eval()
    losses = validation_losses(network, held_out_images(plan.images, plan.config.data), base, plan.ranges, device)
    scale = torch.zeros(base.num_train_timesteps)
    for own, loss in zip(plan.ranges, losses, strict=True):
        scale[own.low : own.high] = loss**-0.5
    return scale


def merge_record(plan: Plan, experts_sha256: list[str], level: Level, winner: Trial) -> dict[str, Any]:
    """Say how a run's merged model was made. Nothing in it depends on when: equal runs write equal bytes."""
    blocks = plan.config.search.blocks
    num = len(winner.weights) // len(blocks)
    rows = [list(winner.weights[i * num : (i + 1) * num]) for i in range(len(blocks))]
    merge = Merge(
        method=plan.config.search.method,
        density=plan.config.search.density,
        weights=rows[-1],
        blocks=dict(zip(blocks[:-1], rows[:-1], strict=True)),
    )
    return {
        "method": merge.method,
        "weights": merge.weights,
        "settings": merge.model_dump(mode="json"),
        "ranges": None if plan.config.search.checkpoints else [[r.low, r.high] for r in plan.ranges],
        "base": {"name": plan.config.base, "sha256": plan.base.sha256},
        # From where this record lies, so that a run may be moved.
        "experts": plan.config.search.checkpoints or [f"../experts/{i}" for i in range(num)],
        "experts_sha256": experts_sha256,
        "merged_sha256": winner.merged_sha256,
        "search": {
            "strategy": plan.config.search.strategy,
            "metric": plan.config.search.metric,
            "value": winner.value,
            "num_images": len(level.seeds),
            "seeds": [level.seeds.start, level.seeds.stop - 1],
        },
        **({"text": plan.config.text.model_dump(mode="json")} if plan.prompts else {}),
        "pipeline": type(plan.base.pipeline).__name__,
        "projection": plan.config.finetune.projection.placement,
        "decouple_merge": __version__,
    }


def _export(plan: Plan, objective: Objective, hashes: list[str], level: Level, winner: Trial) -> None:
    """Write the merged model with its record, unless it is there."""
    remove_leftovers(plan.run.merged)
    record = merge_record(plan, hashes, level, winner)
    written = plan.run.merged / "merge.json"
    if not written.exists() or json.loads(written.read_text()) != record:
        if _is_one_lora(plan):
            factors = [read_tensors(plan.run.expert(i) / "lora" / FILE)[0] for i in range(len(plan.ranges))]
            write_tensors(plan.run.merged_lora / FILE, merge_factors(factors, winner.weights))
        export_pipeline(plan.base, objective.merge(winner.weights), plan.run.merged, model_card(record), record)


def _is_one_lora(plan: Plan) -> bool:
    """Say whether the merge is a sum of adapters, each with one weight: an adapter itself."""
    search = plan.config.search
    sums = search.method == "linear" and len(search.blocks) == 1 and not search.checkpoints
    return sums and plan.config.finetune.lora is not None


def _write_candidates(plan: Plan, objective: Objective, screen: Level, done: list[Trial]) -> Iterator[str]:
    """Report the candidates everyone asks for, as screened: base, uniform, sum of all, ensemble, best."""
    if not plan.run.candidates.exists():
        values = {t.weights: t.value for t in done}
        num_blocks = len(plan.config.search.blocks)
        fixed = fixed_candidates(len(done[0].weights) // num_blocks)
        table = {n: values[w * num_blocks] for n, w in zip(("pretrained", "uniform", "sum"), fixed, strict=False)}
        if not plan.config.search.checkpoints:
            table["ensemble"] = objective.score_ensemble(screen)
        table["best"] = ranked(done, plan.config.search.frozen)[0].value
        write_json(plan.run.candidates, {"metric": plan.config.search.metric, **table})
    found = json.loads(plan.run.candidates.read_text())
    yield f"on the search seeds, {found.pop('metric')}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items())


def _write_trials(plan: Plan, every: list[Level], found: list[list[Trial]]) -> None:
    records: list[dict[str, Any]] = []
    for level, done in zip(every, found, strict=True):
        extra = {
            "num_images": len(level.seeds),
            "num_steps": level.num_steps or plan.config.sample.num_steps,
            "seeds": [level.seeds.start, level.seeds.stop - 1],
            "metric": plan.config.search.metric,
        }
        records += [asdict(t) | extra for t in done]
    write_records(plan.run.trials, records)
