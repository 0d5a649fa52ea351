"""Images described by numbers that a small image–text model reads."""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from ..data.images import to_model

# Side of the picture that stands beside the network's features of an image, which hardly tell its colours.
THUMBNAIL = 4
NUM_FEATURES = 1280 + 3 * THUMBNAIL**2


def describe(images: UInt8[Tensor, "n c h w"], extract: Callable[[Tensor], dict[str, Tensor]]) -> Float[Tensor, "n f"]:
    """Describe images, grey or in colour, by features of EfficientNet-Lite0 (``extract``) and by a thumbnail."""
    images = images.expand(-1, 3, -1, -1)
    thumbnails = F.adaptive_avg_pool2d(to_model(images), THUMBNAIL).flatten(1)
    return torch.cat([extract(images)["features"], thumbnails], 1)
