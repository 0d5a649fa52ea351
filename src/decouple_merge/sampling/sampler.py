"""Draw images with any diffusers scheduler, from one network or an ensemble of them."""

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ..config import Sample, Text
from ..data.images import to_pixels
from ..data.latents import DTYPES, open_texts
from ..diffusion.timesteps import TimestepRange
from ..errors import NotFiniteError, UserError
from ..merging.keys import has_trunk
from ..models.base import Base
from ..models.family import Encoders
from ..models.members import Member
from ..models.mixture import Mixture, mixture_of
from ..models.network import blank_network, build_network, cast_inputs, predict
from ..models.parts import load_vae, texts_to_encode
from ..models.schedulers import make_scheduler, sampler_of

# Maps noisy images, t and what the network takes besides to its prediction.
Denoiser = Callable[..., Tensor]


def sampling_copy(network: nn.Module, settings: Sample, device: torch.device) -> nn.Module:
    """Copy a network in the precision it will sample in, compiled where the settings ask for it."""
    copied = copy.deepcopy(network).to(device, DTYPES[settings.precision]).requires_grad_(False).eval()
    return _compiled(copied, settings)


def sampling_network(base: Base, weights: Mapping[str, Tensor], settings: Sample, device: torch.device) -> nn.Module:
    """Build the network that holds some weights in the precision it will sample in, compiled where it is asked for."""
    return _compiled(build_network(base, weights, DTYPES[settings.precision], device), settings)


def blank_sampling_network(base: Base, has_trunk: bool, settings: Sample, device: torch.device) -> nn.Module:
    """Build the same, whose weights are still to be written."""
    return _compiled(blank_network(base, DTYPES[settings.precision], device, has_trunk), settings)


def _compiled(network: nn.Module, settings: Sample) -> nn.Module:
    if settings.compile:
        network.compile()
    return network


def denoiser(base: Base, network: nn.Module) -> Denoiser:
    """Wrap a network of the base's family so that noisy images go in and its prediction comes out in float32."""
    dtype = next(network.parameters()).dtype
    return lambda x, t, **condition: predict(base, network, x.to(dtype), t, **cast_inputs(condition, dtype)).float()


def ensemble_denoiser(
    base: Base,
    ranges: Sequence[TimestepRange],
    experts: Sequence[dict[str, Tensor]],
    settings: Sample,
    device: torch.device,
) -> Denoiser:
    """Combine experts, one for each range, all in memory or one at a time, as the settings say."""
    return mixture_denoiser(mixture_of(base, ranges, experts), settings, device)


def mixture_denoiser(mixture: Mixture, settings: Sample, device: torch.device) -> Denoiser:
    """Combine the networks of a mixture, all in memory or one at a time, as the settings say."""

    def build(member: Member) -> nn.Module:
        return blank_sampling_network(member.base, has_trunk(member.weights), settings, device)

    return denoiser(mixture.base, mixture.module(settings.one_resident, build))


def choose_prompts(prompts: Sequence[str], seeds: Sequence[int], first_seed: int) -> list[str]:
    """Look up the prompts of some seeds: that of seed s is number s - first_seed, modulo their number."""
    return [prompts[(seed - first_seed) % len(prompts)] for seed in seeds]


def prompts_label(prompts: Sequence[str], settings: Text) -> str:
    """Say what prompts and guidance add to how images were drawn."""
    digest = hashlib.sha256(repr((list(prompts), settings.negative_prompt)).encode()).hexdigest()
    return f"{len(prompts)} texts {digest[:16]}, guidance {settings.guidance_scale:g}"


class Prompts:
    """What a model is asked for: the prompt of seed s is number s - first_seed, modulo their number.

    Prompts are texts, or of a class-conditional model names or numbers of classes.

    Args:
        seeds: that will be asked for, where not all are: of COCO's 40,504 captions a few are soon encoded.

    Attributes:
        label: all that it adds to how images were drawn.
    """

    def __init__(
        self,
        encoders: Encoders,
        prompts: Sequence[str],
        settings: Text,
        device: torch.device,
        precision: str = "fp32",
        first_seed: int = 0,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.prompts, self.settings, self.device, self.first_seed = list(prompts), settings, device, first_seed
        self.encoders = encoders
        wanted = self.prompts if seeds is None else self.choose(seeds)
        self.texts = open_texts(encoders, texts_to_encode(encoders, wanted, settings), precision, device)
        self.vae = load_vae(encoders, device) if encoders.family.is_latent else None
        self.label = prompts_label(self.prompts, settings)

    def choose(self, seeds: Sequence[int]) -> list[str]:
        """Look up the prompts of some seeds."""
        return choose_prompts(self.prompts, seeds, self.first_seed)

    def guide(self, model: Denoiser, seeds: Sequence[int]) -> Denoiser:
        """Bind the prompts of some seeds to a denoiser, with classifier-free guidance (Ho & Salimans 2022).

        f = f(x, negative) + s·(f(x, prompt) - f(x, negative)), both by one call of twice the batch; at s = 1 the
        prompt's alone.
        """
        chosen = self.choose(seeds)
        scale = self.settings.guidance_scale
        leads_away = scale > 1 and self.encoders.guidance == "classifier-free"
        negative = [self.settings.negative_prompt] * len(chosen) if leads_away else []
        condition = self.texts.embed([*negative, *chosen])
        if sizes := self.encoders.family.sizes_input:
            size = self.encoders.image_size
            # The stock pipeline's: an original of that size, not cut.
            condition[sizes] = torch.tensor([[size, size, 0.0, 0.0, size, size]] * len(negative + chosen))
        if self.encoders.guidance == "embedded":
            condition["guidance"] = torch.full((len(chosen),), scale)
        condition = {name: value.to(self.device) for name, value in condition.items()}
        if not negative:
            return lambda x, t: model(x, t, **condition)

        def guided(x: Tensor, t: Any) -> Tensor:
            away, toward = model(torch.cat([x, x]), t, **condition).chunk(2)
            return away + scale * (toward - away)

        return guided

    def decode(self, x: Float[Tensor, "n z h w"]) -> Float[Tensor, "n c hi wi"]:
        """Decode latents to images, about in [-1, 1]; images are left as they are."""
        return x if self.vae is None else self.encoders.family.decode_latents(self.vae, x)


def open_prompts(
    base: Base, prompts: Sequence[str], settings: Text, device: torch.device, precision: str = "fp32"
) -> Prompts | None:
    """Load what a text-to-image model needs to draw; None for other models."""
    return None if base.encoders is None else Prompts(base.encoders, prompts, settings, device, precision)


def seed_batches(seeds: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Cut seeds into the batches that are drawn at once."""
    return [seeds[first : first + batch_size] for first in range(0, len(seeds), batch_size)]


@torch.no_grad()
def sample_images(
    model: Denoiser,
    base: Base,
    seeds: Sequence[int],
    settings: Sample,
    device: torch.device,
    num_steps: int | None = None,
    prompts: Prompts | None = None,
    share: slice = slice(None),
    kept: Sequence[int] | None = None,
) -> Iterator[UInt8[Tensor, "batch c h w"]]:
    """Draw one image for each seed; yields uint8 batches in the order of the seeds.

    Image i depends only on seed i: initial and step noise come from a generator of its own. The last batch is
    filled up before it goes through the network, so that every image meets the same kernels; another batch size
    may pick others, which moves a value by rounding.

    Args:
        model: maps (x_t float32, t) to the network's prediction.
        num_steps: instead of the settings'.
        prompts: for a text-to-image or class-conditional base.
        share: of the batches; other processes draw the others, to the same bits as one would.
        kept: places of the steps that run; all where not given.

    Raises:
        UserError: such a base has no prompts, or another has some.
        NotFiniteError: an image has NaN or infinity.
    """
    check_prompts(base, prompts is not None)
    steps = num_steps or settings.num_steps
    size = min(settings.batch_size, len(seeds))
    for batch in seed_batches(seeds, size)[share]:
        padded = [*batch] + [batch[-1]] * (size - len(batch))
        generators = [torch.Generator().manual_seed(seed) for seed in padded]
        # Multistep samplers keep a history: each batch has its own scheduler.
        scheduler = make_scheduler(base, settings.sampler, steps, settings.timestep_spacing, kept)
        noise = torch.stack([torch.randn(base.shape, generator=g) for g in generators]).to(device)
        x = denoise(model if prompts is None else prompts.guide(model, padded), scheduler, noise, generators)
        images = (x if prompts is None else prompts.decode(x))[: len(batch)]
        _check_finite(images, batch, settings, sampler_of(base, settings.sampler), steps)
        yield to_pixels(images).cpu()


def denoise(model: Denoiser, scheduler: Any, noise: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Go through a scheduler's steps from noise to images, or to their latents."""
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": generators} if takes_generator else {}
    # A flow starts at noise itself, and its samplers scale nothing.
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    # Where the first two timesteps are rounded to one, it would begin at the second.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        x = scheduler.step(model(scale(x, t), t), t, x, return_dict=False, **extra)[0]
    return x


def _check_finite(
    images: Float[Tensor, "n c h w"], seeds: Sequence[int], settings: Sample, sampler: str, num_steps: int
) -> None:
    # As pixels, NaN would be black.
    lost = (~images.isfinite()).flatten(1).any(1).tolist()
    if any(lost):
        raise NotFiniteError(
            f"{sum(lost)} of {len(seeds)} images are NaN or infinite, the first of seed {seeds[lost.index(True)]}, "
            f"drawn in {settings.precision} by {sampler} with {num_steps} steps; expected finite ones: try "
            "another sampler, timestep_spacing or precision. A base that predicts ε can't start at a step of pure noise"
        )


def sampling_fields(base: Base, settings: Sample, prompts: str | None) -> dict[str, str | int | None]:
    """Say what an image depends on besides model and seed, as records carry it.

    Args:
        prompts: their ``prompts_label``.
    """
    scheduler = make_scheduler(base, settings.sampler, settings.num_steps, settings.timestep_spacing)
    return {
        "sampler": sampler_of(base, settings.sampler),
        "num_steps": settings.num_steps,
        "timestep_spacing": scheduler.config.get("timestep_spacing"),
        "precision": settings.precision,
        "prompts": prompts,
    }


def check_prompts(base: Base, has_prompts: bool) -> None:
    """Require prompts for a text-to-image or class-conditional base, and none for another.

    Raises:
        UserError: as said.
    """
    if has_prompts != (base.encoders is not None):
        kind = type(base.pipeline).__name__
        raise UserError(
            f"found prompts for a {kind}, which takes no text: leave them out"
            if has_prompts
            else f"found no prompts for a {kind}, which draws what they say: give a file with one prompt a line"
        )
