"""The inner products of what a run's experts see, for merges that reproduce each in its own range."""

import json
from collections.abc import Iterator
from functools import partial

from ..data.batches import training_batches
from ..errors import UserError
from ..executors.devices import default_device
from ..models.base import tensors_sha256
from ..seeds import stream_seed
from ..storage.files import atomic_path
from ..storage.locks import enter, hold
from ..storage.tensors import TensorFiles, num_bytes_of, write_stream
from ..training.gram import gram_layout, gram_matrices
from .plan import load_experts
from .planned import Plan


def write_grams(plan: Plan, num_batches: int = 10, wait: bool = False) -> Iterator[str]:
    """Write ``gram/<i>.safetensors`` for every expert of a run, from training images at its own timesteps.

    A file that was made from the same expert and as many images is kept. Batches are ``finetune.batch_size`` images.

    Args:
        wait: until no other process works on the folder, instead of refusing.

    Raises:
        UserError: ``num_batches`` is below 1, an expert is missing, damaged, or of another base, or another process
            works on the folder.
    """
    if num_batches < 1:
        raise UserError(f"num_batches is {num_batches}, expected at least 1")
    yield from enter(plan.run.lock("run"), wait)
    with hold(plan.run.lock("run"), "deme gram", wait):
        yield from _write_grams(plan, num_batches)


def _write_grams(plan: Plan, num_batches: int) -> Iterator[str]:
    config, experts, size = plan.config, load_experts(plan), plan.config.finetune.batch_size
    layout = gram_layout(plan.base.network)
    num_bytes = sum(num_bytes_of(*matrix) for matrix in layout.values())
    yield f"inner products of {len(layout):,} layers, {num_bytes / 1e9:.3g} GB for each of {len(experts)} experts"
    for index, (expert, own) in enumerate(zip(experts, plan.ranges, strict=True)):
        path, seed = plan.run.gram(index), stream_seed(config.seed, "gram", index)
        record = {
            "expert_sha256": tensors_sha256(expert),
            "timesteps": [own.low, own.high],
            "num_images": num_batches * size,
        }
        if not path.exists() or json.loads(TensorFiles([path]).metadata["gram"]) != record:
            batches = partial(training_batches, plan.images, config.data, size, seed, 0, num_batches)
            found = gram_matrices(plan.base, expert, own, batches, seed, default_device())
            with atomic_path(path) as temporary:
                for _ in write_stream(temporary, layout, found, {"gram": json.dumps(record)}):
                    pass
        yield f"{path}: {record['num_images']} images at timesteps {own}"
