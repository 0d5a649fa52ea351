"""What a kind of pipeline answers for itself: a subclass of ``Family`` for each, in a file of ``families/``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..storage.reading import read_record


@dataclass(frozen=True)
class Encoders:
    """What tells a denoiser what to draw, and a latent one's VAE; they stay on disk until they are loaded.

    Attributes:
        family: of the pipeline.
        folder: the pipeline's.
        channels: of images.
        image_size: height and width of images.
        zeros_for_empty: the empty text has embeddings of zeros, as SDXL was trained.
        classes: of a class-conditional pipeline, name or number to class; the empty text is the null class, where it
            has one.
        guidance: as of the family; None also where a pipeline of it is without.
        latent_size: height and width of the latents; None where there is no VAE.
    """

    family: "Family"
    folder: Path
    channels: int
    image_size: int
    zeros_for_empty: bool = False
    classes: dict[str, int] | None = None
    guidance: str | None = None
    latent_size: int | None = None

    @property
    def text_encoders(self) -> list[str]:
        """List the text encoders that the pipeline has."""
        there = [name for name in self.family.text_encoders if (self.folder / name).is_dir()]
        index = read_index(self.folder) if there else {}
        return [name for name in there if any(index.get(name) or [True])]

    @property
    def text_parts(self) -> list[str]:
        """List text encoders and tokenizers."""
        return [part for name in self.text_encoders for part in (tokenizer_of(name), name)]


def tokenizer_of(text_encoder: str) -> str:
    """Name the tokenizer of a text encoder."""
    return text_encoder.replace("text_encoder", "tokenizer")


def read_index(folder: Path) -> dict[str, Any]:
    """Read a pipeline's model_index.json; empty where there is none."""
    path = folder / "model_index.json"
    return read_record(path, "fetch or copy it again") if path.is_file() else {}


def read_config(part: Path) -> dict[str, Any]:
    """Read the config of a pipeline's part."""
    return read_record(part / "config.json", "fetch or copy it again")


def load_parts(folder: Path, *parts: str) -> Any:
    """Load a pipeline with only the parts that are named; the others are None."""
    index = read_index(folder)
    left_out = {name: None for name, value in index.items() if isinstance(value, list) and name not in parts}
    return DiffusionPipeline.from_pretrained(folder, **left_out)


class Family:
    """One kind of diffusers pipeline.

    Attributes:
        pipelines: names of the pipeline classes.
        network: class of the denoiser.
        component: what the pipelines, and files of adapters for them, call their denoiser.
        is_latent: it denoises latents of a VAE, not pixels.
        text_encoders: by their names in the pipeline.
        optional_text_encoders: those of them that a pipeline may be without.
        sizes_input: the input that says how images were cut (Podell et al. 2023); None where there is none.
        guidance: ``classifier-free`` where the empty text stands for no text or class, to which captions are dropped
            and from which guidance leads away; ``embedded`` where the network is told a scale, as one that was
            distilled; None where it knows nothing of the kind.
        has_variance: the network may write a variance behind its prediction, which is left out.
        flows: "" where its pipelines draw with VP schedules, "only" where with flow matching, "too" where with both.
        second_component: what the pipelines call a second denoiser, which takes turns with the first; None where there
            is none.
        has_even_levels: its pipeline asks its own scheduler for σ, before the shift, evenly from 1 to 1 / steps.
        sampler_config: what every sampler of it is told, whatever the base's scheduler says.
    """

    pipelines: tuple[str, ...]
    network: type
    component: str
    second_component: str | None = None
    is_latent: bool = False
    text_encoders: tuple[str, ...] = ()
    optional_text_encoders: tuple[str, ...] = ()
    sizes_input: str | None = None
    guidance: str | None = None
    has_variance: bool = False
    flows: Literal["", "too", "only"] = ""
    has_even_levels: bool = False
    sampler_config: dict[str, Any] = {}  # noqa: RUF012 - no family changes it

    def load(self, folder: Path) -> Any:
        """Load a pipeline's denoisers and scheduler; the other parts are None."""
        return load_parts(folder, *self.components, "scheduler")

    @property
    def components(self) -> list[str]:
        """List what the pipelines call their denoisers."""
        return [name for name in (self.component, self.second_component) if name is not None]

    def joined(self, name: str, networks: dict[str, Any], index: dict[str, Any]) -> Any:
        """Make one denoiser of those that a pipeline has.

        Args:
            name: of the base, for messages.
            networks: by the components' names; None where the pipeline has none.
            index: the pipeline's model_index.json.

        Raises:
            UserError: they aren't used as the family uses them.
        """
        return networks[self.component]

    def turns(self, pipeline: Any) -> dict[str, TimestepRange]:
        """Say which timesteps are whose, of a pipeline with two denoisers; the cleanest first.

        Args:
            pipeline: with denoisers and scheduler.
        """
        return {}

    def parted(self, network: Any) -> dict[str, Any]:
        """List the denoisers that one was made of, by the components' names."""
        return {self.component: network}

    def find_encoders(self, name: str, folder: Path, network: Any) -> Encoders | None:
        """Read the configs of a pipeline's other parts; None where the network is told nothing but x and t.

        Args:
            name: of the base, for messages.

        Raises:
            UserError: a part is missing, or doesn't fit the network.
        """
        raise NotImplementedError

    def shape(self, network: Any, encoders: Encoders | None) -> tuple[int, ...]:
        """Say channels, height and width of what the network denoises."""
        side = square_side(network.config.sample_size)
        return network.config.in_channels, side, side

    def prepare(self, network: nn.Module) -> None:
        """Change in place what a new network would do otherwise in training than in sampling."""

    def predict(
        self, network: Any, x: Float[Tensor, "n ..."], t: Int[Tensor, " n"] | Float[Tensor, " n"], condition: Any
    ) -> Float[Tensor, "n ..."]:
        """Run the network once, on its own inputs under their names.

        Args:
            t: in the base's timesteps, 0 to T - 1, of a flow to T.
            condition: the inputs besides, [n, ...], as ``encode_texts`` names them and in ``sizes_input``.
        """
        return network(x, t, return_dict=False, **condition)[0]

    def timestep_of(self, given: Tensor) -> Tensor:
        """Map what ``predict`` gives the network as ``timestep`` back to the base's timesteps."""
        return given

    def num_tokens(self, network: Any, shape: tuple[int, ...]) -> int | None:
        """Count the tokens of an image, by which a scheduler may shift; None where the pipeline tells it nothing."""
        return None

    def output_layers(self, network: Any) -> dict[str, Any]:
        """Find the layer that writes the output of each block, by the block's name, in the order of the forward pass.

        Folded projections are attached to it: kernel and bias [C, ...].
        """
        raise NotImplementedError

    def trunk_channels(self, network: Any) -> dict[str, int]:
        """Say the channels of each block's feature map [n, C, h, w], by the block's name; empty where there is none."""
        return {}

    def narrow(self, network: Any, keep: float) -> Any:
        """Make an untrained network of the same kind with a share of the channels at every level.

        Raises:
            UserError: there is none: the share is too small, or the kind of network can't be pruned.
        """
        raise UserError(f"a {type(network).__name__} can't be pruned; expected the UNet2DModel of a pipeline on pixels")

    def fill_narrow(self, network: Any, narrow: Any, products: Mapping[str, Tensor]) -> None:
        """Give what ``narrow`` made those channels of a network that matter most.

        Args:
            products: of the loss's gradient and the weight, g·θ, under every parameter's key.
        """
        raise NotImplementedError

    def encode_images(self, vae: Any, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 2 z hz wz"]:
        """Encode images in [-1, 1] to mean and log-variance of latents, in the scale that the denoiser works in."""
        raise NotImplementedError

    def decode_latents(self, vae: Any, latents: Float[Tensor, "n z hz wz"]) -> Float[Tensor, "n c h w"]:
        """Decode latents to images, about in [-1, 1]."""
        raise NotImplementedError

    def load_texts(self, folder: Path, parts: Sequence[str]) -> Any:
        """Load text encoders and tokenizers as a pipeline that ``encode_texts`` takes."""
        return load_parts(folder, *parts)

    def encode_texts(self, pipeline: Any, texts: Sequence[str]) -> dict[str, Float[Tensor, "n ..."]]:
        """Encode texts as the pipeline itself does; what is longer than its text encoders read is cut off.

        Returns:
            The denoiser's inputs by their names, [n, ...]. The empty text is what the pipeline takes where no negative
            prompt is given.
        """
        raise NotImplementedError

    def usage(self, encoders: Encoders | None) -> tuple[str, str]:
        """Say for a model card the hub's tag of what the pipeline does, and the Python that draws with ``pipeline``."""
        raise NotImplementedError

    def save_tiny(self, folder: Path) -> Path:
        """Save a pipeline of random parts, which takes a second to make and no network."""
        raise NotImplementedError


def square_side(size: Any) -> int:
    """Read the side of what a network denoises from its sample_size, a number or two that are equal.

    Raises:
        UserError: it is neither.
    """
    sides = [size] if isinstance(size, int) else list(size or ())
    if not sides or not all(type(side) is int and side > 0 for side in sides) or len(sides) > 2 or len(set(sides)) > 1:
        raise UserError(f"sample_size is {size!r}, expected one integer, or two that are equal: square images")
    return sides[0]
