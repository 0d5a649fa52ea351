"""The processes that torchrun starts, which are one training: who is who, and what they tell each other.

A process that joined none is alone, rank 0 of 1. Ports are torchrun's to choose: ``--standalone`` takes a free one.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from .devices import default_device

# Some wait while the first fills a cache or draws images. Not for a dead one: torchrun ends them all.
TIMEOUT = timedelta(days=7)


def join() -> None:
    """Join the processes that torchrun started, and take the GPU of this one's place; alone, do nothing.

    Raises:
        UserError: there are fewer GPUs than processes on this machine, or its accelerator can't add up gradients.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    device = default_device()
    if device.type == "mps":
        raise UserError("several processes of one training need CUDA or the CPU, and this machine has MPS: start one")
    if device.type == "cuda":
        place, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= num_gpus:
            raise UserError(
                f"process {place} of this machine has no GPU: there are {num_gpus}; set torchrun's --nproc_per_node to "
                f"{num_gpus}"
            )
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=torch.device("cuda", place))
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    atexit.register(leave)


def leave() -> None:
    """Go on alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Say which process this is, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Count the processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Say whether this is the process that writes and prints."""
    return rank() == 0


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process through, and the others when it is done, who find what it left."""
    if not is_first():
        dist.barrier()
    yield
    # Not after an error, which ends them all.
    if is_first() and world_size() > 1:
        dist.barrier()


def mean(values: Tensor) -> Tensor:
    """Average tensors of equal shapes, one of each process; in place."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def averaging(network: nn.Module) -> nn.Module:
    """Wrap a network so that a backward pass leaves the mean of the processes' gradients; alone, leave it as it is."""
    if world_size() == 1:
        return network
    has_unused = getattr(network, "has_unused_parameters", False)
    return DistributedDataParallel(network, gradient_as_bucket_view=True, find_unused_parameters=has_unused)


def accumulating(network: nn.Module) -> AbstractContextManager[None]:
    """Let backward passes only add to this process's gradients; the next one outside averages their sum."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def check_shared(folder: Path, found: str) -> None:
    """Require that all processes found the same in a folder; they wait for each other.

    Raises:
        UserError: they did not.
    """
    each = [found] * world_size()
    if world_size() > 1:
        dist.all_gather_object(each, found)
    if any(other != found for other in each):
        raise UserError(
            f"{folder}: the processes of this training found different things there, {'; '.join(each)}; put it on a "
            "disk that their machines share"
        )
