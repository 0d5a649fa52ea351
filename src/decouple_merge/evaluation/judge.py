"""A judge: a small classifier of one data set, whose features tell its images better than a network of photographs."""

from pathlib import Path

from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.images import to_model
from ..errors import UserError
from ..storage.files import read_tensors, write_tensors
from ..storage.reading import looked_for
from ..storage.tensors import hash_tensors

WEIGHTS = "judge.safetensors"
WIDTHS = (32, 64, 96, 96)


class Judge(nn.Module):
    """Classify images; what it averages before the last layer are its features.

    Convolutions of strides 2, 1, 2 and 1, each with batch normalisation and a ReLU, then the mean over the picture.

    Attributes:
        size: of the images it was trained on; others are resized.
        channels: grey is the mean of colours.
        width: of the features.
    """

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        self.channels, self.size, self.width = channels, size, WIDTHS[-1]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((channels, *WIDTHS), WIDTHS, strict=False)):
            kernel, stride = (5 if i == 0 else 3), (2 if i % 2 == 0 else 1)
            convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.classes = nn.Linear(self.width, num_classes)

    @property
    def sha256(self) -> str:
        """The hash of its weights."""
        return hash_tensors(sorted(self.state_dict().items()))

    def features(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Describe images by what the last layer sees of them."""
        x = to_model(images)
        if x.shape[1] != self.channels:
            x = x.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.layers(x).mean((2, 3))

    def forward(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Compute the logits of the classes."""
        return self.classes(self.features(images))


def save_judge(judge: Judge, folder: Path) -> None:
    """Write a judge's weights, and the size of its images with them."""
    write_tensors(folder / WEIGHTS, judge.state_dict(), {"image_size": str(judge.size)})


def load_judge(folder: Path) -> Judge:
    """Read a judge that ``save_judge`` wrote.

    Raises:
        UserError: the folder holds none, or the file is damaged or another network's.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{folder}{looked_for(folder)} has no {WEIGHTS}; expected a judge's folder, such as fashion-judge"
        )
    tensors, metadata = read_tensors(path)
    try:
        size, channels = int(metadata["image_size"]), tensors["layers.0.weight"].shape[1]
        judge = Judge(channels, size, len(tensors["classes.weight"]))
        judge.load_state_dict(tensors)
    except (KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: no whole judge ({reason}); fetch it or make it again") from error
    return judge.requires_grad_(False).eval()
