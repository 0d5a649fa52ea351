"""What a run's merged model is pulled towards: its experts, each on its own range."""

from ..executors.devices import default_device
from ..models.base import tensors_sha256
from ..models.network import build_network, load_network
from ..training.distillation import Distillation
from .plan import load_experts
from .planned import Plan


def distillation_of(plan: Plan) -> Distillation:
    """Open a run's merged model and its experts for a training by their outputs.

    Raises:
        UserError: one is missing or damaged.
    """
    merged, experts = load_network(plan.run.merged), load_experts(plan)
    teachers = [build_network(plan.base, expert, device=default_device()) for expert in experts]
    hashes = {"merged_sha256": tensors_sha256(merged), "experts_sha256": [tensors_sha256(e) for e in experts]}
    return Distillation({k: v.float() for k, v in merged.items()}, teachers, plan.ranges, hashes)
