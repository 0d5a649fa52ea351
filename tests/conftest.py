"""Tiny models, data and configs: everything is built here, nothing is fetched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from decouple_merge.config import Config


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep reference statistics of tests apart from the user's, and two busy cores from fighting."""
    monkeypatch.setenv("DEME_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def make_unet(**changes: Any) -> UNet2DModel:
    """Build a UNet2DModel of a few thousand parameters, 8×8 grey unless told otherwise."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**(arguments | changes))


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    """The folder of a tiny DDPM pipeline, T = 40."""
    folder = tmp_path / "base"
    DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=40)).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_images(tmp_path: Path) -> Path:
    """An npz file of 48 grey 8×8 images."""
    path = tmp_path / "images.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (48, 8, 8), dtype=np.uint8))
    return path


@pytest.fixture
def tiny_config(tiny_base: Path, tiny_images: Path) -> Callable[..., Config]:
    """Make a config of the whole job that takes seconds; sections are updated by keyword."""

    def make(**sections: Any) -> Config:
        values: dict[str, Any] = {
            "base": str(tiny_base),
            "data": {"source": str(tiny_images), "num_held_out": 8},
            "finetune": {
                "num_ranges": 2,
                "num_updates": 6,
                "batch_size": 4,
                "validate_every": 3,
                "checkpoint_every": 2,
                "tracker": "none",
            },
            "sample": {"num_steps": 3, "batch_size": 8},
            "search": {"num_trials": 5, "num_images": 10, "gradient_batches": 2},
            "evaluate": {"num_images": 10, "num_sample_images": 2},
        }
        for section, changes in sections.items():
            values[section] = {**values[section], **changes} if isinstance(changes, dict) else changes
        return Config.model_validate(values)

    return make
