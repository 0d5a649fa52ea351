"""The inner products of what a run's experts see, for merges that reproduce each in its own range."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ..data.batches import training_batches
from ..diffusion.timesteps import TimestepRange
from ..executors.devices import default_device
from ..merging.arithmetic import Tensors
from ..storage.files import atomic_path
from ..storage.tensors import num_bytes_of, write_stream
from ..training.gram import gram_layout, gram_matrices
from .expert_files import write_expert_files
from .planned import Plan


def write_grams(plan: Plan, num_batches: int = 10, wait: bool = False) -> Iterator[str]:
    """Write ``gram/<i>.safetensors`` for every expert of a run, as ``write_expert_files`` does."""
    layout, size = gram_layout(plan.base.network), plan.config.finetune.batch_size

    def write(path: Path, expert: Tensors, own: TimestepRange, seed: int, metadata: dict[str, str]) -> None:
        batches = partial(training_batches, plan.images, plan.config.data, size, seed, 0, num_batches)
        found = gram_matrices(plan.base, expert, own, batches, seed, default_device())
        with atomic_path(path) as temporary:
            for _ in write_stream(temporary, layout, found, metadata):
                pass

    num_bytes = sum(num_bytes_of(*matrix) for matrix in layout.values())
    yield f"inner products of {len(layout):,} layers, {num_bytes / 1e9:.3g} GB for each of {len(plan.ranges)} experts"
    yield from write_expert_files(plan, "gram", plan.run.gram, write, num_batches, wait)
