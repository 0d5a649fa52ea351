"""Decouple-then-Merge for diffusers models: finetune timestep experts, merge them into one better model."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# transformers, which a text-to-image pipeline imports, warns of image processors that nothing of ours uses.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Names are imported when they are asked for: the command's --help needs no torch.
_PUBLIC = {
    "load_config": "config",
    "load_protocol": "config",
    "run": "experiment.workflow",
    "finetune_experts": "experiment.finetuning",
    "search_weights": "experiment.selection",
    "pretrain": "experiment.pretraining",
    "prepare": "experiment.plan",
    "merge": "merging.arithmetic",
    "merge_models": "merging.recipes",
    "load_base": "models.base",
    "RangeRouter": "diffusion.routing",
    "TimestepEnsemble": "models.ensemble",
    "load_ensemble": "models.mixture",
    "sample_images": "sampling.sampler",
    "sample_model": "sampling.folder",
    "evaluate_model": "evaluation.evaluate",
    "frechet_distance": "evaluation.distances",
    "kernel_distance": "evaluation.distances",
    "inception_score": "evaluation.distances",
    "clip_score": "evaluation.distances",
    "r_precision": "evaluation.distances",
    "precision_recall": "evaluation.neighbours",
    "density_coverage": "evaluation.neighbours",
    "split_timesteps": "diffusion.timesteps",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
