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
    "run": "workflow",
    "finetune_experts": "workflow",
    "search_weights": "selection",
    "pretrain": "workflow",
    "prepare": "plan",
    "merge": "weights",
    "merge_models": "recipes",
    "TimestepEnsemble": "ensemble",
    "load_ensemble": "ensemble",
    "sample_images": "sample",
    "sample_model": "standalone",
    "evaluate_model": "scoring",
    "frechet_distance": "metrics",
    "kernel_distance": "metrics",
    "inception_score": "metrics",
    "clip_score": "metrics",
    "r_precision": "metrics",
    "precision_recall": "neighbours",
    "density_coverage": "neighbours",
    "split_timesteps": "timesteps",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
