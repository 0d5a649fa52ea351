"""A study: many runs over one base, as one job. Its pieces are trainings and runs, which any executor does."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config import Config, Study, arm_configs, dump_study
from ..data.latents import Latents
from ..errors import UserError
from ..evaluation.records import identity_of
from ..executors import check_executor, run_all
from ..models.base import Base
from ..searching.trial import Trial
from ..storage.files import read_records, write_json, write_text
from ..storage.locks import enter, hold
from ..storage.outputs import RUN, check_output
from ..storage.run_folder import LOCKS
from ..storage.study_folder import StudyFolder
from ..training.made_from import is_finished
from ..training.records import StepRecord
from . import workflow
from .distilling import distil
from .given import write_given
from .located import located
from .manifest import check_owner
from .plan import check, prepare, with_layers
from .planned import BASELINE, Plan, Plans
from .provenance import check_stages
from .reported import report_models
from .results import wanted_records
from .selection import search_weights
from .sharing import evaluate_shared, train_shared, training_key
from .study_results import current_records, write_results
from .table_models import is_made
from .trainings import Training, trainings


@dataclass(frozen=True)
class Piece:
    """A piece of a study's work, for one process: one training of a run, or all else of it.

    Attributes:
        task: the name of the training; None is the rest, which also does the trainings that nobody has done.
    """

    name: str
    config: Config
    run: Path
    study: Path
    task: str | None

    def training(self, plan: Plan) -> Training:
        """Find the training among those of the piece's run."""
        return next(training for training in trainings(plan) if training[0].name == self.task)


@dataclass(frozen=True)
class Finished:
    """A run of a study has all its numbers."""

    name: str


@dataclass(frozen=True)
class Failed:
    """A piece of a run can't be done, such as a training whose loss is no number: others can."""

    name: str
    reason: str


def open_plans(study: Study, folder: StudyFolder) -> Plans:
    """Open and check every run of a study; computes and writes nothing.

    Raises:
        UserError: a run is wrong, as ``plan.check`` says, with the name of its arm; or the folder is not a study's.
    """
    check_executor(study.executor)
    out = folder.folder
    check_output(out, RUN, [study.config])
    found = [] if folder.config.exists() or not out.exists() else list(out.iterdir())
    if any(not p.name.startswith(".") and p.name != LOCKS for p in found):
        raise UserError(f"{out} is not empty and no study's (no study.yaml); give another --out")
    plans: Plans = {}
    # A base may be large, and arms that begin with the same one read it alone.
    bases: dict[str, Base] = {}
    for (arm, seed), config in arm_configs(study).items():
        run = folder.run(arm, seed)
        try:
            if seed == study.seeds[0]:
                finetune = config.finetune
                key = repr((located(config).base, finetune.experts == "denoisers", finetune.density))
                plans[arm, seed] = check(config, run.folder, bases.get(key))
                bases[key] = plans[arm, seed].base
            else:
                # The arm's runs differ in the seed alone.
                first = plans[arm, study.seeds[0]]
                config = with_layers(located(config), first.base)
                check_owner(run, config, [config.base, config.data.source])
                plans[arm, seed] = dataclasses.replace(first, config=config, run=run)
            check_stages(plans[arm, seed])
        except UserError as error:
            raise UserError(f"arm {arm}: {error}") from error
    return plans


def is_complete(plan: Plan) -> bool:
    """Say whether a run has its models, all numbers of them as they are now, and figures."""
    models = report_models(plan)
    is_trained = all(is_finished(folder) for *_, folder in trainings(plan))
    if not (is_trained and all(is_made(plan, model) for model in models) and plan.run.sample_figure.exists()):
        return False
    done = {identity_of(r) for r in read_records(plan.run.metrics, seeds=list)}
    return all(identity_of(r) in done for r in wanted_records(plan, models))


def pieces(plans: Plans, folder: StudyFolder) -> list[Piece]:
    """List the work that is left, arm by arm: first an arm's trainings, each once in the study, then its runs."""
    found, known = [], set[str]()
    for arm in dict.fromkeys(arm for arm, _ in plans):
        of_arm = {f"{arm}-{seed}": plan for (a, seed), plan in plans.items() if a == arm and not is_complete(plan)}
        for name, plan in of_arm.items():
            for task, settings, place in trainings(plan):
                key = training_key(plan, task, settings)
                if key not in known and not is_finished(place) and not is_finished(folder.training(key)):
                    known.add(key)
                    found.append(Piece(name, plan.config, plan.run.folder, folder.folder, task.name))
        found += [Piece(name, plan.config, plan.run.folder, folder.folder, None) for name, plan in of_arm.items()]
    return found


def run_study(study: Study, out: Path, wait: bool = False) -> Iterator[str | StepRecord]:
    """Do every run of a study; what is finished already is not done again. The tables grow with every run.

    Raises:
        UserError: as ``open_plans``, before anything is computed; another process works on the folder; or, after all
            that could be done, some runs have failed.
    """
    folder, failed = StudyFolder(out), dict[str, str]()
    plans = open_plans(study, folder)
    yield from enter(folder.lock("study"), wait)
    with hold(folder.lock("study"), "deme study", wait):
        write_text(folder.config, dump_study(study))
        write_json(folder.work, {"runs": [plan.run.folder.name for plan in plans.values()]})
        for plan in plans.values():
            if isinstance(plan.images, Latents):
                yield from plan.images.fill()
        left = pieces(plans, folder)
        places = {plan.run.folder.name: place for place, plan in plans.items()}
        # What tells whether a record is current takes hashes of whole models, so a run is asked once it has changed.
        records = {place: current_records(plan) for place, plan in plans.items()}
        num_trainings = sum(piece.task is not None for piece in left)
        yield f"study: {num_trainings} trainings and {len(left) - num_trainings} of {len(plans)} runs are left"
        for event in run_all(_work, [(piece,) for piece in left], *study.where, folder=out):
            if isinstance(event, Finished):
                place = places[event.name]
                records[place] = current_records(plans[place])
                write_results(study, plans, records, folder)
                yield f"{event.name}: finished"
            elif isinstance(event, Failed):
                failed[event.name] = event.reason
                yield f"{event.name}: failed: {event.reason}"
            else:
                yield event
        yield write_results(study, plans, records, folder)
        yield f"tables: {folder.results('md')}"
        # Whoever mended the cause of an earlier failure of the piece has the run.
        if still := {name: reason for name, reason in failed.items() if not is_complete(plans[places[name]])}:
            told = "; ".join(f"{name}: {reason}" for name, reason in still.items())
            raise UserError(f"{len(still)} of {len(plans)} runs failed, and all others are done. {told}")


def _work(piece: Piece) -> Iterator[str | StepRecord | Finished | Failed]:
    try:
        yield from _told(piece)
    except UserError as error:
        yield Failed(piece.name, str(error))


def _told(piece: Piece) -> Iterator[str | StepRecord | Finished]:
    folder, plan = StudyFolder(piece.study), prepare(piece.config, piece.run)
    for event in _events(piece, plan, folder):
        if isinstance(event, StepRecord):
            yield dataclasses.replace(event, name=f"{piece.name}/{event.name}")
        elif isinstance(event, str):
            yield f"{piece.name}: {event}"
        elif isinstance(event, Trial) and event.level != "screen":
            yield f"{piece.name}: {event.level} {event.number}: {event.value:.4g}"
        # All other numbers are in the tables.
    if piece.task is None:
        yield Finished(piece.name)


def _events(piece: Piece, plan: Plan, folder: StudyFolder) -> Iterator[workflow.Event]:
    every = trainings(plan)
    if piece.task is not None:
        yield from train_shared(plan, piece.training(plan), folder)
        return
    with hold(plan.run.lock("run"), "deme study", wait=True):
        over = plan.config.search.over
        if plan.config.finetune.experts == "denoisers":
            yield from write_given(plan)
        # The baseline takes as long as all experts together; until the report nobody else waits for it.
        for training in every:
            if training[0].name != BASELINE or over.startswith("baseline"):
                yield from train_shared(plan, training, folder)
        if over != "nothing":
            yield from search_weights(plan)
            yield from distil(plan)
        for training in every:
            yield from train_shared(plan, training, folder)
        yield from evaluate_shared(plan, folder)
        yield from workflow.report(plan)
        yield from workflow.copy_results(plan)
