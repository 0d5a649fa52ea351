"""A base: a pretrained pipeline taken apart, or one made from nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..diffusion.process import Process
from ..errors import UserError, is_ours
from ..merging.experts import open_model
from ..storage.hub import pipeline_folder
from ..storage.layouts import INDEX, PICKLES, WEIGHTS, files_of_parts
from ..storage.reading import read_record
from ..storage.tensors import DTYPES, check_finite, hash_tensors
from .families import FAMILIES, stable_diffusion, unet
from .family import Encoders, Family, read_index, square_side
from .processes import process_of

SUPPORTED = "a diffusers pipeline of a " + "; of a ".join(
    f"{family.network.__name__}: {', '.join(family.pipelines)}" for family in dict.fromkeys(FAMILIES.values())
)

TWO = [name for name, family in FAMILIES.items() if family.second_component]

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()


@dataclass
class Base:
    """A pretrained pipeline, taken apart.

    Attributes:
        family: what kind of pipeline it is.
        pipeline: the diffusers pipeline; ``network`` is its denoiser. Of a loaded one the other parts are None.
        network: the denoiser, float32.
        process: how the base's own schedule mixes images with noise, and what the network says of the mixture.
        sha256: hash of the network's tensors.
        dtype: of the stored weights, in which merged models are written.
        encoders: what tells the network what to draw, where it is told anything, and a latent one's VAE.
    """

    family: Family
    pipeline: Any
    network: Any
    process: Process
    sha256: str
    dtype: torch.dtype = torch.float32
    encoders: Encoders | None = None

    @property
    def num_train_timesteps(self) -> int:
        return self.process.num_train_timesteps

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of what the network denoises: an image, or its latents."""
        return self.family.shape(self.network, self.encoders)

    def timestep_of(self, given: Tensor) -> Tensor:
        """Map what the network is given as ``timestep`` to a timestep that some range holds."""
        return self.process.visited(self.family.timestep_of(given))

    @property
    def image_size(self) -> int:
        return self.encoders.image_size if self.encoders else self.shape[-1]

    @property
    def channels(self) -> int:
        return self.encoders.channels if self.encoders else self.shape[0]


def load_base(name: str, is_single: bool = False) -> Base:
    """Load a base model by folder or hub name; scheduler, prediction type and image size are its own.

    Args:
        is_single: of a base with two denoisers take the first alone, which the other is to be merged into.

    Raises:
        UserError: there is no such model, a file is damaged, its parts don't fit, it is not ``SUPPORTED``, or a single
            denoiser is wanted of one that has no more.
    """
    folder, kind, pipeline = _opened(name)
    family = FAMILIES[kind]
    networks = {part: getattr(pipeline, part, None) for part in family.components}
    for part, each in networks.items():
        if part == family.component or each is not None:
            _check(name, family, kind, each, part)
    network: Any = family.joined(name, networks, read_index(folder))
    if is_single:
        if len(family.parted(network)) < 2:
            raise UserError(
                f"finetune.experts is denoisers, and base {name!r} has one; expected a {' or '.join(TWO)} with two"
            )
        network = networks[family.component]
    _check_whole(name, folder, network, family)
    check_finite(network.state_dict(), f"base {name!r}")
    encoders = family.find_encoders(name, folder, network)
    process = process_of(name, family, network, pipeline.scheduler, family.shape(network, encoders))
    network.requires_grad_(False).eval()
    return Base(
        family,
        pipeline,
        network,
        process,
        tensors_sha256(network.state_dict()),
        stored_dtype(folder),
        encoders,
    )


def _opened(name: str) -> tuple[Path, str, Any]:
    """Load a pipeline; returns its folder and its class's name, too."""
    try:
        folder = pipeline_folder(name)
        if not isinstance(kind := read_index(folder).get("_class_name"), str):
            raise UserError(f"{folder} has no model_index.json that names a pipeline's class")
        # Others are refused below, before gigabytes are loaded.
        pipeline = _load(FAMILIES[kind], folder) if kind in FAMILIES else None
    except (SafetensorError, EOFError) as error:
        raise UserError(f"base {name!r}: its weights file is damaged ({error}); fetch or copy it again") from error
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        if is_ours(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"base {name!r} can't be loaded ({reason}); expected {SUPPORTED}, by folder or hub name"
        ) from error
    if pipeline is None:
        raise UserError(f"base {name!r} is a {kind}; supported is {SUPPORTED}")
    return folder, kind, pipeline


def _load(family: Family, folder: Path) -> Any:
    """Load denoiser and scheduler, whose configs must be of the classes in the index: diffusers believes that alone."""
    index = read_index(folder)
    there = [part for part in family.components if index.get(part) != [None, None]]
    files = [*((part, "config.json") for part in there), ("scheduler", "scheduler_config.json")]
    at_root = (folder / "config.json").is_file()
    for part in there:
        _check_variant(folder / part)
    if missing := [part for part in there if part in index and not ((folder / part).is_dir() or at_root)]:
        raise UserError(
            f"there is no {folder / missing[0]}, which model_index.json lists: fetch or copy the model again"
        )
    for part, file in files:
        if (path := folder / part / file).is_file():
            declared = str((index.get(part) or [""])[-1])
            found = read_record(path, "fetch or copy it again").get("_class_name", declared)
            if not isinstance(found, str) or (part != "scheduler" and found != declared):
                raise UserError(f"{path} is of class {found!r}, model_index.json says {declared}")
    return family.load(folder)


def _check_variant(part: Path) -> None:
    """Refuse a part whose only weights are of a variant, such as fp16: diffusers passes them over."""
    names = [path.name for path in part.glob("*")] if part.is_dir() else []
    found = {n: m for n in names for pattern in (WEIGHTS, INDEX) if (m := pattern.fullmatch(n))}
    if found and all(m["variant"] for m in found.values()) and not any(Path(n).suffix in PICKLES for n in names):
        name, variant = next((name, m["variant"]) for name, m in found.items())
        raise UserError(
            f"{part} has weights of the variant {variant} alone, {name}, expected plain ones: take .{variant} out of "
            "the names of its files, and of those that an index names"
        )


def _check(name: str, family: Family, kind: str, network: Any, part: str) -> None:
    """Require that a pipeline's denoiser is one that its family works with."""
    found_class: Any = type(network)
    if found_class is not family.network:
        found = found_class.__name__ if network is not None else f"no {part}"
        raise UserError(f"base {name!r} is a {kind} with {found}; supported is {SUPPORTED}")
    channels = network.config.in_channels
    out_channels = network.config.get("out_channels") or channels
    if out_channels != channels and not (family.has_variance and out_channels == 2 * channels):
        able = sorted(pipeline for pipeline, other in FAMILIES.items() if other.has_variance)
        raise UserError(
            f"base {name!r} maps {channels} channels to {out_channels}, expected as many out as in: models that "
            f"predict a variance are not supported, but for {', '.join(able)}"
        )
    try:
        if "sample_size" in network.config:
            square_side(network.config.sample_size)
    except UserError as error:
        raise UserError(f"base {name!r}: its {error}") from error


def _check_whole(name: str, folder: Path, network: Any, family: Family) -> None:
    """Require that the files have every tensor of the network: diffusers makes random ones in their place.

    Pickles and folders of several weights are diffusers' to read.
    """
    try:
        stored = open_model(folder).entries
    except UserError:
        return
    # Of one of two denoisers, keys stand behind its name.
    names = {key.removeprefix(f"{family.component}.") for key in stored} | stored.keys()
    if missing := [key for key in network.state_dict() if key not in names]:
        raise UserError(
            f"base {name!r}: its weights file lacks {len(missing)} tensors, {missing[0]} among them; fetch or copy it "
            "again"
        )


def stored_dtype(folder: Path) -> torch.dtype:
    """Read from the files that diffusers takes in which dtype a network is stored; it loads every one as float32."""
    try:
        files = [file for part in files_of_parts(folder).values() for file in part]
    except UserError:
        # Pickles, which are diffusers' to read.
        return torch.float32
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                dtype = DTYPES.get(tensors.get_slice(key).get_dtype())
                if dtype is not None and dtype.is_floating_point:
                    return dtype
    return torch.float32


def create_base(
    model: dict[str, Any], scheduler: dict[str, Any], seed: int, parts: dict[str, Any] | None = None
) -> Base:
    """Make an untrained UNet2DModel in a DDPMPipeline from diffusers' own arguments.

    Args:
        scheduler: of a DDPMScheduler, or of the class that ``_class_name`` says.
        parts: vae, tokenizer and text_encoder, for a UNet2DConditionModel in a StableDiffusionPipeline with them and a
            PNDMScheduler; the channels of its latents and the width of its texts are theirs.

    Raises:
        UserError: diffusers doesn't accept the arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if parts is None:
                pipeline = unet.create_pipeline(model, scheduler)
            else:
                pipeline = stable_diffusion.create_pipeline(model, scheduler, parts)
        except (TypeError, ValueError) as error:
            if is_ours(error):
                raise
            raise UserError(f"pretrain.model or pretrain.scheduler: {error}") from error
    family = FAMILIES[type(pipeline).__name__]
    network: Any = getattr(pipeline, family.component)
    _check("pretrain.model", family, type(pipeline).__name__, network, family.component)
    # Without a VAE there is nothing on disk.
    encoders = family.find_encoders("pretrain.model", Path("pretrain.model"), network) if parts is None else None
    return Base(
        family,
        pipeline,
        network,
        process_of("pretrain.model", family, network, pipeline.scheduler, family.shape(network, encoders)),
        tensors_sha256(network.state_dict()),
        encoders=encoders,
    )


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes of tensors, in the order of their names."""
    return hash_tensors(sorted(tensors.items()))
