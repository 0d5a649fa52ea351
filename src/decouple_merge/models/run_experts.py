"""A run's experts, read from its folder."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from ..config import Config, load_config
from ..diffusion.process import Flow
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..merging.arithmetic import Tensors
from ..merging.keys import check_same_keys
from ..storage.files import read_tensors
from ..storage.made_from import differences, told
from ..storage.reading import read_record
from ..storage.run_folder import Run
from .base import Base, load_base
from .identity import base_parts
from .ranges import ranges_of

REMOVE = "remove the folder to finetune again"


class RunEnsemble(NamedTuple):
    """What a run's ensemble is made of: an expert for each range.

    Attributes:
        step_shares: of each range, by the scheduler that the base had in training, where the experts' record has them.
    """

    config: Config
    base: Base
    ranges: list[TimestepRange]
    experts: list[Tensors]
    step_shares: list[float] | None


def open_run(folder: Path) -> RunEnsemble:
    """Open what a run's ensemble is made of; experts are memory-mapped.

    Raises:
        UserError: the folder is no run, or an expert is missing, damaged or of another base.
    """
    run = Run(folder)
    if not run.config.exists():
        raise UserError(
            f"{folder} is not a run folder (no config.yaml); give one, or the experts of a base and their ranges"
        )
    config = load_config(run.config)
    base = load_base(config.base, config.finetune.experts == "denoisers")
    ranges = ranges_of(base, config.finetune)
    experts = [load_expert(run.expert(i), base, own) for i, own in enumerate(ranges)]
    found = read_record(run.expert(0) / "expert.json", REMOVE).get("step_shares")
    shares = [share for share in found or () if isinstance(share, float)] if isinstance(found, list) else []
    return RunEnsemble(config, base, ranges, experts, shares if len(shares) == len(ranges) else None)


def load_expert(folder: Path, base: Base, own: TimestepRange | None = None) -> Tensors:
    """Read an expert of a run, memory-mapped.

    Args:
        own: the range that is now said to be its own, of an expert that has one.

    Raises:
        UserError: it is missing, damaged, or was finetuned from another base, whose table of timesteps counts too, or
            on another range.
    """
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} has no finished expert; run deme finetune first")
    record = read_record(folder / "expert.json", REMOVE, base_sha256=str)
    old, now = record.get("base"), base_parts(base)
    if isinstance(base.process, Flow) and isinstance(old, dict):
        # Where the steps of a flow fall is told before images are drawn; their ranges are compared below.
        old = old | {"scheduler": now["scheduler"]}
    if found := differences({"base": old}, {"base": now}):
        raise UserError(
            f"{folder} was finetuned from another base or on another range: {told(found)}; put that back, or finetune "
            "again, into another --out"
        )
    if own is not None:
        _check_range(folder, record.get("own"), base, own)
    tensors, _ = read_tensors(folder / "model.safetensors")
    check_same_keys(base.network.state_dict(), tensors, str(folder))
    return tensors


def _check_range(folder: Path, found: Any, base: Base, own: TimestepRange) -> None:
    """Require that an expert was finetuned on its range: those of a flow follow the base's scheduler by default."""
    ends = [found.get("low"), found.get("high")] if isinstance(found, dict) else []
    numbers = [end for end in ends if isinstance(end, int | float)]
    if len(numbers) < 2 or (math.isclose(numbers[0], own.low) and math.isclose(numbers[1], own.high)):
        return
    shift = f", whose scheduler has the shift {base.process.shift:g}" if isinstance(base.process, Flow) else ""
    raise UserError(
        f"{folder} was finetuned on the timesteps {TimestepRange(*numbers)}, and its range is {own} with this config "
        f"and base{shift}: put back what was changed, or list finetune.ranges as they were trained"
    )
