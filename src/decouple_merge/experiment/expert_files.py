"""Files of what a merge rule needs to know of each expert, made from training images at the expert's own timesteps."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..merging.arithmetic import Tensors
from ..models.base import tensors_sha256
from ..seeds import stream_seed
from ..storage.locks import enter, hold
from ..storage.tensors import TensorFiles
from .plan import load_experts
from .planned import Plan

# Writes the file of an expert on its range, by a seed, with metadata that say what it was made from.
Write = Callable[[Path, Tensors, TimestepRange, int, dict[str, str]], None]


def write_expert_files(
    plan: Plan, kind: str, path_of: Callable[[int], Path], write: Write, num_batches: int, wait: bool
) -> Iterator[str]:
    """Write a file for every expert of a run; one that was made from the same expert and as many images is kept.

    Args:
        kind: names the verb, the key of the metadata and the random stream.
        num_batches: of ``finetune.batch_size`` images.
        wait: until no other process works on the folder, instead of refusing.

    Raises:
        UserError: ``num_batches`` is below 1, an expert is missing, damaged, or of another base, or another process
            works on the folder.
    """
    if num_batches < 1:
        raise UserError(f"num_batches is {num_batches}, expected at least 1")
    yield from enter(plan.run.lock("run"), wait)
    with hold(plan.run.lock("run"), f"deme {kind}", wait):
        num_images = num_batches * plan.config.finetune.batch_size
        for index, (expert, own) in enumerate(zip(load_experts(plan), plan.ranges, strict=True)):
            path = path_of(index)
            sha256 = tensors_sha256(expert)
            record = {"expert_sha256": sha256, "timesteps": [own.low, own.high], "num_images": num_images}
            if not path.exists() or json.loads(TensorFiles([path]).metadata[kind]) != record:
                write(path, expert, own, stream_seed(plan.config.seed, kind, index), {kind: json.dumps(record)})
            yield f"{path}: {num_images} images at timesteps {own}"
