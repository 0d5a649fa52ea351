"""What a run's search combines: its experts, its baseline, what was kept of that one's training, or listed models."""

from pathlib import Path

from ..errors import UserError
from ..merging.arithmetic import Tensors
from ..merging.keys import check_same_keys
from ..models.ensemble import load_expert
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


def _load_kept(plan: Plan, update: int) -> Tensors:
    path = kept_weights(plan.run.baseline(BASELINE), update)
    if not path.exists():
        raise UserError(f"{path} is missing; remove {plan.run.baseline(BASELINE)} to finetune it again")
    tensors, _ = read_tensors(path)
    check_same_keys(plan.base.network.state_dict(), tensors, str(path))
    return tensors
