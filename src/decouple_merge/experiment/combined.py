"""What a run's search combines: its experts, its baseline, what was kept of that one's training, or listed models."""

from pathlib import Path

from ..config import Config
from ..errors import UserError
from ..merging.arithmetic import Model, Tensors
from ..merging.keys import check_same_keys
from ..models.lora import FILE, as_adapted
from ..models.run_experts import load_expert
from ..searching.checkpoints import load_checkpoints
from ..storage.files import read_tensors
from ..storage.run_folder import kept_weights
from .given import given_experts
from .plan import load_experts
from .planned import BASELINE, Plan


def combined_names(plan: Plan) -> list[str]:
    """Name the models as the recipe of the merged one does: paths from its folder, or as the config lists them."""
    search, baseline = plan.config.search, Path("..") / "baselines" / BASELINE
    if search.over == "baseline":
        return [str(baseline)]
    if search.over == "baseline-checkpoints":
        return [str(kept_weights(baseline, update)) for update in plan.config.kept_updates]
    if search.checkpoints:
        return list(search.checkpoints)
    if plan.config.finetune.experts == "denoisers":
        return given_experts(plan)
    return [f"../experts/{i}" for i in range(len(plan.ranges))]


def load_combined(plan: Plan) -> list[Tensors]:
    """Read the models that the search combines.

    Raises:
        UserError: there is nothing to search over, or a model is missing, damaged, or of another base.
    """
    search, baseline = plan.config.search, plan.run.baseline(BASELINE)
    if search.over == "nothing":
        raise UserError(f"{plan.run.config}: search.over is nothing, so there is nothing to search")
    if search.over == "experts":
        return load_checkpoints(search, plan.base) or load_experts(plan)
    final = load_expert(baseline, plan.base)
    if search.over == "baseline":
        return [final]
    return [_load_kept(plan, update) for update in plan.config.kept_updates]


def are_adapters(config: Config) -> bool:
    """Say whether what a run's search combines was finetuned by adapters."""
    return config.search.combines_experts and config.finetune.lora is not None


def held_models(plan: Plan, models: list[Tensors]) -> list[Model]:
    """Take the models that the search combines as it holds them: adapters as these, others memory-mapped as they are.

    Raises:
        UserError: an adapter isn't that of its expert.
    """
    if not are_adapters(plan.config):
        return [*models]
    paths = [plan.run.expert(i) / "lora" / FILE for i in range(len(models))]
    return [as_adapted(plan.base, m, read_tensors(p)[0], str(p)) for m, p in zip(models, paths, strict=True)]


def _load_kept(plan: Plan, update: int) -> Tensors:
    path = kept_weights(plan.run.baseline(BASELINE), update)
    if not path.exists():
        raise UserError(f"{path} is missing; remove {plan.run.baseline(BASELINE)} to finetune it again")
    tensors, _ = read_tensors(path)
    check_same_keys(plan.base.network.state_dict(), tensors, str(path))
    return tensors
