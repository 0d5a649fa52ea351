"""The processes that are one training, torchrun's or our own: who is who, and what they tell each other.

A process that joined none is alone, rank 0 of 1. Ports are torchrun's to choose: ``--standalone`` takes a free one. Our
own processes meet in a file.
"""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from .devices import default_device
from .local import run_all
from .sharding import adding_up, share_out

# Some wait while the first fills a cache or draws images. Not for a dead one: torchrun ends them all.
TIMEOUT = timedelta(days=7)


def join(meeting: str | None = None) -> None:
    """Join the processes that were started with this one, and take the GPU of its place; alone, do nothing.

    Args:
        meeting: where they meet, a URL of torch's; torchrun's address where not given.

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
                f"process {place} of this machine has no GPU: there are {num_gpus}; start {num_gpus}, by torchrun's "
                "--nproc_per_node, or by finetune.num_ranks and num_processes"
            )
        torch.cuda.set_device(place)
        options: dict[str, Any] = {"backend": "nccl", "device_id": torch.device("cuda", place)}
    else:
        options = {"backend": "gloo"}
    options |= {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group(**options, init_method=meeting, timeout=TIMEOUT)
    atexit.register(leave)


def together(function: Callable[..., Iterator[Any]], call: tuple[Any, ...], num_ranks: int) -> Iterator[Any]:
    """Run a generator function in several processes that are one training; yields what the first of them yields.

    They take the GPUs of this machine from this process's own place on. Where processes are together already, or one
    is enough, it runs in this one.

    Raises:
        Exception: as ``local.run_all``; as ``join``.
    """
    if num_ranks == 1 or dist.is_initialized():
        yield from function(*call)
        return
    first = torch.cuda.current_device() * num_ranks if torch.cuda.is_available() else 0
    with TemporaryDirectory() as folder:
        ranks = [(f"file://{folder}/meeting", rank, num_ranks, first, function, *call) for rank in range(num_ranks)]
        yield from run_all(_as_rank, ranks, num_ranks)


def _as_rank(
    meeting: str, number: int, num_ranks: int, first: int, function: Callable[..., Iterator[Any]], *call: Any
) -> Iterator[Any]:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(first + number)}
    join(meeting)
    for item in function(*call):
        if is_first():
            yield item
    leave()


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


def averaging(network: nn.Module, device: torch.device, shares_out: bool = False) -> nn.Module:
    """Put a network on a device so that a backward pass leaves the mean of the processes' gradients.

    Args:
        shares_out: its parameters among the processes, each of which then holds a part.
    """
    if world_size() == 1:
        return network.to(device)
    if shares_out:
        share_out(network, device, world_size())
        return network.to(device)
    network.to(device)
    has_unused = getattr(network, "has_unused_parameters", False)
    return DistributedDataParallel(network, gradient_as_bucket_view=True, find_unused_parameters=has_unused)


def accumulating(network: nn.Module) -> AbstractContextManager[None]:
    """Let backward passes only add to this process's gradients; the next one outside averages their sum."""
    if isinstance(network, FSDPModule):
        return adding_up(network)
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
