"""The networks of a mixture: where their weights come from, and that they fit the base."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..config import Merge, load_config
from ..diffusion.process import VP, Process
from ..errors import UserError
from ..merging.experts import Expert, open_expert, open_model, open_parts
from ..merging.keys import check_same_keys, compare_keys
from ..merging.masks import open_masked
from ..storage.hub import pipeline_folder
from ..storage.layouts import denoisers
from ..storage.reading import read_record
from ..storage.run_folder import Run
from ..storage.tensors import TensorFiles, check_finite
from .base import Base
from .family import read_config, read_index
from .identity import config_sha256
from .processes import process_of

# What a network of the mixture may not have otherwise: what goes in, and what comes out.
INTERFACE = (
    "in_channels",
    "out_channels",
    "sample_size",
    "num_class_embeds",
    "class_embed_type",
    "num_embeds_ada_norm",
    "cross_attention_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "text_dim",
    "cap_feat_dim",
)
ADVICE = "fetch or copy it again"


@dataclass(frozen=True)
class Member:
    """A network of a mixture.

    Attributes:
        name: as the mixture has it.
        base: with a network of its architecture, whose weights don't count; the mixture's own where it is the same.
        weights: by the network's keys, memory-mapped or made when they are asked for. What has ``paths`` says which
            files it reads.
    """

    name: str
    base: Base
    weights: Mapping[str, Tensor]


class FileWeights(Mapping[str, Tensor]):
    """The weights in a model's files, memory-mapped."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files

    @property
    def paths(self) -> list[Path]:
        """List the files."""
        return sorted({entry.path for entry in self.files.entries.values()})

    def __getitem__(self, key: str) -> Tensor:
        return self.files[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files.entries)

    def __len__(self) -> int:
        return len(self.files.entries)


class ExpertWeights(Mapping[str, Tensor]):
    """The weights of a LoRA on a base, or of a model whose file has other keys; each is made when it is asked for."""

    def __init__(self, expert: Expert, base: TensorFiles) -> None:
        self.expert, self.base = expert, base

    @property
    def paths(self) -> list[Path]:
        """List the files."""
        return FileWeights(self.base).paths + FileWeights(self.expert.files).paths

    def __getitem__(self, key: str) -> Tensor:
        return self.expert.tensor(key, self.base[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.base.entries)

    def __len__(self) -> int:
        return len(self.base.entries)


@dataclass(frozen=True)
class Place:
    """What the networks of a mixture are opened beside.

    Attributes:
        folder: where its base lies.
        merges: what was opened for masks of it, by where it lies.
    """

    folder: Path
    base: Base
    merges: dict[Path, TensorFiles] = field(default_factory=dict)

    @cached_property
    def files(self) -> TensorFiles:
        """Open the base's weights."""
        return open_parts(denoisers(self.folder))


def open_member(name: str, place: Place) -> Member:
    """Open a network of a mixture.

    Args:
        name: ``base``, or as ``config.MixtureRange.model`` says.

    Raises:
        UserError: it is missing or damaged, of another family, or reads, writes or was trained for something else than
            the base.
    """
    base = place.base
    path = place.folder if name == "base" else pipeline_folder(name)
    if (path / "model_index.json").is_file():
        kind = read_index(path).get("_class_name")
        if kind not in base.family.pipelines:
            raise UserError(f"{name} is a {kind}, expected one of the base's kind: {', '.join(base.family.pipelines)}")
        own = _architecture(name, path, base)
        _check_schedule(name, path, own)
    elif (path / "config.json").is_file() and "_class_name" in read_config(path):
        own = _architecture(name, path, base)
    else:
        return _open_weights(name, path, place)
    try:
        weights = FileWeights(open_model(path))
    except UserError:
        if name != "base":
            raise
        # It was read by diffusers, which knows pickles too.
        return Member(name, base, base.network.state_dict())
    check_same_keys(own.network.state_dict(), weights.files.entries, name)
    check_finite(weights, name)
    return Member(name, own, weights)


def _open_weights(name: str, path: Path, place: Place) -> Member:
    """Open a file or a folder that doesn't say its architecture: the base's, or that of its run's base."""
    base = place.base
    if path.is_file() and (masked := open_masked(path, place.files, place.merges)):
        return Member(name, base, masked)
    expert = open_expert(path)
    check_finite(FileWeights(expert.files), name)
    record, run = _base_of(path), Run(path.parent.parent)
    of_run = run.config.is_file() and (path / "expert.json").is_file()
    # Other networks may have the same keys and shapes: of other heads, or for images of another size.
    differs = of_run and record.get("config") not in (None, config_sha256(base))
    if not differs and not any(compare_keys(base.network.state_dict(), expert.files.entries).values()):
        if isinstance(scheduler := record.get("scheduler"), dict):
            _compare(name, scheduler, base)
        return Member(name, base, FileWeights(expert.files))
    if of_run:
        folder = pipeline_folder(load_config(run.config).base)
        own = _architecture(name, folder, base)
        _check_schedule(name, folder, own)
        check_same_keys(own.network.state_dict(), expert.files.entries, name)
        return Member(name, own, FileWeights(expert.files))
    expert.check_keys(place.files.entries, name, " and ".join(denoisers(place.folder)), Merge(weights=[1]))
    return Member(name, base, ExpertWeights(expert, place.files))


def _architecture(name: str, folder: Path, base: Base) -> Base:
    """Give the base with a network as a folder's config describes it, without memory for its weights.

    Raises:
        UserError: the network is of another class, or reads or writes something else.
    """
    configs = {part: read_config(path) for part, path in denoisers(folder).items()}
    mine = base.family.parted(base.network)
    for config, own in zip(configs.values(), mine.values(), strict=False):
        if config.get("_class_name") != type(own).__name__:
            raise UserError(f"{name} is a {config.get('_class_name')}, expected a {type(own).__name__} as the base is")
        for key in INTERFACE:
            if (found := _plain(config.get(key))) != (expected := _plain(own.config.get(key))):
                raise UserError(
                    f"{name}: its {key} is {found}, of the base {expected}; expected networks that read and write the "
                    "same"
                )
    if len(configs) != len(mine):
        raise UserError(f"{name} has {len(configs)} denoisers, and the base {len(mine)}; expected as many")
    if all(_is_same(config, own.config) for config, own in zip(configs.values(), mine.values(), strict=True)):
        return base
    networks = {}
    for part, config in configs.items():
        kind = getattr(diffusers, config["_class_name"])
        with torch.random.fork_rng(devices=[]):
            networks[part if part else base.family.component] = _without_memory(kind.from_config(config))
    index = read_index(folder)
    network = base.family.joined(name, networks, index) if len(networks) > 1 else next(iter(networks.values()))
    return replace(base, network=network.requires_grad_(False).eval())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _is_same(found: dict[str, Any], own: Any) -> bool:
    """Say whether two configs describe one architecture; a key that one of them lacks has the default there."""
    shared = [key for key in found if key in own and not key.startswith("_")]
    return all(_plain(found[key]) == _plain(own[key]) for key in shared)


def _without_memory(network: nn.Module) -> nn.Module:
    """Leave a network its shapes and buffers."""
    for module in network.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, nn.Parameter(parameter.to("meta"), requires_grad=False))
    return network


def _check_schedule(name: str, folder: Path, own: Base) -> None:
    """Require that a pipeline's schedule is the base's."""
    path = folder / "scheduler/scheduler_config.json"
    if not path.is_file():
        return
    _compare(name, read_record(path, ADVICE), own)


def _base_of(path: Path) -> dict[str, Any]:
    """Read what an expert's record says of its base; nothing where there is none."""
    record = (path if path.is_dir() else path.parent) / "expert.json"
    found = read_record(record, ADVICE).get("base") if record.is_file() else None
    return found if isinstance(found, dict) else {}


def _compare(name: str, config: dict[str, Any], own: Base) -> None:
    kind = getattr(diffusers, str(config.get("_class_name") or config.get("class")), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise UserError(f"{name}: its scheduler is a {config.get('_class_name')!r}, expected one of diffusers")
    # Names with an underscore tell diffusers which values to pass over.
    own_settings = {key: value for key, value in config.items() if key != "class" and not key.startswith("_")}
    scheduler: Any = kind.from_config(own_settings)
    found = process_of(name, own.family, own.network, scheduler, own.shape)
    if different := _difference(found, own.process):
        raise UserError(f"{name} {different}; expected networks for one schedule and one kind of prediction")


def _difference(found: Process, base: Process) -> str | None:
    if type(found) is not type(base):
        return f"is trained by a {type(found).__name__} process, and the base by {type(base).__name__}"
    if found.num_train_timesteps != base.num_train_timesteps:
        return f"has {found.num_train_timesteps} timesteps, and the base {base.num_train_timesteps}"
    if isinstance(found, VP) and isinstance(base, VP):
        if found.prediction_type != base.prediction_type:
            return f"predicts {found.prediction_type}, and the base {base.prediction_type}"
        if not torch.allclose(found.alphas_cumprod, base.alphas_cumprod):
            return "has another ᾱ_t than the base"
    return None
