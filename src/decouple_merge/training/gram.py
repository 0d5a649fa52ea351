"""The inputs that an expert's layers see in its own range, as their inner products."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ..data.batches import Batch
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..merging.arithmetic import Tensors, cast
from ..merging.keys import check_same_keys
from ..models.base import Base
from ..models.network import predict
from ..seeds import generator
from ..storage.tensors import Layout, num_bytes_of
from .gradient import NoisyBatch, dtype_of, frozen_copy, noisy_batch


def gram_layout(network: nn.Module) -> Layout:
    """List the weights that are matrices on inputs, and the dtype and shape of their inputs' inner products.

    They are those of linear layers, and of convolutions whose channels aren't grouped: [in · height · width] inputs.
    """
    sizes = {f"{name}.weight": module.weight[0].numel() for name, module in _layers(network).items()}
    return {key: (torch.float32, (size, size)) for key, size in sorted(sizes.items())}


def gram_matrices(
    base: Base,
    expert: Tensors,
    own: TimestepRange,
    batches: Callable[[], Iterable[Batch]],
    seed: int,
    device: torch.device,
    max_bytes: int = 2_000_000_000,
) -> Iterator[tuple[str, Float[Tensor, "n n"]]]:
    """Compute G = E[x·xᵀ] of the inputs of every layer, over noisy images at the expert's own timesteps.

    The mean is over images and places: of a linear layer all vectors that it is applied to, of a convolution all
    patches, unfolded. Noise and timesteps of batch b depend only on (seed, b). The network is run again for every
    ``max_bytes`` of matrices, so that no more than these are in memory, or one of them.

    Args:
        batches: makes the same batches whenever it is called.

    Yields:
        Key and G, float32 on the CPU, in the order of ``gram_layout``; 0 of a layer that isn't run.

    Raises:
        UserError: the expert doesn't have the base's keys and shapes, or there are no images.
    """
    check_same_keys(base.network.state_dict(), expert, "the expert")
    network = frozen_copy(base, [expert], device)
    tensors = cast({k: v.to(device) for k, v in expert.items()}, dtype_of(base))
    for keys in _groups(network, max_bytes):
        sums, num = {key: _Sum(module) for key, module in keys.items()}, 0
        with ExitStack() as hooks:
            for total in sums.values():
                hooks.enter_context(total.module.register_forward_pre_hook(total, with_kwargs=True))
            for index, images in enumerate(batches()):
                batch = noisy_batch(base, images, own, generator(seed, "gram", index))
                _run(base, network, tensors, batch, device)
                num += len(images)
        if num == 0:
            raise UserError("found no images, expected at least one batch: the inner products are means over inputs")
        for key, total in sums.items():
            yield key, total.mean()


class _Sum:
    """A hook that sums x·xᵀ of a layer's inputs."""

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        self.module, size = module, module.weight[0].numel()
        self.total = torch.zeros(size, size, device=module.weight.device)
        self.num = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for x in _rows(self.module, args[0] if args else kwargs["input"]):
            self.total.addmm_(x.T, x)
            self.num += len(x)

    def mean(self) -> Tensor:
        return (self.total / max(1, self.num)).cpu()


def _rows(module: nn.Linear | nn.Conv2d, inputs: Tensor) -> Iterator[Tensor]:
    """Yield the inputs that a layer's matrix is applied to, [.., in]; a convolution's image by image."""
    if isinstance(module, nn.Linear):
        yield inputs.float().reshape(-1, inputs.shape[-1])
        return
    settings: Any = {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}
    for image in inputs.float().split(1):
        yield nn.functional.unfold(image, module.kernel_size, **settings)[0].T  # type: ignore[arg-type]


def _layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.groups == 1 and not isinstance(module.padding, str))
    }


def _groups(network: nn.Module, max_bytes: int) -> Iterator[dict[str, nn.Linear | nn.Conv2d]]:
    layers, group, size = _layers(network), dict[str, nn.Linear | nn.Conv2d](), 0
    for key, matrix in gram_layout(network).items():
        if group and size + num_bytes_of(*matrix) > max_bytes:
            yield group
            group, size = {}, 0
        group[key] = layers[key.removesuffix(".weight")]
        size += num_bytes_of(*matrix)
    if group:
        yield group


@torch.no_grad()
def _run(base: Base, network: nn.Module, tensors: Tensors, batch: NoisyBatch, device: torch.device) -> None:
    condition = {name: value.to(device) for name, value in batch.condition.items()}
    x_t, t = batch.x_t.to(device), batch.t.to(device)
    predict(base, lambda *args, **kwargs: functional_call(network, tensors, args, kwargs), x_t, t, **condition)
