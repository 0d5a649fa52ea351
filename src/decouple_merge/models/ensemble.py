"""The experts as one denoiser: a module that takes the place of a network in a stock diffusers pipeline."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import Config, load_config
from ..diffusion.process import Flow
from ..diffusion.ranges import listed_ranges
from ..diffusion.timesteps import TimestepRange, check_ranges, range_index
from ..errors import UserError
from ..merging.arithmetic import Tensors
from ..merging.keys import check_same_keys, has_trunk
from ..storage.files import read_tensors
from ..storage.hub import pipeline_folder
from ..storage.made_from import differences, told
from ..storage.reading import read_record
from ..storage.run_folder import Run
from .base import Base, load_base
from .identity import base_parts
from .network import load_network, new_network
from .ranges import ranges_of

REMOVE = "remove the folder to finetune again"


class TimestepEnsemble(nn.Module):
    """Experts as one denoiser, which runs for t the expert whose range holds t (DeMe, Eq. 7).

    It is called as an expert is, and answers to what pipelines read of a network, so that it can take its place:
    ``pipeline.unet = ensemble``, or ``pipeline.transformer``. Dispatch is on t, never on the step's index, so that it
    is right for every sampler and number of steps.

    Args:
        networks: one for each range; where ``weights`` are given a single one, which is overwritten.
        ranges: in order, a partition of [0, T).
        weights: of each expert, tensors with the network's keys, on the CPU or memory-mapped. Then one expert is in
            memory at a time: another's weights are copied over it when t comes into another range. A sampler goes
            through the ranges once, so that a batch of images costs as many copies as there are experts.
        timestep_of: maps what a network is given as ``timestep`` to a timestep that some range holds,
            ``Base.timestep_of``; cuts fractions off where not given.

    Raises:
        UserError: the ranges are no partition of [0, T), their number is not that of the experts, or weights don't
            fit the network.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        ranges: Sequence[TimestepRange],
        num_train_timesteps: int,
        weights: Sequence[Tensors] | None = None,
        timestep_of: Callable[[Tensor], Tensor] = Tensor.long,
    ) -> None:
        super().__init__()
        check_ranges(list(ranges), num_train_timesteps)
        num = len(networks if weights is None else weights)
        if num != len(ranges):
            raise UserError(f"{num} experts for {len(ranges)} ranges, expected one each")
        for index, tensors in enumerate(weights or ()):
            check_same_keys(networks[0].state_dict(), tensors, f"expert {index}")
        self.networks, self.ranges, self.weights = nn.ModuleList(networks), list(ranges), weights
        self.timestep_of = timestep_of
        self.held: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the expert for ``timestep``, the second argument: a number, or a tensor [] or [batch].

        Raises:
            UserError: a timestep lies in no range, or those of the batch in several.
        """
        timestep = self.timestep_of(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]))
        first, last = (range_index(self.ranges, t.item()) for t in timestep.aminmax())
        if first != last:
            raise UserError(
                f"the timesteps of a batch are {timestep.tolist()}, of the ranges {self.ranges[first]} to "
                f"{self.ranges[last]}; expected those of one range: call once for each"
            )
        return self._expert(first)(*args, **kwargs)

    @torch.no_grad()
    def _hold(self, index: int, weights: Tensors) -> None:
        # Stopped in the middle, the network is a mixture, and no expert is held.
        self.held = None
        for key, value in self.networks[0].state_dict().items():
            value.copy_(weights[key])
        self.held = index

    def _expert(self, index: int) -> nn.Module:
        if self.weights is None:
            return self.networks[index]
        if index != self.held:
            self._hold(index, self.weights[index])
        return self.networks[0]

    # What the pipelines of diffusers read of a denoiser, in which all experts agree.
    @property
    def config(self) -> Any:
        return self.networks[0].config

    @property
    def in_channels(self) -> int:
        return self.config.in_channels

    @property
    def add_embedding(self) -> Any:
        return self.networks[0].add_embedding

    def cache_context(self, name: str, **step: Any) -> AbstractContextManager[None]:
        """Cache nothing between steps: the next one may be another expert's."""
        return nullcontext()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


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


def load_ensemble(
    model: str | Path,
    experts: Sequence[str | Path] = (),
    ranges: Sequence[tuple[int | float, int | float]] | None = None,
    one_resident: bool = False,
) -> TimestepEnsemble:
    """Build the ensemble of a run's experts, or of any models of one architecture; float32, on the CPU.

    Args:
        model: a run folder with finished experts; where experts are given, the base by folder or hub name.
        experts: pipelines by folder or hub name, expert folders or weight files, the cleanest range's first.
        ranges: [low, high) in timesteps, one for each of the experts; where not given equal parts of [0, T), or of a
            flow's sampling steps. A run has its own.
        one_resident: hold one expert in memory, and read the others from their files when t comes to them.

    Raises:
        UserError: the model is no run and no experts are given, one is missing, damaged or of another architecture
            or base, or the ranges are no partition.
    """
    if experts:
        base = load_base(str(model))
        found = [_load_model(str(e), base) for e in experts]
        parts = base.process.split(len(experts)) if ranges is None else listed_ranges(base.process, ranges)
    else:
        _, base, parts, found, _ = open_run(Path(model))
    with_trunk = [has_trunk(tensors) for tensors in found]
    if any(with_trunk) and not all(with_trunk):
        raise UserError(f"{sum(with_trunk)} of {len(found)} experts have trunk projections; expected all or none")

    def build() -> nn.Module:
        return new_network(base, "trunk" if all(with_trunk) else "none").requires_grad_(False).eval()

    if one_resident:
        return TimestepEnsemble([build()], parts, base.num_train_timesteps, found, base.timestep_of)
    networks = [build() for _ in found]
    for network, tensors in zip(networks, found, strict=True):
        network.load_state_dict(tensors)
    return TimestepEnsemble(networks, parts, base.num_train_timesteps, None, base.timestep_of)


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


def _load_model(name: str, base: Base) -> Tensors:
    tensors = load_network(pipeline_folder(name))
    check_same_keys(base.network.state_dict(), tensors, name)
    return tensors


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
