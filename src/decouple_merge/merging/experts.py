"""Experts as files hold them: whole sets of weights, or LoRAs."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..storage.tensors import Entry, TensorFiles, model_files
from .keys import check_same_keys

LORA_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?:unet\.|transformer\.|prior\.)?(?P<module>.+?)\."
    r"(?:(?P<down>lora_A|lora\.down)|(?P<up>lora_B|lora\.up))(?:\.\w+)?\.weight$"
)


class Checkpoint:
    """An expert as a whole set of weights."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files

    def check_keys(self, base: Mapping[str, Entry], name: str) -> None:
        """Require that the expert has the base's keys and shapes; raises a ValueError as ``check_same_keys``."""
        check_same_keys(base, self.files.entries, name)

    def tensor(self, key: str, base: Tensor) -> Tensor:
        """Read the expert's version of a tensor; a projection that it doesn't have is the identity."""
        return self.files[key] if key in self.files.entries else base


class Lora:
    """An expert as low-rank factors: θ_i = θ + scale·B·A, whose task vector is the product, never A and B apart.

    Scale is alpha / rank, or alpha / sqrt(rank) where the adapter says ``use_rslora``; without an alpha it is 1.
    """

    def __init__(self, files: TensorFiles, path: Path) -> None:
        self.files = files
        self.factors: dict[str, dict[str, str]] = {}
        for key in files.entries:
            if found := LORA_KEY.match(key):
                side = "down" if found["down"] else "up"
                self.factors.setdefault(f"{found['module']}.weight", {})[side] = key
        halves = [k for k, pair in self.factors.items() if len(pair) != 2]
        if halves:
            raise UserError(f"{path}: a LoRA with only one factor for {', '.join(halves[:3])}")
        config = path.parent / "adapter_config.json" if path.is_file() else path / "adapter_config.json"
        self.config: dict[str, Any] = json.loads(config.read_text()) if config.is_file() else {}

    def check_keys(self, base: Mapping[str, Entry], name: str) -> None:
        """Require that the base has what the factors change.

        Raises:
            UserError: names the keys that it doesn't have.
        """
        if unknown := [k for k in self.factors if k not in base]:
            raise UserError(
                f"{name} doesn't fit the base: unknown: {', '.join(unknown[:5])}; expected a LoRA of this base"
            )

    def _scale(self, key: str, rank: int) -> float:
        module = key.removesuffix(".weight")
        alphas = [k for k in self.files.entries if k.endswith(".alpha") and k.removesuffix(".alpha").endswith(module)]
        alpha = float(self.files[alphas[0]]) if alphas else self.config.get("lora_alpha", rank)
        for pattern, value in self.config.get("alpha_pattern", {}).items():
            alpha = value if module.endswith(pattern) else alpha
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def tensor(self, key: str, base: Tensor) -> Tensor:
        """Compute the expert's version of a tensor, in float32 where it has factors for it."""
        if key not in self.factors:
            return base
        down, up = (self.files[self.factors[key][side]].float() for side in ("down", "up"))
        product = (up.flatten(1) @ down.flatten(1)).reshape(base.shape)
        return torch.add(base.float(), product, alpha=self._scale(key, down.shape[0]))


Expert = Checkpoint | Lora


def open_expert(path: Path) -> Expert:
    """Open an expert: a pipeline, one of its networks, an expert folder of a run, a weights file or a LoRA.

    Raises:
        UserError: there are no weights, they are damaged, a pickle, or quantised.
    """
    opened = TensorFiles(model_files(path))
    return Lora(opened, path) if any(LORA_KEY.match(k) for k in opened.entries) else Checkpoint(opened)
