"""The Fisher information of a run's experts, for merges that weigh every parameter by it."""

import json
from collections.abc import Iterator

from ..data.batches import training_batches
from ..errors import UserError
from ..executors.devices import default_device
from ..models.base import tensors_sha256
from ..seeds import stream_seed
from ..storage.files import read_tensors, write_tensors
from ..storage.locks import enter, hold
from ..training.fisher import fisher_information
from .plan import load_experts
from .planned import Plan


def write_fishers(plan: Plan, num_batches: int = 10, wait: bool = False) -> Iterator[str]:
    """Write ``fisher/<i>.safetensors`` for every expert of a run, from training images at its own timesteps.

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
    with hold(plan.run.lock("run"), "deme fisher", wait):
        yield from _write_fishers(plan, num_batches)


def _write_fishers(plan: Plan, num_batches: int) -> Iterator[str]:
    config, experts, size = plan.config, load_experts(plan), plan.config.finetune.batch_size
    for index, (expert, own) in enumerate(zip(experts, plan.ranges, strict=True)):
        path = plan.run.fisher(index)
        record = {
            "expert_sha256": tensors_sha256(expert),
            "timesteps": [own.low, own.high],
            "num_images": num_batches * size,
        }
        if not path.exists() or json.loads(read_tensors(path)[1]["fisher"]) != record:
            seed = stream_seed(config.seed, "fisher", index)
            batches = training_batches(plan.images, config.data, size, seed, 0, num_batches)
            fisher = fisher_information(plan.base, expert, own, batches, seed, default_device())
            write_tensors(path, fisher, {"fisher": json.dumps(record)})
        yield f"{path}: {record['num_images']} images at timesteps {own}"
