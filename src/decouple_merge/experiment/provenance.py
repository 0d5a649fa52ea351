"""What the stages of a run were made from, and whether they would be made from the same now."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import UserError
from ..evaluation.extractors import label_of, weights_of
from ..evaluation.metrics import METRICS
from ..models.base import tensors_sha256
from ..models.identity import base_parts
from ..models.network import load_network
from ..models.schedulers import sampler_of
from ..storage.files import write_json
from ..storage.made_from import MadeFrom, differences, digest_of, plain, told
from ..storage.reading import read_record
from ..training.made_from import changes_of, data_parts, settings_parts, training_record
from .planned import Plan
from .trainings import distilled_training, expert_training, trainings

SEARCH, MERGED = "search", "merged"
# Settings of the search that say where it runs, or what its other entries say.
UNSEEN = {"checkpoints", "num_final_images"}
# What a distilled model is made from besides, which is known once it is merged.
FROM_MERGE = ("merged_sha256", "experts_sha256")


def made_from(stage: str, plan: Plan) -> MadeFrom:
    """Say what a stage of a run would be made from now: base, data, its own settings, and what it is measured with.

    Args:
        stage: the name of its folder in the run's: ``experts/0``, ``baselines/baseline-finetuned``, ``search``.
    """
    return _search(plan) if stage == SEARCH else trainings_made_from(plan)[stage]


def trainings_made_from(plan: Plan) -> dict[str, MadeFrom]:
    """Say it of every training that the run may hold, whether the config asks for it or not."""
    config = plan.config
    if config.finetune.experts == "denoisers":
        return _given(plan)
    experts = [expert_training(plan, index) for index in range(len(plan.ranges))]
    return {
        _name(plan, folder): training_record(plan.base, plan.images, config.data, task, settings, config.seed)
        for task, settings, folder in [*experts, *trainings(plan)]
    }


def _given(plan: Plan) -> dict[str, MadeFrom]:
    """Say it of experts that are the base's own denoisers."""
    turns = plan.base.family.turns(plan.base.pipeline)
    return {
        f"experts/{index}": plain(
            {
                "base_sha256": plan.base.sha256,
                "base": base_parts(plan.base),
                "name": name,
                "own": asdict(own),
                "ranges": [asdict(each) for each in turns.values()],
            }
        )
        for index, (name, own) in enumerate(turns.items())
    }


def _name(plan: Plan, folder: Path) -> str:
    return folder.relative_to(plan.run.folder).as_posix()


def _search(plan: Plan) -> MadeFrom:
    config, final = plan.config, plan.config.final_seeds if plan.config.search.num_finalists else range(0)
    extractor = METRICS[config.search.metric].extractor
    return plain(
        {
            "base": base_parts(plan.base),
            "data": data_parts(plan.images, config.data),
            "seed": config.seed,
            "finetune": settings_parts(config.finetune),
            "ranges": [[r.low, r.high] for r in plan.ranges],
            "search": config.search.model_dump(mode="json", exclude=UNSEEN)
            | {"final_seeds": [final.start, final.stop]},
            "sample": config.sample.model_dump(mode="json", exclude={"batch_size", "one_resident"})
            | {"sampler": sampler_of(plan.base, config.sample.sampler)},
            "prompts": plan.prompts_label,
            "extractor": label_of(extractor, weights_of(extractor, config.evaluate)),
            "num_reference_images": config.evaluate.num_reference_images,
        }
    )


def check_stages(plan: Plan) -> None:
    """Require that all that a run holds was made from what it would be made from now; computes nothing.

    A stage that isn't begun, or that the config no longer asks for, is not looked at. Neither is what the weights of
    experts are, which ``begin_search`` compares.

    Raises:
        UserError: a stage was made from something else: what differs is named, with what to remove.
    """
    changed = dict(_changed(plan))
    if changed:
        _refuse(plan, changed)


def _changed(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    now = trainings_made_from(plan)
    for stage in now:
        if found := changes_of(plan.run.folder / stage, now[stage]):
            yield stage, found
    if (distilled := distilled_training(plan)) is not None:
        task, settings, folder = distilled
        record = training_record(plan.base, plan.images, plan.config.data, task, settings, plan.config.seed)
        if found := changes_of(folder, record, FROM_MERGE):
            yield _name(plan, folder), found
    for folder in sorted((plan.run.folder / "experts").glob("[0-9]*")):
        if (stage := _name(plan, folder)) not in now:
            yield stage, [f"the number of ranges was more than {folder.name} and is {len(plan.ranges)}"]
    if plan.run.search.exists():
        old = {key: value for key, value in _read_search(plan).items() if key not in ("experts_sha256", "rule")}
        if found := differences(old, _search(plan)):
            yield SEARCH, found


def search_record(plan: Plan, experts_sha256: Sequence[str], rule: Sequence[str]) -> MadeFrom:
    """Say what a run's search is made from, with the hashes of what it combines and records of what its rule reads."""
    return _search(plan) | {"experts_sha256": list(experts_sha256)} | ({"rule": list(rule)} if rule else {})


def check_search(plan: Plan, experts_sha256: Sequence[str]) -> None:
    """Require that what is there of a search is of the same, but for what its rule reads of the experts.

    Raises:
        UserError: as ``begin_search``.
    """
    if plan.run.search.exists():
        old = {key: value for key, value in _read_search(plan).items() if key != "rule"}
        if found := differences(old, search_record(plan, experts_sha256, [])):
            _refuse(plan, {SEARCH: found})


def begin_search(plan: Plan, experts_sha256: Sequence[str], rule: Sequence[str]) -> None:
    """Write what a search is made from; what is there of it, and of its merged model, has to be of the same.

    Args:
        rule: the records of what its rule reads of the experts.

    Raises:
        UserError: it isn't; what differs is named, with what to remove.
    """
    now = search_record(plan, experts_sha256, rule)
    if plan.run.search.exists() and (found := differences(_read_search(plan), now)):
        _refuse(plan, {SEARCH: found})
    if found := list(_changes_of_merged(plan.run.merged, digest_of(now))):
        _refuse(plan, {MERGED: found})
    if not plan.run.search.exists():
        write_json(plan.run.search, now)


def _read_search(plan: Plan) -> MadeFrom:
    return read_record(plan.run.search, f"remove {plan.run.search.parent} to search anew")


def _changes_of_merged(folder: Path, search: str) -> Iterator[str]:
    """Name what tells a merged model from what a search, by the digest of its record, has written."""
    if not folder.exists():
        return
    path = folder / "merge.json"
    record = read_record(path, f"remove {folder} to have it made again") if path.exists() else {}
    yield from differences({"search": (record.get("search") or {}).get("made_from")}, {"search": search})
    yield from differences(
        {"the hash of its weights": record.get("merged_sha256")},
        {"the hash of its weights": tensors_sha256(load_network(folder))},
    )


def _refuse(plan: Plan, changed: dict[str, list[str]]) -> None:
    first, found = next(iter(changed.items()))
    stages = list(changed)
    if SEARCH in changed:
        stages += [folder.name for folder in (plan.run.merged, plan.run.merged_lora) if folder.exists()]
    raise UserError(
        f"{plan.run.folder / first} was made from something else: {told(found)}; put that back, or remove "
        f"{', '.join(stages)} of {plan.run.folder} to make them anew, or take another folder"
    )
