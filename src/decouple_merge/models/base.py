"""The adapter to diffusers: load a base, run its network, build its sampler, export."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..diffusion.losses import PREDICTION_TYPES
from ..merging.keys import has_trunk
from ..storage.files import atomic_path
from ..storage.hub import pipeline_folder
from ..storage.tensors import DENOISERS, DTYPES, PROJECTIONS_FILE, TensorFiles, hash_tensors, model_files
from .parts import LATENT, Encoders, find_encoders, load_parts, read_index
from .projection import attach_projections

SUPPORTED = (
    "a diffusers pipeline of a UNet2DModel and a scheduler (DDPMPipeline, DDIMPipeline, …) with a VP schedule, or a "
    "StableDiffusionPipeline, StableDiffusionXLPipeline or DiTPipeline"
)
ADDED_INPUTS = ("text_embeds", "time_ids")

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()


@dataclass
class Base:
    """A pretrained pipeline, taken apart.

    Attributes:
        pipeline: the diffusers pipeline; ``network`` is its denoiser. A latent pipeline is without its encoders.
        network: UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel, float32.
        alphas_cumprod: ᾱ_t of the base's own schedule, float32 [T].
        prediction_type: epsilon, sample or v_prediction.
        sha256: hash of the network's tensors.
        dtype: of the stored weights, in which merged models are written.
        encoders: VAE and text encoders or classes, where the network denoises latents of what a text or class says.
    """

    pipeline: Any
    network: Any
    alphas_cumprod: Float[Tensor, " T"]
    prediction_type: str
    sha256: str
    dtype: torch.dtype = torch.float32
    encoders: Encoders | None = None

    @property
    def component(self) -> str:
        """What the pipeline calls its denoiser: unet or transformer."""
        return "unet" if hasattr(self.pipeline, "unet") else "transformer"

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network denoises: an image, or its latents."""
        size = self.network.config.sample_size
        return self.network.config.in_channels, size, size

    @property
    def image_size(self) -> int:
        return self.encoders.image_size if self.encoders else self.network.config.sample_size

    @property
    def channels(self) -> int:
        return self.encoders.channels if self.encoders else self.network.config.in_channels


def load_base(name: str) -> Base:
    """Load a base model by folder or hub name; scheduler, prediction type and image size are its own.

    Raises:
        ValueError: there is no such model, a file is damaged, its parts don't fit, or it is not ``SUPPORTED``.
    """
    try:
        folder = pipeline_folder(name)
        index = read_index(folder)
        is_flow = str((index.get("scheduler") or [""])[-1]).startswith("FlowMatch")
        # Refused below, before gigabytes are loaded.
        pipeline = None if is_flow else load_parts(folder, "unet", "transformer", "scheduler")
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"base {name!r}: its weights file is damaged ({error}); fetch or copy it again") from error
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"base {name!r} can't be loaded ({reason}); expected {SUPPORTED}, by folder or hub name"
        ) from error
    if is_flow:
        raise ValueError(
            f"base {name!r} is a {index['_class_name']}, which is trained by flow matching: its schedule has no ᾱ_t; "
            f"supported is {SUPPORTED}"
        )
    network: Any = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    scheduler: Any = getattr(pipeline, "scheduler", None)
    is_latent, is_dit = type(pipeline).__name__ in LATENT, type(pipeline).__name__ == "DiTPipeline"
    expected: Any = DiTTransformer2DModel if is_dit else UNet2DConditionModel if is_latent else UNet2DModel
    if type(network) is not expected or hasattr(pipeline, "vqvae") or (hasattr(pipeline, "vae") and not is_latent):
        kind = type(network).__name__ if network is not None else "no unet"
        raise ValueError(f"base {name!r} is a {type(pipeline).__name__} with {kind}; supported is {SUPPORTED}")
    channels, out_channels = network.config.in_channels, network.config.out_channels
    # The pipeline of a DiT leaves a learned variance out; those of U-Nets hand it on to their schedulers.
    if out_channels != channels and not (is_dit and out_channels == 2 * channels):
        raise ValueError(
            f"base {name!r} maps {channels} channels to {out_channels}, expected as many out as in: models that "
            "predict a variance are not supported, but for DiT"
        )
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if alphas_cumprod is None or prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"base {name!r} has a {type(scheduler).__name__} with prediction type {prediction_type!r}; "
            f"supported is {SUPPORTED}"
        )
    size = network.config.sample_size
    if not isinstance(size, int):
        raise ValueError(f"base {name!r} has sample_size {size!r}, expected one integer: square images")
    encoders = find_encoders(name, folder, network) if is_latent else None
    network.requires_grad_(False).eval()
    sha256 = tensors_sha256(network.state_dict())
    return Base(pipeline, network, alphas_cumprod.float(), prediction_type, sha256, stored_dtype(folder), encoders)


def stored_dtype(folder: Path) -> torch.dtype:
    """Read from the file in which dtype a network is stored; diffusers loads every one as float32."""
    places = ("unet/*.safetensors", "transformer/*.safetensors", "*.safetensors")
    for file in sorted(file for place in places for file in folder.glob(place)):
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
        parts: vae, tokenizer and text_encoder, for a UNet2DConditionModel in a StableDiffusionPipeline with them and a
            PNDMScheduler; the channels of its latents and the width of its texts are theirs.

    Raises:
        ValueError: diffusers doesn't accept the arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if parts is None:
                network: Any = UNet2DModel(**model)
                pipeline: Any = DDPMPipeline(network, DDPMScheduler(**scheduler))
            else:
                channels, width = parts["vae"].config.latent_channels, parts["text_encoder"].config.hidden_size
                network = UNet2DConditionModel(
                    **model, in_channels=channels, out_channels=channels, cross_attention_dim=width
                )
                pipeline = diffusers.StableDiffusionPipeline(
                    **parts,
                    unet=network,
                    scheduler=diffusers.PNDMScheduler(**scheduler),
                    safety_checker=None,
                    feature_extractor=None,
                    requires_safety_checker=False,
                )
        except (TypeError, ValueError) as error:
            raise ValueError(f"pretrain.model or pretrain.scheduler: {error}") from error
    return Base(
        pipeline,
        network,
        pipeline.scheduler.alphas_cumprod.float(),
        pipeline.scheduler.config["prediction_type"],
        tensors_sha256(network.state_dict()),
    )


def save_pipeline(base: Base, folder: Path) -> None:
    """Write a base that was made here, with all of its parts."""
    with atomic_path(folder) as temporary:
        base.pipeline.save_pretrained(temporary)


def predict(
    network: Callable[..., Any], x: Float[Tensor, "batch c h w"], t: Any, **condition: Tensor
) -> Float[Tensor, "batch c h w"]:
    """Run the denoiser once on noisy images at timesteps t (a number, or one for each image).

    A learned variance, the other half of a DiT's channels, is left out, as its pipeline does.

    Args:
        condition: the network's other inputs by their names in diffusers, each [batch, ...].
    """
    # A DiT takes a timestep for each image, U-Nets that and a single one.
    each = torch.as_tensor(t, device=x.device).expand(len(x))
    return network(x, each, return_dict=False, **_nest_inputs(condition))[0][:, : x.shape[1]]


def cast_inputs(condition: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Put the network's other inputs in its dtype; classes stay numbers."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}


def _nest_inputs(condition: dict[str, Tensor]) -> dict[str, Any]:
    """Put the inputs that SDXL's network takes in a dict of their own into one."""
    added = {name: condition[name] for name in ADDED_INPUTS if name in condition}
    others = {name: value for name, value in condition.items() if name not in added}
    return {**others, "added_cond_kwargs": added} if added else others


def num_parameters(network: nn.Module) -> int:
    """Count the elements of all parameters."""
    return sum(p.numel() for p in network.parameters())


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes of tensors, in the order of their names."""
    return hash_tensors(sorted(tensors.items()))


def make_scheduler(base: Base, sampler: str, num_steps: int, timestep_spacing: str | None) -> Any:
    """Build any diffusers scheduler from the base's own config, with its timesteps set.

    Raises:
        ValueError: diffusers has no such scheduler, or it refuses the number of steps.
    """
    name = sampler if sampler.endswith("Scheduler") else sampler + "Scheduler"
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        known = sorted(
            n.removesuffix("Scheduler") for n in dir(diffusers) if n.endswith("Scheduler") and "Flax" not in n
        )
        raise ValueError(f"sampler is {sampler!r}, expected one of {', '.join(known)}")
    changes: dict[str, Any] = {} if timestep_spacing is None else {"timestep_spacing": timestep_spacing}
    if base.encoders is not None:
        # Latents go beyond [-1, 1], and a scheduler that doesn't clip hands this default on to one that does.
        changes["clip_sample"] = False
    try:
        scheduler = cls.from_config(base.pipeline.scheduler.config, **changes)
        scheduler.set_timesteps(num_steps)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise ValueError(f"sampler {name} with {num_steps} steps: {error}") from error
    return scheduler


def export_pipeline(
    base: Base, weights: dict[str, Tensor], folder: Path, card: str | None, record: dict[str, Any] | None
) -> None:
    """Write the base's pipeline with other weights, and where given a model card and merge.json.

    The folder appears whole or not at all. A latent pipeline's other parts are copied as they are. Trunk
    projections among the weights go to ``projections.safetensors`` beside the network, which stock diffusers doesn't
    read.
    """
    stock = base.network.state_dict()
    extra = {k: v for k, v in weights.items() if k not in stock}
    # A copy: the caller's base stays what it was.
    network: Any = new_network(base)
    network.load_state_dict({k: weights[k] for k in stock})
    network.to(base.dtype)
    # Where it was loaded from says nothing of what it is now.
    network.register_to_config(_name_or_path="")
    with atomic_path(folder) as temporary:
        if base.encoders is not None:
            _copy_encoders(base.encoders.folder, temporary, base.component)
            network.save_pretrained(temporary / base.component)
        else:
            type(base.pipeline)(**{**base.pipeline.components, "unet": network}).save_pretrained(temporary)
        if extra:
            save_file(extra, temporary / PROJECTIONS_FILE)
        if record is not None:
            (temporary / "merge.json").write_text(json.dumps(record, indent=2) + "\n")
        if card is not None:
            (temporary / "README.md").write_text(card)


def _copy_encoders(pipeline: Path, folder: Path, component: str) -> None:
    # Loaded and saved again, parts in half precision would come out twice as large.
    own = {component, PROJECTIONS_FILE}
    shutil.copytree(pipeline, folder, ignore=lambda at, names: own & set(names) if Path(at) == pipeline else set())


def empty_network(folder: Path) -> nn.Module:
    """Build the denoiser of a pipeline's folder from its config alone, on the meta device: shapes without memory."""
    at = next((folder / name for name in DENOISERS if (folder / name).is_dir()), folder)
    config = json.loads((at / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def new_network(base: Base, projection: str = "none") -> nn.Module:
    """Copy the base's network, on the CPU, with projections at the identity where asked."""
    with torch.random.fork_rng(devices=[]):
        network = type(base.network).from_config(base.network.config)
    network.load_state_dict(base.network.state_dict())
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            # In training, every block of a DiT would drop other labels than the next, and the teacher none.
            module.dropout_prob = 0.0
    attach_projections(network, projection)
    return network


def build_network(base: Base, weights: dict[str, Tensor]) -> nn.Module:
    """Build the network that holds some weights, trunk projections included."""
    network = new_network(base, "trunk" if has_trunk(weights) else "none")
    network.load_state_dict(weights)
    return network


def load_network(path: Path) -> dict[str, Tensor]:
    """Read a network's weights: a ``.safetensors`` file, an expert folder, or a pipeline folder with its projections.

    Raises:
        ValueError: there are no safetensors weights at the path, or they are damaged.
    """
    files = TensorFiles(model_files(path))
    return {key: files[key] for key in files.entries}
