"""What an adapter's config says: peft's ``adapter_config.json``, or what diffusers writes into the header."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage.reading import as_record, parse_json, read_text
from ..storage.tensors import TensorFiles

HEADER = "lora_adapter_metadata"
ADVICE = "expected the settings of a LoRA as JSON"
# What would change the sum B·A, or where it is added.
REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)


class AdapterConfig:
    """Alpha and rank of every module, as peft finds them.

    Attributes:
        values: by name as in peft's LoraConfig; in a pipeline's file behind the component, ``unet.lora_alpha``.
    """

    def __init__(self, files: TensorFiles, path: Path) -> None:
        beside = (path.parent if path.is_file() else path) / "adapter_config.json"
        text = files.metadata.get(HEADER) or (read_text(beside, ADVICE) if beside.is_file() else "{}")
        self.place = f"{path}: {HEADER}" if HEADER in files.metadata else str(beside)
        self.values: dict[str, Any] = as_record(parse_json(text, self.place, ADVICE), self.place, ADVICE)
        kind = self.values.get("peft_type", "LORA")
        refused = [key for key in self.values if self.values[key] and key.rpartition(".")[2] in REFUSED]
        if kind != "LORA" or refused:
            what = f"peft_type is {kind}" if kind != "LORA" else f"{refused[0]} is set"
            raise UserError(f"{self.place}: {what}; expected a plain LoRA: merge it with peft, and give the result")

    def with_sha256(self, tensors: str) -> str:
        """Hash the config with the hash of an adapter's tensors; where there is no config, it is that."""
        if not self.values:
            return tensors
        return hashlib.sha256(f"{tensors} {json.dumps(self.values, sort_keys=True)}".encode()).hexdigest()

    def _get(self, prefix: str, name: str) -> Any:
        """Read a setting of the part of a pipeline that a prefix names, such as ``unet.``."""
        if any(key.startswith(prefix) for key in self.values if prefix):
            return self.values.get(prefix + name)
        return self.values.get(name)

    def check_covers(self, prefixes: set[str]) -> None:
        """Require that a config speaks of the parts that the keys are for, if it speaks of any.

        Raises:
            ValueError: it speaks of others, so that alpha would be unknown.
        """
        if self.values and all(self._get(p, "lora_alpha") is None for p in prefixes):
            found = ", ".join(sorted(k for k in self.values if k.endswith("lora_alpha"))) or "no lora_alpha"
            raise UserError(f"{self.place}: found {found}, expected lora_alpha of what the adapter's keys are for")

    def scale(self, prefix: str, module: str, rank: int, alpha: float | None) -> float:
        """Compute alpha / rank, or alpha / √rank of a rank-stabilised LoRA (Kalajdzievski 2023).

        Args:
            module: its path in the network, which patterns match to the end.
            rank: of the factors.
            alpha: of the file's own ``.alpha`` for this module, which comes first. With none anywhere, the scale is 1.

        Raises:
            ValueError: alpha or a pattern is none, alpha is 0, or the rank is another than the factors'.
        """
        said = self._matched(prefix, "rank_pattern", module, self._get(prefix, "r"))
        if said is not None and said != rank:
            raise UserError(f"{self.place}: rank {said} for {module}, found factors of rank {rank}")
        if alpha is None:
            found = self._matched(prefix, "alpha_pattern", module, self._get(prefix, "lora_alpha"))
            if isinstance(found, bool) or not isinstance(found, int | float | None):
                raise UserError(f"{self.place}: alpha {found!r} for {module}, expected a number")
            alpha = rank if found is None else found
        if not math.isfinite(alpha):
            raise UserError(f"alpha is {alpha} for {module}, expected a finite number")
        if alpha == 0:
            # Kohya's trainer reads it as the rank, peft and diffusers as no change.
            raise UserError(
                f"alpha is 0 for {module}, which some read as its rank {rank} and others as no change: set it to "
                f"{rank}, or leave the module's factors out"
            )
        return alpha / (math.sqrt(rank) if self._get(prefix, "use_rslora") else rank)

    def wants_magnitudes(self, prefix: str) -> bool:
        """Say whether it is a DoRA, whose modules all have a magnitude."""
        return bool(self._get(prefix, "use_dora"))

    def _matched(self, prefix: str, name: str, module: str, default: Any) -> Any:
        """Find the first pattern that matches a module's whole path or its end behind a dot, as peft does."""
        patterns = self._get(prefix, name) or {}
        try:
            for pattern, value in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
        except (re.error, AttributeError) as error:
            raise UserError(f"{self.place}: {name} is {patterns!r}, expected regular expressions ({error})") from error
        return default
