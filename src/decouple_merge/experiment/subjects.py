"""What a run holds for its analyses."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.subject import RunResults, Subject
from ..config import Analyze, Training, load_config
from ..data.batches import Batch, training_batches
from ..data.split import split
from ..diffusion.weightings import weight_of
from ..errors import UserError
from ..evaluation.compare import check_comparable
from ..evaluation.records import newest
from ..executors.devices import default_device
from ..merging.arithmetic import Tensors
from ..models.base import tensors_sha256
from ..models.network import load_network
from ..sampling.model import drawn_with
from ..sampling.sampler import Denoiser, Prompts, choose_prompts, sample_images
from ..seeds import stream_seed
from ..storage.files import read_records, read_tensors
from ..storage.reading import file_sha256, read_record
from ..storage.run_folder import Run, kept_checkpoints
from .plan import load_experts
from .planned import BASELINE, Plan
from .reported import report_models
from .table_models import denoiser_of, is_made, sha256_of

# What an analysis may need besides the base, and whether a run holds it; "experts" and "merged" are loaded.
HELD: dict[str, Callable[[Plan, Sequence[Path]], bool]] = {
    "experts": lambda plan, others: is_made(plan, "ensemble"),
    "several runs": lambda plan, others: bool(others),
    "two experts": lambda plan, others: len(plan.ranges) > 1,
    "merged": lambda plan, others: plan.run.merged.is_dir(),
    "models": lambda plan, others: (
        # The images of all are compared with its.
        "pretrained" in report_models(plan) and all(is_made(plan, model) for model in report_models(plan))
    ),
}
# What to do where it isn't held.
FINISH = "finish the run first: give deme run its config again"
REMEDIES = {
    "several runs": "give the folders of other runs, too, and with --over the setting in which they differ",
    "two experts": "it takes a run of two ranges or more",
}


class Drawing:
    """Draws images by the models of a run; the last model and the prompts stay in memory."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.device = plan, default_device()
        self.opened: tuple[str, Denoiser] | None = None

    @cached_property
    def prompts(self) -> Prompts | None:
        return self.plan.open_prompts(self.device)

    def __call__(self, model: str, seeds: Sequence[int]) -> Tensor:
        """Draw one image for each seed, uint8 [n, c, h, w]."""
        if self.opened is None or self.opened[0] != model:
            # First it is let go, then the next is loaded.
            self.opened = None
            self.opened = model, denoiser_of(self.plan, model, self.device)
        sample = self.plan.config.report_sample
        drawn = sample_images(self.opened[1], self.plan.base, seeds, sample, self.device, prompts=self.prompts)
        return torch.cat(list(drawn))

    def prompts_of(self, seeds: Sequence[int]) -> list[str]:
        return choose_prompts(self.plan.prompts, seeds, 0) if self.plan.prompts else []

    @property
    def calls_per_image(self) -> int:
        """Count how often an image goes through the network, as ``Prompts.guide`` does it."""
        encoders, config = self.plan.base.encoders, self.plan.config
        is_guided = encoders is not None and encoders.guidance == "classifier-free" and config.text.guidance_scale > 1
        return config.report_sample.num_steps * (2 if is_guided else 1)


def subject_of(plan: Plan, settings: Analyze, needs: dict[str, Sequence[str]], others: Sequence[Path] = ()) -> Subject:
    """Load what some analyses need of a run.

    Args:
        needs: of each analysis by its name.
        others: folders of runs that this one is compared with.

    Raises:
        UserError: an expert is damaged, or of another base; there are fewer images than an analysis is set to take.
    """
    needed = {need for own in needs.values() for need in own}
    _check_numbers(plan, settings, needs)

    def images(num_wanted: int) -> Batch:
        seed = stream_seed(settings.seed, "analysis")
        return next(training_batches(plan.images, plan.config.data, num_wanted, seed, 0, 1))

    drawing = Drawing(plan)
    checkpoints = kept_checkpoints(plan.run.folder / "training") if "gradient-similarity" in needs else {}
    models = _others(plan, settings.loss_weights.run) if "loss-weights" in needs else {}
    runs = results_of((plan.run.folder, *others), settings.sensitivity.metric) if others else []
    metric, screened = _screened(plan)
    hashes = {
        "gradient-similarity": {f"checkpoint_{n}_sha256": file_sha256(path) for n, path in checkpoints.items()},
        "qualitative": _drawn_from(plan) if "qualitative" in needs else {},
        "loss-weights": {f"{name} sha256": tensors_sha256(tensors) for name, tensors in models.items()},
        "sensitivity": {f"{index} {run.name} sha256": _sha256(run) for index, run in enumerate(runs)},
    }
    return Subject(
        base=plan.base,
        ranges=plan.ranges,
        experts=load_experts(plan) if "experts" in needed else [],
        merged=load_network(plan.run.merged) if "merged" in needed else None,
        weight=weight_of(plan.config.finetune.weighting, **plan.config.finetune.weighting_options),
        others=models,
        runs=runs,
        checkpoints={update: partial(_weights, path) for update, path in checkpoints.items()},
        hashes=hashes,
        trials=screened,
        metric=metric,
        models=report_models(plan),
        draw=drawing,
        prompts_of=drawing.prompts_of,
        first_seed=plan.config.evaluate.first_seed,
        calls_per_image=drawing.calls_per_image,
        settings=settings,
        batch_size=settings.batch_size or _training(plan).batch_size,
        images=images,
        device=default_device(),
    )


def _check_numbers(plan: Plan, settings: Analyze, names: Iterable[str]) -> None:
    """Require that no analysis takes more images than are trained on."""
    num = len(split(plan.images, plan.config.data).trained)
    for name in names:
        for key in ("num_images", "num_gradient_images"):
            if (wanted := getattr(settings.of(name), key, 0)) > num:
                place = name.replace("-", "_")
                raise UserError(
                    f"{name} takes {wanted} images, and {num} are trained on; give --set {place}.{key}={num}"
                )


def _screened(plan: Plan) -> tuple[str, list[tuple[list[float], float]]]:
    """Read the search's metric, and weights and values of its first level where each expert has one weight."""
    trials = read_records(plan.run.trials, level=str, weights=list, metric=str)
    if not trials:
        return "", []
    found = [(r["weights"], r["value"]) for r in trials if r["level"] == trials[0]["level"] and r["value"] is not None]
    # With blocks there are several weights of each expert.
    whole = [(weights, value) for weights, value in found if len(weights) == len(plan.ranges)]
    return trials[0]["metric"], whole if plan.config.search.combines_experts else []


def _training(plan: Plan) -> Training:
    """Find the settings of the training that a folder is of: the base's, or the experts'."""
    config = plan.config
    return config.pretrain if config.pretrain and (plan.run.folder / "pipeline").is_dir() else config.finetune


def _others(plan: Plan, folder: Path | None) -> dict[str, Tensors]:
    """Load the models of another run that its analysis is to compare.

    Raises:
        UserError: it is no run, is of another base, or has no finished model.
    """
    if folder is None:
        return {}
    other = Run(Path(folder))
    found = read_record(other.manifest, "loss_weights.run takes the folder of a run", base=dict)["base"]
    if found.get("sha256") != plan.base.sha256:
        raise UserError(f"loss_weights.run {folder} is of another base, {found.get('name')}; expected the run's own")
    places = {BASELINE: other.baseline(BASELINE) / "model.safetensors", "merged": other.merged}
    models = {f"{folder.name} {name}": load_network(path) for name, path in places.items() if path.exists()}
    if not models:
        raise UserError(f"loss_weights.run {folder} has no finished model; give deme run its config again")
    return models


def _drawn_from(plan: Plan) -> dict[str, Any]:
    """Say what the images of a run's models depend on."""
    config = plan.config
    return {
        "first_seed": config.evaluate.first_seed,
        "models": {model: sha256_of(plan, model) for model in report_models(plan)},
        "drawn_with": drawn_with(plan.base, config.report_sample, config.text),
        "prompts": plan.prompts_label,
    }


def _weights(path: Path) -> Tensors:
    return read_tensors(path)[0]


def results_of(folders: Sequence[Path], metric: str | None) -> list[RunResults]:
    """Read what runs say of themselves.

    Raises:
        UserError: their numbers of the metric don't compare.
    """
    found = []
    for folder in folders:
        config = load_config(Run(folder).config).model_dump(mode="json")
        records = newest(read_records(Run(folder).metrics, model=str, metric=str, value=(int, float), seeds=list))
        found.append(RunResults(folder.name, config, records))
    metric = metric or found[0].config["evaluate"]["metrics"][0]
    compared = [record for run in found for record in run.records if record["metric"] == metric]
    check_comparable(metric, compared, ", ".join(map(str, folders)))
    return found


def _sha256(run: RunResults) -> str:
    return hashlib.sha256(json.dumps([run.config, run.records]).encode()).hexdigest()
