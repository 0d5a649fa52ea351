"""The memory that a run will need, from configs and the headers of weight files: nothing is loaded to know it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..config import Config, Training
from ..data.latents import DTYPES
from ..merging.rules import RULES
from ..models.base import stored_dtype
from ..models.families import FAMILIES
from ..models.family import read_index
from ..models.lora import attach_lora, check_lora
from ..models.network import empty_network
from ..models.projection import attach_projections
from ..storage.hub import pipeline_folder
from ..storage.layouts import PICKLES, weight_files
from ..storage.tensors import TensorFiles, num_bytes_of
from ..training.made_from import num_ranks
from .combined import are_adapters

# Of bitsandbytes: smaller tensors keep moments of 32 bits, of larger ones a block shares a scale.
MIN_8BIT_SIZE, BLOCK_SIZE, CODEBOOK_SIZE = 4096, 256, 256


@dataclass(frozen=True)
class Stage:
    """What a stage holds on its device, in bytes, by what it is."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = [f"{name} {_size(value)}" for name, value in self.parts.items() if value]
        return f"{self.name}: " + (f"{_size(self.total)} = " if len(parts) > 1 else "") + " + ".join(parts)


def _size(num_bytes: int) -> str:
    factor, unit = next((f, u) for f, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if num_bytes >= f or u == "kB")
    return f"{num_bytes / factor:.1f} {unit}"


def estimate(config: Config) -> list[Stage]:
    """Count the bytes of weights, gradients, averages and moments in each stage of a run.

    Activations, the work space of kernels, images and the networks of metrics are not among them.

    Raises:
        OSError, SafetensorError, ValueError, KeyError: the base can't be read, or has no modules for the adapter.
    """
    folder = pipeline_folder(config.base)
    family, settings = FAMILIES[read_index(folder)["_class_name"]], config.finetune
    is_trained = settings.experts == "trained"
    network = empty_network(folder, is_single=not is_trained)
    size = _num_bytes([*network.parameters(), *network.buffers()])
    shapes = [tuple(p.shape) for p in network.parameters()]
    drawn = sum(map(math.prod, shapes)) * DTYPES[config.sample.precision].itemsize
    vae = {"VAE": _part_bytes(folder / "vae") if family.is_latent else 0}
    texts = {name: num for name in family.text_encoders if (num := _part_bytes(folder / name))}
    stages = [Stage("encoding texts", texts)] if texts else []
    stages += [Stage("encoding images", vae)] if vae["VAE"] else []

    with torch.device("meta"):
        attach_projections(network, family, settings.projection.placement)
        if settings.lora is not None:
            check_lora(network, settings.lora)
            attach_lora(network, settings.lora, "memory")
    if is_trained:
        name = "finetuning an expert" if config.search.combines_experts else "finetuning"
        stages.append(Stage(name, _training(network, size, config)))
    if is_trained and settings.distance:
        two = {f"expert and base in {config.sample.precision}": 2 * drawn}
        stages.append(Stage("drawing with an expert besides", {"averaged weights": size} | two | vae))
    expert = size
    if are_adapters(config):
        expert = _num_bytes(p for p in network.parameters() if p.requires_grad)
    elif settings.projection.placement == "trunk":
        expert = _num_bytes(network.parameters())
    stored = stored_dtype(folder)
    stages += _merging(config, size, shapes, {f"network in {config.sample.precision}": drawn} | vae, stored)
    # Weights that are stored in float32 are used as they lie in their files.
    is_mapped = stored == torch.float32
    stages.append(Stage("besides on the CPU", {"base": 0 if is_mapped else size}))
    what = "experts" if config.search.combines_experts else "models"
    files = {"base": size if is_mapped else 0, f"{config.num_combined} {what}": config.num_combined * expert}
    stages.append(Stage("in files that are mapped, as far as memory is left", files))
    return [stage for stage in stages if stage.total]


def _merging(
    config: Config, size: int, shapes: list[tuple[int, ...]], drawing: dict[str, int], stored: torch.dtype
) -> list[Stage]:
    """List the stages after the trainings.

    Args:
        size: of the network in float32, in bytes.
        shapes: of its parameters.
        drawing: what is held to draw with one model.
    """
    num, rule, (network, drawn) = config.num_combined, RULES[config.search.method], next(iter(drawing.items()))
    # Of the largest tensor the models' versions, their task vectors, votes and the rule's own. A CPU works in chunks.
    one = (2 * num + 4 + rule.num_tensors) * 4 * max(map(math.prod, shapes)) + max(map(rule.work, shapes))
    kept = 4 * sum(rule.kept(shape, num) for shape in shapes)
    searching = drawing | {"merging a tensor": one, f"what {config.search.method} keeps": kept}
    written = {"merge as it is written": sum(map(math.prod, shapes)) * stored.itemsize}
    learning = {"network to learn with": size, "gradients": size}
    stages = []
    if num:
        stages.append(Stage("searching, each worker", searching))
        stages.append(Stage("writing the merged model", searching | written))
    if config.distil is not None:
        moments = _moments([*map(math.prod, shapes)], config.distil)
        parts = {"network": size, f"{num} teachers": num * size, "gradients": size, "EMA": size, "moments": moments}
        stages.append(Stage("pulling the merged model to the experts", parts))
    if num and config.search.learns_start:
        stages.append(Stage("learning a start of the search", searching | learning))
    stages.append(Stage("drawing, one model", drawing))
    if config.search.combines_experts:
        num_held = 1 if config.sample.one_resident else num
        held = {f"{num_held} of {num} networks{network.removeprefix('network')}": num_held * drawn}
        stages.append(Stage("drawing, the ensemble", held | {"VAE": drawing["VAE"]}))
    return stages


def _training(network: nn.Module, size: int, config: Config) -> dict[str, int]:
    trained = [p for p in network.parameters() if p.requires_grad]
    balancing = config.finetune.balancing
    # Those of each cluster, beside the one that is made of them.
    num_gradients = balancing.num_clusters if balancing and balancing.method in ("ant_nash", "pcgrad") else 0
    has_teacher = config.finetune.consistency_weight > 0 and config.finetune.lora is None
    held = {
        "network": _num_bytes([*network.parameters(), *network.buffers()]),
        "teacher": size if has_teacher else 0,
        "gradients": _num_bytes(trained) * (1 + num_gradients),
        "EMA": _num_bytes(trained),
        "moments": _moments([p.numel() for p in trained], config.finetune),
    }
    # A process holds its part, besides the block that computes.
    num_parts = num_ranks(config.finetune) if config.finetune.sharding == "full" else 1
    return {name: -(-num_bytes // num_parts) for name, num_bytes in held.items()}


def _moments(sizes: list[int], settings: Training) -> int:
    """Count the bytes of AdamW's two moments, and of what is kept with them for each parameter."""
    if settings.optimizer == "adamw":
        return sum(8 * n + 4 for n in sizes)
    large = [n for n in sizes if n >= MIN_8BIT_SIZE]
    scales = sum(8 * math.ceil(n / BLOCK_SIZE) for n in large)
    return sum(8 * n for n in sizes if n < MIN_8BIT_SIZE) + sum(2 * n for n in large) + scales + 8 * CODEBOOK_SIZE


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _part_bytes(folder: Path) -> int:
    """Count the bytes of a pipeline's part in float32, as it is loaded; of pickles, the files'."""
    for name in ("model", "diffusion_pytorch_model"):
        for path in (folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"):
            if path.is_file():
                entries = TensorFiles(weight_files(path)).entries.values()
                return sum(num_bytes_of(torch.float32, e.shape) for e in entries if e.dtype.is_floating_point)
    return sum(path.stat().st_size for path in folder.glob("*") if path.suffix in PICKLES)


def describe_memory(config: Config) -> list[str]:
    """Say what each stage holds; nothing where the base can't be read, about which ``plan.check`` says more."""
    try:
        stages = estimate(config)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError, RuntimeError):
        return []
    return [
        "memory, without activations, which grow with batch_size, and without networks of metrics:",
        *(f"  {stage}" for stage in stages),
    ]
