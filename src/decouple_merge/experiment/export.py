"""A run's merged model on disk: a pipeline with the record of how it was made, and a LoRA where it is one."""

from typing import Any

from ..config import Merge
from ..merging.card import Usage, model_card
from ..merging.merger import Merger
from ..merging.record import merge_record
from ..merging.rules import RULES
from ..merging.usage import inherited
from ..models.export import export_pipeline
from ..models.lora import FILE, merge_factors
from ..searching.candidates import parted
from ..searching.trial import Level, Trial
from ..storage.files import read_tensors, write_tensors
from ..storage.hub import pipeline_folder
from ..storage.made_from import digest_of
from ..storage.reading import AGAIN, read_record
from ..storage.tensors import TensorFiles
from .combined import are_adapters, combined_names
from .planned import Plan
from .provenance import search_record
from .rule_inputs import rule_files, rule_records


def export_merge(plan: Plan, merger: Merger, experts_sha256: list[str], level: Level, winner: Trial) -> dict[str, Any]:
    """Write the merged model with its record, unless it is there; returns the record.

    A change that half precision loses is told and not refused: the candidates were scored as they are written.
    """
    delta = merger.survival(winner.weights)
    record = export_record(plan, experts_sha256, level, winner) | ({"delta": delta} if delta else {})
    written = plan.run.merged / "merge.json"
    if written.exists() and read_record(written, AGAIN) == record:
        return record
    if _is_one_lora(plan):
        factors = [read_tensors(plan.run.expert(i) / "lora" / FILE)[0] for i in range(len(plan.ranges))]
        write_tensors(plan.run.merged_lora / FILE, merge_factors(factors, winner.weights))
    kept = inherited(pipeline_folder(plan.config.base), record["base"]["name"])
    card = model_card(record, Usage(*plan.base.family.usage(plan.base.encoders)), kept)
    export_pipeline(plan.base, merger.merge(winner.weights), plan.run.merged, card, record)
    return record


def export_record(plan: Plan, experts_sha256: list[str], level: Level, winner: Trial) -> dict[str, Any]:
    """Say how a run's merged model was made. Nothing in it depends on when: equal runs write equal bytes."""
    search = plan.config.search
    weights, tuned = parted(winner.weights, search)
    num = len(weights) // len(search.blocks)
    rows = [weights[i : i + num] for i in range(0, len(weights), num)]
    blocks = dict(zip(search.blocks[:-1], rows[:-1], strict=True))
    return merge_record(
        Merge(**_rule_of(plan) | tuned, weights=rows[-1], blocks=blocks, min_delta_cosine=-1),
        {"name": plan.config.base, "sha256": plan.base.sha256},
        # Experts from where the record lies: a run may be moved, and its base stays where it is.
        combined_names(plan),
        experts_sha256,
        [[r.low, r.high] for r in plan.ranges] if search.combines_experts else None,
        merged_sha256=winner.merged_sha256,
        search={
            "strategy": search.strategy,
            "metric": search.metric,
            "value": winner.value,
            "num_images": len(level.seeds),
            "seeds": [level.seeds.start, level.seeds.stop - 1],
            "made_from": digest_of(search_record(plan, experts_sha256, rule_records(plan))),
        },
        **_statistics(plan),
        **({"text": plan.config.text.model_dump(mode="json")} if plan.prompts else {}),
        pipeline=type(plan.base.pipeline).__name__,
        projection=plan.config.finetune.projection.placement if search.over == "experts" else "none",
    )


def _statistics(plan: Plan) -> dict[str, Any]:
    """Hash the files that the rule needs beside the experts, if it needs any."""
    found = [TensorFiles([path]).sha256() for files in rule_files(plan).values() for path in files]
    return {"statistics_sha256": found} if found else {}


def _rule_of(plan: Plan) -> dict[str, Any]:
    search = plan.config.search
    files = {need: [f"../{p.relative_to(plan.run.folder)}" for p in each] for need, each in rule_files(plan).items()}
    # A config may be another method's but for the method's name; what this one doesn't read isn't how it merged.
    read = {k: v for k, v in search.rule_settings().items() if k in RULES[search.method].params}
    return {"method": search.method, "seed": search.seed, **read, **files}


def _is_one_lora(plan: Plan) -> bool:
    """Say whether the merge is a sum of adapters, each with one weight: an adapter itself."""
    return plan.config.search.method == "linear" and len(plan.config.search.blocks) == 1 and are_adapters(plan.config)
