"""Networks of a base: new ones, with weights, and what they say of noisy images."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..merging.experts import open_model
from ..merging.keys import has_trunk
from ..storage.layouts import denoisers
from ..storage.tensors import check_finite
from .base import Base
from .families import FAMILIES
from .family import read_config, read_index
from .projection import attach_projections


def predict(
    base: Base, network: Any, x: Float[Tensor, "batch ..."], t: Any, **condition: Tensor
) -> Float[Tensor, "batch ..."]:
    """Run a denoiser of the base's family once on noisy images at timesteps t (a number, or one for each image).

    Args:
        network: the base's, or one that is called as it is.
        condition: the network's other inputs by their names in diffusers, each [batch, ...].
    """
    # Transformers take a timestep for each image, U-Nets that and a single one.
    each = torch.as_tensor(t, device=x.device).expand(len(x))
    return base.family.predict(network, x, each, condition)


def cast_inputs(condition: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Put the network's other inputs in its dtype; classes stay numbers."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}


def num_parameters(network: nn.Module) -> int:
    """Count the elements of all parameters."""
    return sum(p.numel() for p in network.parameters())


def empty_network(folder: Path, is_single: bool = False) -> nn.Module:
    """Build the denoiser of a pipeline's folder from its configs alone, on the meta device: shapes without memory.

    Args:
        is_single: of two denoisers take the first alone.
    """
    index, networks = read_index(folder), dict[str, Any]()
    for name, part in denoisers(folder).items():
        config = read_config(part)
        with torch.device("meta"):
            networks[name] = getattr(diffusers, config["_class_name"]).from_config(config)
    family = FAMILIES[index["_class_name"]]
    return networks[family.component] if is_single else family.joined(str(folder), networks, index)


def new_network(base: Base, projection: str = "none") -> nn.Module:
    """Copy the base's network, on the CPU, to be trained, with projections at the identity where asked."""
    network: Any = copy.deepcopy(base.network).requires_grad_(True).train()
    base.family.prepare(network)
    attach_projections(network, base.family, projection)
    return network


def blank_network(
    base: Base, dtype: torch.dtype, device: torch.device | str, has_trunk: bool = False, without_memory: bool = False
) -> nn.Module:
    """Copy the base's network but for its weights, whose memory holds nothing yet; to draw with, not to be trained.

    Args:
        without_memory: its weights are on the meta device, until others are put in their place.
    """
    place = "meta" if without_memory else device

    def blank(parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(parameter, dtype=dtype, device=place), requires_grad=False)

    def moved(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else tensor.to(device, dtype if tensor.is_floating_point() else None)

    # What a deep copy finds in its memo it doesn't copy.
    network: Any = copy.deepcopy(base.network, {id(p): blank(p) for p in base.network.parameters()}).eval()
    base.family.prepare(network)
    attach_projections(network, base.family, "trunk" if has_trunk else "none")
    return network.requires_grad_(False)._apply(moved)


def build_network(
    base: Base, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> nn.Module:
    """Build the network that holds some weights, trunk projections included, to draw with; it alone is held."""
    network = blank_network(base, dtype, device, has_trunk(weights))
    network.load_state_dict(weights)
    return network


def load_network(path: Path) -> dict[str, Tensor]:
    """Read a network's weights: a ``.safetensors`` file, an expert folder, or a pipeline folder with its projections.

    Raises:
        ValueError: there are no safetensors weights at the path, they are damaged, or not finite.
    """
    files = open_model(path)
    weights = {key: files[key] for key in files.entries}
    check_finite(weights, path)
    return weights
