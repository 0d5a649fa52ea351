"""The Fisher information of a run's experts, for merges that weigh every parameter by it."""

from collections.abc import Iterator
from pathlib import Path

from ..data.batches import training_batches
from ..diffusion.timesteps import TimestepRange
from ..executors.devices import default_device
from ..merging.arithmetic import Tensors
from ..storage.files import write_tensors
from ..training.fisher import fisher_information
from .expert_files import write_expert_files
from .planned import Plan


def write_fishers(plan: Plan, num_batches: int = 10, wait: bool = False) -> Iterator[str]:
    """Write ``fisher/<i>.safetensors`` for every expert of a run, as ``write_expert_files`` does."""
    size = plan.config.finetune.batch_size

    def write(path: Path, expert: Tensors, own: TimestepRange, seed: int, metadata: dict[str, str]) -> None:
        batches = training_batches(plan.images, plan.config.data, size, seed, 0, num_batches)
        write_tensors(path, fisher_information(plan.base, expert, own, batches, seed, default_device()), metadata)

    yield from write_expert_files(plan, "fisher", plan.run.fisher, write, num_batches, wait)
