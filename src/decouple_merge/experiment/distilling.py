"""The merged model of a run pulled towards its experts: what the ensemble knows, in one network."""

import shutil
from collections.abc import Iterator

from ..errors import UserError
from ..merging.card import Usage, model_card
from ..merging.usage import inherited
from ..models.export import export_pipeline
from ..models.network import load_network
from ..storage.files import read_tensors
from ..storage.hub import pipeline_folder
from ..storage.locks import enter, hold
from ..storage.reading import AGAIN, read_record
from ..training.made_from import is_finished
from ..training.records import StepRecord
from .costs import timed
from .manifest import check_claimed
from .planned import Plan
from .trainings import distilled_training
from .watch import global_batch, train_watched


def distil(plan: Plan, wait: bool = False) -> Iterator[str | StepRecord]:
    """Finetune the merged model towards the experts' outputs, and write it as a pipeline, ``distilled/``.

    Nothing is done where the config has no section ``distil``, or all is there of this merge and these experts.

    Args:
        wait: until no other process works on the folder, instead of refusing.

    Raises:
        UserError: there is no merged model, or the training was begun with another one.
    """
    training = distilled_training(plan)
    if training is None:
        return
    check_merged(plan)
    yield from enter(plan.run.lock("run"), wait)
    with hold(plan.run.lock("run"), "deme distil", wait):
        check_claimed(plan.run, plan.config)
        task, settings, folder = training
        if not is_finished(folder):
            yield f"distil: the merged model is pulled towards {len(plan.ranges)} experts; {global_batch(settings)}"
        yield from timed(plan.run, "distil", train_watched(plan, task, settings, folder))
        _export(plan)


def check_merged(plan: Plan) -> None:
    """Require the model that distilling begins with, before anything is written.

    Raises:
        UserError: it is missing.
    """
    if not plan.run.merged.exists():
        raise UserError(f"{plan.run.merged} is missing: distil begins with the merged model; run deme search first")


def _export(plan: Plan) -> None:
    weights, _ = read_tensors(plan.run.distilling / "model.safetensors")
    if plan.run.distilled.exists():
        # Of an earlier training in this folder, where weights differ: it can be made again at once.
        if all(weights[key].to(value.dtype).equal(value) for key, value in load_network(plan.run.distilled).items()):
            return
        shutil.rmtree(plan.run.distilled)
    record = read_record(plan.run.merged / "merge.json", AGAIN)
    kept = inherited(pipeline_folder(plan.config.base), record["base"]["name"])
    usage = Usage(*plan.base.family.usage(plan.base.encoders))
    assert plan.config.distil is not None
    told = (
        f"\nAfter the merge it was finetuned for {plan.config.distil.num_updates} updates towards the outputs of its "
        "experts, each on its own timesteps.\n"
    )
    export_pipeline(plan.base, weights, plan.run.distilled, model_card(record, usage, kept) + told, None)
