"""A network shared out among the processes of one training: each holds a part of every tensor (FSDP2).

Zhao et al. 2023, "PyTorch FSDP". A block is gathered while it computes, and its gradient is averaged and shared out
again. So a process holds 1/W of the weights, gradients, averages and moments, and one block.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def share_out(network: nn.Module, device: torch.device, num_ranks: int) -> None:
    """Share out a network's parameters among all processes, in place; what is on the CPU goes to the device by blocks.

    Blocks are the modules of the classes that diffusers keeps whole on a device (``_no_split_modules``), or where it
    names none the members of its lists. What lies in no block is gathered with the network itself.
    """
    mesh = init_device_mesh(device.type, (num_ranks,))
    for block in [*_blocks(network), network]:
        # The network too, since weights that stay gathered would outlive a change of the parts.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """List the blocks, those within others first."""
    modules = list(network.modules())
    names = {name for module in modules for name in getattr(module, "_no_split_modules", None) or ()}
    found = [module for module in modules if type(module).__name__ in names] or list(_members(network))
    return found[::-1]


def _members(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists: smaller ones, such as an attention's last layers, may return views."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _members(child)


@contextmanager
def adding_up(network: FSDPModule) -> Iterator[None]:
    """Let backward passes only add to this process's gradients."""
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def own_part(tensor: Tensor) -> Tensor:
    """Give this process's part of a tensor, in the same memory; the whole of one that isn't shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_part_of(whole: Tensor, part: Tensor) -> Tensor:
    """Make a tensor that is shared out as another from this process's part of it."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def gathered(tensors: Iterable[tuple[str, Tensor]], is_first: bool) -> dict[str, Tensor]:
    """Put tensors together one by one; the first process gets them, on the CPU, the others nothing."""
    found = {}
    for name, tensor in tensors:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_first:
            found[name] = whole.detach().cpu()
    return found
