"""Feature networks by name: uint8 images to named float32 outputs, with the hash of the weights."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import Evaluate, Stats
from ..errors import UserError
from ..models.encoders import ENCODERS, load_encoder, load_text_encoder
from ..models.image_text import holds_image_text, load_image_text
from ..storage.reading import file_sha256
from ..storage.shipped import find_model
from ..storage.tensors import hash_tensors
from .alignment import describe
from .effnet import WIDTH, EffNetFeatures
from .inception import OUTPUTS, WEIGHTS_NAME, InceptionFeatures
from .judge import load_judge

# Where weights are: a file, or a folder or hub name.
Weights = Path | str


@dataclass(frozen=True)
class Extractor:
    """A named feature network.

    Attributes:
        sha256: of its weights.
        outputs: the outputs that images are compared in, with their widths.
        extract: maps uint8 [N, C, H, W] to float32 [N, d] for each output, on its own device; Inception's has the
            logits as well.
        embed: maps texts to float32 [N, d], where the network reads them.
    """

    name: str
    sha256: str
    outputs: dict[str, int]
    extract: Callable[[UInt8[Tensor, "n c h w"]], dict[str, Tensor]]
    embed: Callable[[Sequence[str]], Tensor] | None = None

    @property
    def label(self) -> str:
        """Name and weight hash, as records carry them."""
        return f"{self.name}:{self.sha256[:16]}"


@cache
def _effnet(size: int, device: torch.device) -> EffNetFeatures:
    """Open it once in a process: it is small, and many ask for it."""
    return EffNetFeatures(size).to(device)


def _open_effnet(size: int, weights: Weights | None, device: torch.device) -> Extractor:
    network = _effnet(size, device)
    return Extractor(f"effnetlite{size}", network.sha256, {"features": WIDTH}, _batched(network, device))


def _open_judge(weights: Weights | None, device: torch.device) -> Extractor:
    judge = load_judge(Path(str(weights)))
    sha256 = judge.sha256
    judge.to(device)
    extract = _batched(lambda images: {"features": judge.features(images)}, device)
    return Extractor("judge", sha256, {"features": judge.width}, extract)


def _open_inception(weights: Weights | None, device: torch.device) -> Extractor:
    path = Path(str(weights))
    network = InceptionFeatures(path).to(device)
    if device.type == "cpu":
        # Half again as fast there.
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Extractor("inception", file_sha256(path), OUTPUTS, _batched(network, device))


def _open_encoder(name: str, weights: Weights | None, device: torch.device) -> Extractor:
    encoder = load_encoder(name, str(weights)).to(device)
    return Extractor(name, encoder.sha256, {"features": encoder.width}, _batched(encoder, device))


def _open_image_text(weights: Weights | None, device: torch.device) -> Extractor:
    """Open a CLIP with both its sides, or an image–text model of ours."""
    if holds_image_text(str(weights)):
        return _open_own_image_text(Path(str(weights)), device)
    encoder, texts = load_encoder("clip_text", str(weights)), load_text_encoder(str(weights))

    @torch.no_grad()
    def embed(found: Sequence[str]) -> Float[Tensor, "n d"]:
        # On the device for as long as it is needed: images have it to themselves.
        texts.to(device)
        rows = [texts(found[i : i + 256]).cpu() for i in range(0, len(found), 256)]
        texts.cpu()
        return torch.cat(rows)

    sha256 = hashlib.sha256(f"{encoder.sha256} {texts.sha256}".encode()).hexdigest()
    extract = _batched(encoder.to(device), device)
    return Extractor("clip_text", sha256, {"features": encoder.width}, extract, embed)


def _open_own_image_text(folder: Path, device: torch.device) -> Extractor:
    model, effnet = load_image_text(folder).to(device), _open_effnet(0, None, device)
    sha256 = hashlib.sha256(f"{hash_tensors(sorted(model.state_dict().items()))} {effnet.sha256}".encode()).hexdigest()

    def extract(images: UInt8[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n d"]]:
        return {"features": model.embed_images(describe(images, effnet.extract))}

    def embed(texts: Sequence[str]) -> Float[Tensor, "n d"]:
        return model.embed_texts(texts).cpu()

    return Extractor("clip_text", sha256, {"features": model.width}, _batched(extract, device), embed)


def _batched(network: Callable[[Tensor], dict[str, Tensor]], device: torch.device) -> Callable[[Tensor], dict]:
    # GPUs would round the inputs of convolutions to 10 bits, which moves features by a thousandth.
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    @torch.no_grad()
    def extract(images: UInt8[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _"]]:
        outputs = [network(batch.to(device)) for batch in images.split(64)]
        return {name: torch.cat([o[name].float() for o in outputs]) for name in outputs[0]}

    return extract


class Kind(NamedTuple):
    """How a feature network is opened.

    Attributes:
        setting: the key of the config that says where its weights are; None where they come with a package.
        weights: what these are, and an example of where.
        reads_texts: it embeds texts too, with which images are compared.
    """

    open: Callable[[Weights | None, torch.device], Extractor]
    setting: str | None = None
    weights: tuple[str, str] = ("", "")
    reads_texts: bool = False


def _hub(name: str, network: str) -> tuple[str, str]:
    return f"a {network} model", f"its folder or hub name, such as {ENCODERS[name].example}"


EXTRACTORS = {
    "effnetlite0": Kind(partial(_open_effnet, 0)),
    "effnetlite1": Kind(partial(_open_effnet, 1)),
    "judge": Kind(_open_judge, "judge", ("a judge", "the folder of one, such as fashion-judge")),
    "inception": Kind(
        _open_inception, "inception_weights", ("the TensorFlow Inception weights", f"the file {WEIGHTS_NAME}")
    ),
    "dinov2": Kind(partial(_open_encoder, "dinov2"), "dinov2", _hub("dinov2", "dinov2")),
    "clip": Kind(partial(_open_encoder, "clip"), "clip", _hub("clip", "clip")),
    "clip_text": Kind(_open_image_text, "clip", _hub("clip_text", "clip"), reads_texts=True),
}


def weights_of(name: str, settings: Evaluate | Stats) -> Weights | None:
    """Look up where the weights of a feature network are; None where it has its own, or the settings don't say."""
    setting = EXTRACTORS[name].setting
    found = None if setting is None else getattr(settings, setting)
    return (find_model(found) or found) if isinstance(found, str) else found


def check_weights(metric: str, name: str, settings: Evaluate | Stats) -> None:
    """Require that the settings say where the weights are of the network that a metric is measured on.

    Raises:
        UserError: as said.
    """
    kind = EXTRACTORS[name]
    if kind.setting is not None and weights_of(name, settings) is None:
        needed, example = kind.weights
        raise UserError(
            f"metric {metric!r} needs {needed}: set evaluate.{kind.setting} of a config, or deme evaluate --set "
            f"{kind.setting}=…, to {example}"
        )


def label_of(name: str, weights: Weights | None = None) -> str:
    """Say a feature network's name and the hash of its weights, as records carry them.

    Raises:
        UserError: as ``load_extractor``.
    """
    path = Path(str(weights))
    files = sorted(path.rglob("*")) if path.is_dir() else [path] * path.is_file()
    return _label(name, EXTRACTORS[name], weights, tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@cache
def _label(name: str, kind: Kind, weights: Weights | None, stamps: tuple[tuple[Path, int, int], ...]) -> str:
    return load_extractor(name, torch.device("cpu"), weights).label


def load_extractor(name: str, device: torch.device, weights: Weights | None = None) -> Extractor:
    """Load a feature network.

    Args:
        name: of ``EXTRACTORS``: ``effnetlite0`` and ``effnetlite1`` (EfficientNet-Lite, ImageNet, 1280-d),
            ``inception`` (TensorFlow's; pool3, 2048-d, and the spatial features of the sFID, 2023-d), ``judge``,
            ``dinov2``, ``clip``, or ``clip_text``, which embeds texts too.
        weights: Inception's file, a judge's folder, or the folder or hub name of a DINOv2 or CLIP; for ``clip_text``
            also the folder of an image–text model of ours.

    Raises:
        UserError: the weights are missing, damaged or those of another network.
    """
    # Networks draw weights before they load theirs.
    with torch.random.fork_rng(devices=[]):
        return EXTRACTORS[name].open(weights, device)
