"""The models of a run's result table: whether they are there, what they are, how they draw."""

import torch

from ..merging.arithmetic import Tensors
from ..models.identity import model_sha256
from ..models.mixture import mixture_of
from ..models.network import load_network
from ..sampling.sampler import Denoiser, denoiser, sampling_network
from ..storage.files import read_tensors
from ..training.made_from import is_finished
from .plan import load_experts
from .planned import BASELINE, Plan


def is_made(plan: Plan, model: str) -> bool:
    """Say whether a model of the table is there."""
    if model == "pretrained":
        return True
    if model == BASELINE:
        return is_finished(plan.run.baseline(BASELINE))
    if model == "ensemble":
        return all(is_finished(plan.run.expert(i)) for i in range(len(plan.ranges)))
    return (plan.run.merged if model == "merged" else plan.run.distilled).exists()


def _weights_of(plan: Plan, model: str) -> Tensors:
    if model == "pretrained":
        return plan.base.network.state_dict()
    if model == BASELINE:
        return read_tensors(plan.run.baseline(BASELINE) / "model.safetensors")[0]
    return load_network(plan.run.merged if model == "merged" else plan.run.distilled)


def denoiser_of(plan: Plan, model: str, device: torch.device) -> Denoiser:
    if model == "ensemble":
        return plan.ensemble(load_experts(plan), device)
    network = sampling_network(plan.base, _weights_of(plan, model), plan.config.report_sample, device)
    return denoiser(plan.base, network)


def sha256_of(plan: Plan, model: str) -> str:
    """Hash a model of the table, as it is now."""
    if model == "ensemble":
        return mixture_of(plan.base, plan.ranges, load_experts(plan)).sha256
    return model_sha256(plan.base, None if model == "pretrained" else [_weights_of(plan, model)])
