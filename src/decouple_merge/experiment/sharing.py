"""What the runs of a study have in common: a training and the numbers of a model, done once and linked or copied."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Finetune
from ..evaluation.records import identity_of
from ..models.identity import base_parts
from ..storage.files import atomic_path, read_records, write_records
from ..storage.locks import hold, is_held
from ..storage.made_from import digest_of
from ..storage.study_folder import StudyFolder
from ..training.made_from import is_finished, training_record
from ..training.records import StepRecord
from ..training.trainer import Task
from .planned import BASELINE, Plan
from .reported import report_models, report_references
from .results import evaluate_models, wanted_records
from .trainings import Training, trainings
from .watch import train_watched

Record = dict[str, Any]


def training_key(plan: Plan, task: Task, settings: Finetune) -> str:
    """Hash all that the result of a training depends on, its log included."""
    config = plan.config
    record = training_record(plan.base, plan.images, config.data, task, settings, config.seed)
    if settings.distance is not None:
        watched = [_plain(config.sample), _plain(config.evaluate), list(config.distance_seeds), plan.prompts_label]
        record |= {"watched": watched}
    return digest_of(record)


def drawing_key(plan: Plan, model: str) -> str | None:
    """Hash all that the numbers of a model depend on; None where no other run is known to have the same model."""
    every = trainings(plan)
    made_of: dict[str, list[Training]] = {
        "pretrained": [],
        BASELINE: [t for t in every if t[0].name == BASELINE],
        "ensemble": [t for t in every if t[0].name != BASELINE],
    }
    if model not in made_of:
        return None
    _, references = report_references(plan.config, plan.base, plan.references)
    return digest_of(
        {
            "base": base_parts(plan.base),
            "prompts": plan.prompts_label,
            "model": model,
            "trainings": [training_key(plan, task, settings) for task, settings, _ in made_of[model]],
            "sample": _plain(plan.config.sample, "batch_size"),
            "evaluate": _plain(plan.config.evaluate, "metrics", "num_seed_sets", "num_sample_images"),
            "reference": references.sha256,
        }
    )


def _plain(section: Any, *excluded: str) -> Record:
    return section.model_dump(mode="json", exclude=set(excluded))


def train_shared(plan: Plan, training: Training, study: StudyFolder) -> Iterator[StepRecord]:
    """Do a run's training where no run of the study has done the same, and link its files into the run's folder.

    Another process that does the same just now is waited for.
    """
    task, settings, folder = training
    if is_finished(folder):
        return
    key = training_key(plan, task, settings)
    place = study.training(key)
    # Of the run, too: no other verb trains the same beside, and ``deme status`` sees who does.
    with hold(plan.run.lock(task.name), "deme study", wait=True):
        if is_finished(folder):
            return
        with hold(study.lock(key), f"deme study: {plan.run.folder.name}/{task.name}", wait=True):
            if not is_finished(place):
                yield from train_watched(plan, task, settings, place)
        with atomic_path(folder) as temporary:
            shutil.copytree(place, temporary, copy_function=_link, ignore=shutil.ignore_patterns("state", ".deme-*"))


def _link(source: str, target: str) -> None:
    try:
        os.link(Path(source).resolve(), target)
    except OSError:  # Not all file systems have links.
        shutil.copy2(source, target)


def evaluate_shared(plan: Plan, study: StudyFolder) -> Iterator[Record]:
    """Score those models of a run that other runs of the study have too, where none of these has; yields records."""
    keys = {model: key for model in report_models(plan) if (key := drawing_key(plan, model)) is not None}
    # What another run is scoring just now is asked for last: by then it may be there.
    for model in sorted(keys, key=lambda model: is_held(study.lock(keys[model]))):
        key = keys[model]
        shared = study.records(key)
        with hold(study.lock(key), f"deme study: {plan.run.folder.name}, images of {model}", wait=True):
            own = read_records(plan.run.metrics)
            write_records(plan.run.metrics, _joined(own, read_records(shared)))
            yield from evaluate_models(plan, wanted_records(plan, [model]))
            write_records(shared, _joined(read_records(shared), _of(model, read_records(plan.run.metrics))))


def _joined(own: list[Record], others: list[Record]) -> list[Record]:
    known = {identity_of(r) for r in own}
    return own + [r for r in others if identity_of(r) not in known]


def _of(model: str, records: list[Record]) -> list[Record]:
    return [r for r in records if r["model"] == model]
