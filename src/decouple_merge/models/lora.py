"""The one adapter to peft: experts as low-rank adapters, θ_i = θ + (alpha / rank)·B·A (Hu et al. 2021)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Lora
from ..errors import UserError, not_installed
from ..merging.adapted import Adapted
from ..merging.arithmetic import Tensors
from ..seeds import stream_seed
from .base import Base
from .family import Family

ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"
AGAIN = "remove the expert's folder to finetune it again"


def check_lora(network: nn.Module, settings: Lora) -> None:
    """Require that peft is installed, and that the network has the modules.

    Raises:
        UserError: as said.
    """
    if find_spec("peft") is None:
        raise not_installed("finetune.lora", "peft", "lora")
    modules = dict(network.named_modules())
    names = list(modules)
    matching = {t: [name for name in names if f".{name}".endswith(f".{t}")] for t in settings.target_modules}
    if missing := [target for target, found in matching.items() if not found]:
        raise UserError(
            f"finetune.lora.target_modules: the base has no module {', '.join(missing)}; its attention layers are "
            f"called {', '.join(sorted({n.rpartition('.')[2] for n in names if n.endswith(('to_q', 'to_k', 'to_v'))}))}"
        )

    for target, found in matching.items():
        for name in found:
            if not isinstance(modules[name], nn.Linear | nn.Conv2d | nn.Conv3d):
                raise UserError(
                    f"finetune.lora.target_modules has {target}, and {name} is a {type(modules[name]).__name__}: give "
                    "linear layers or convolutions, such as to_out.0"
                )


def attach_lora(network: nn.Module, settings: Lora, *key: int | str) -> None:
    """Put an adapter beside the target modules, in place, and freeze all else; at first the output doesn't change.

    Args:
        key: of the random stream that the factors A are drawn from; B starts at 0.
    """
    from peft import LoraConfig, inject_adapter_in_model

    alpha = settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=list(settings.target_modules))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(*key))
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)


def _adapters(network: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def without_lora(network: nn.Module) -> Iterator[None]:
    """Run a network with its adapters switched off, as it was before."""
    adapters = list(_adapters(network).values())
    for adapter in adapters:
        adapter.enable_adapters(False)
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enable_adapters(True)


def _factors(network: nn.Module, parameters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of each module with its factors A and B, of which B holds the scale."""
    state = {**network.state_dict(), **parameters}
    for name, adapter in _adapters(network).items():
        down, up = (state[f"{name}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
        yield name, down, up * adapter.scaling[ADAPTER]


def lora_factors(network: nn.Module, family: Family, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the factors as diffusers' ``load_lora_weights`` reads them; B holds the scale, so that there is no alpha.

    Args:
        parameters: values for its named parameters, for example their average.
    """
    factors, start = {}, _prefix(network, family)
    for name, down, up in _factors(network, parameters):
        factors[f"{start}{name}.lora_A.weight"] = down.clone()
        factors[f"{start}{name}.lora_B.weight"] = up
    return factors


def _prefix(network: nn.Module, family: Family) -> str:
    """Say what keys of factors begin with. Of two denoisers in one a layer's name says whose it is."""
    return "" if len(family.parted(network)) > 1 else f"{family.component}."


def as_adapted(base: Base, weights: Tensors, factors: Tensors, name: str) -> Adapted:
    """Take a model that was finetuned by an adapter as the base with its factors.

    Args:
        weights: the whole model's, memory-mapped: of each tensor that the adapter changes one row is compared.
        factors: as ``lora_factors`` names them.
        name: of the model, for messages.

    Raises:
        UserError: the factors change other tensors than the base's, or the weights are others than theirs.
    """
    start, prefix, found = base.network.state_dict(), _prefix(base.network, base.family), {}
    for key, down in factors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            found[f"{module.removeprefix(prefix)}.weight"] = down, factors.get(f"{module}.lora_B.weight", down)
    for key, (down, up) in found.items():
        if key not in start or (len(up), down[0].numel()) != (len(start[key]), start[key][0].numel()):
            raise UserError(f"{name}: its adapter doesn't fit {key} of the base; {AGAIN}")
        row, change = start[key][0].flatten(), (up[:1].flatten(1) @ down.flatten(1))[0]
        # As large as its rounding may be, and that of a product in TF32.
        allowed = 1e-6 * row.norm() + 1e-2 * change.norm()
        if not (weights[key][0].flatten() - row - change).norm() <= allowed:
            raise UserError(f"{name}: its adapter isn't what {key} of its weights was changed by; {AGAIN}")
    return Adapted(start, found)


def unadapted_state_dict(network: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the weights without an adapter, θ + B·A in place of θ, A and B, under the stock keys.

    Args:
        parameters: as of ``lora_factors``.
    """
    state = {**network.state_dict(), **parameters}
    state = {k.replace(".base_layer.", "."): v for k, v in state.items() if f".{ADAPTER}." not in k}
    for name, down, up in _factors(network, parameters):
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return state


def merge_factors(experts: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Combine adapters into one of the summed rank: Σ w_i·B_i·A_i = [w_1·B_1 … w_N·B_N]·[A_1; …; A_N], exactly."""
    merged = {}
    for key in experts[0]:
        if key.endswith(".lora_A.weight"):
            merged[key] = torch.cat([e[key] for e in experts], 0)
        else:
            merged[key] = torch.cat([w * e[key] for e, w in zip(experts, weights, strict=True)], 1)
    return merged
