"""The Inception-v3 of TensorFlow's 2015-12-05 release, on which the published FID values rest."""

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import UserError, is_ours
from ..storage.reading import looked_for

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
# The outputs that images are compared in, with their widths; the logits are for the Inception Score.
OUTPUTS = {"features": 2048, "spatial": 17 * 17 * 7}

# A block has one branch a line, a branch is a row of steps. A step is a pooling, or name:width:kernel of a convolution,
# with "/2" for stride 2, or two of these on the same input, joined by "|".
BLOCK_A = """branch1x1:64:1x1
    branch5x5_1:48:1x1 branch5x5_2:64:5x5
    branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3
    average branch_pool:{num}:1x1"""
BLOCK_B = """branch3x3:384:3x3/2
    branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3/2
    halve"""
BLOCK_C = """branch1x1:192:1x1
    branch7x7_1:{num}:1x1 branch7x7_2:{num}:1x7 branch7x7_3:192:7x1
    branch7x7dbl_1:{num}:1x1 branch7x7dbl_2:{num}:7x1 branch7x7dbl_3:{num}:1x7 branch7x7dbl_4:{num}:7x1 \
        branch7x7dbl_5:192:1x7
    average branch_pool:192:1x1"""
BLOCK_D = """branch3x3_1:192:1x1 branch3x3_2:320:3x3/2
    branch7x7x3_1:192:1x1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 branch7x7x3_4:192:3x3/2
    halve"""
BLOCK_E = """branch1x1:320:1x1
    branch3x3_1:384:1x1 branch3x3_2a:384:1x3|branch3x3_2b:384:3x1
    branch3x3dbl_1:448:1x1 branch3x3dbl_2:384:3x3 branch3x3dbl_3a:384:1x3|branch3x3dbl_3b:384:3x1
    {pool} branch_pool:192:1x1"""


class _Unit(nn.Module):
    """Convolution without bias, batch normalisation with epsilon 0.001, ReLU."""

    def __init__(self, num_in: int, num_out: int, kernel: tuple[int, int], stride: int = 1, same: bool = True) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)
        self.conv: nn.Conv2d = nn.Conv2d(num_in, num_out, kernel, stride, padding, bias=False)
        self.bn: Any = nn.BatchNorm2d(num_out, eps=0.001)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches whose outputs are concatenated; convolutions of stride 1 keep the size, those of stride 2 don't pad."""

    def __init__(self, num_in: int, table: str) -> None:
        super().__init__()
        pools = {
            "average": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            "maximum": nn.MaxPool2d(3, 1, 1),
            "halve": nn.MaxPool2d(3, 2),
        }
        self._branches: list[list[list[str]]] = []
        for line in table.splitlines():
            num, branch = num_in, []
            for step in line.split():
                convolutions = re.findall(r"(\w+):(\d+):(\d)x(\d)(/2)?", step)
                for name, width, height, length, half in convolutions:
                    kernel = int(height), int(length)
                    self.add_module(name, _Unit(num, int(width), kernel, 2 if half else 1, same=not half))
                if convolutions:
                    num = int(width)
                else:
                    self.add_module(step, pools[step])
                branch.append([found[0] for found in convolutions] or [step])
            self._branches.append(branch)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        outputs = []
        for branch in self._branches:
            y = x
            for names in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def resize_tensorflow1(x: Float[Tensor, "n c h w"], side: int = 299) -> Float[Tensor, "n c {side} {side}"]:
    """Resize bilinearly as TensorFlow 1 does: output row i is read at i·h/side, without a half-pixel shift.

    What would be read past the last row or column is the last one. Images that shrink aren't antialiased.
    """
    for dim in (3, 2):
        num = x.shape[dim]
        position = torch.arange(side, device=x.device, dtype=x.dtype) * (num / side)
        low = position.long()
        weight = (position - low).reshape(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=num - 1)), weight)
    return x


def _read_weights(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    advice = f"expected {WEIGHTS_NAME}, a plain state dict: download it (again) from the pytorch-fid project's releases"
    if not path.is_file():
        raise UserError(f"Inception weights: there is no file {path}{looked_for(path)}; {advice}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        if is_ours(error):
            raise
        raise UserError(
            f"Inception weights: {path} is damaged or holds pickled code ({type(error).__name__}); {advice}"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"Inception weights: {path} holds a {type(state).__name__}; {advice}")
    # Batch counts are of use in training only, and PyTorch before 0.4.1 did not write them.
    state = {name: value for name, value in state.items() if not str(name).endswith(".num_batches_tracked")}
    found = {name: tuple(value.shape) if isinstance(value, Tensor) else "no tensor" for name, value in state.items()}
    if wrong := [name for name in expected | found if found.get(name) != expected.get(name)]:
        raise UserError(
            f"Inception weights: {path} has {len(wrong)} missing, unknown or misshapen entries, first {wrong[0]} "
            f"(found {found.get(wrong[0], 'nothing')}, expected {expected.get(wrong[0], 'nothing')}); {advice}"
        )
    return state


class InceptionFeatures(nn.Module):
    """Map images to the outputs of the Inception-v3 behind the published FID, sFID and Inception Score values.

    The network is that of Szegedy et al. 2015 ("Rethinking the Inception Architecture") as TensorFlow's 1,008-way
    release of 2015-12-05 has it, which Heusel et al. 2017 took for the FID: average pooling leaves the padding out, and
    the last block pools maxima. It is frozen and always in evaluation mode.

    Args:
        weights: pt_inception-2015-12-05-6726825d.pth or another state dict with the same names and shapes.

    Raises:
        UserError: the file is missing, damaged, pickled with code, or has other names or shapes.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        with torch.device("meta"):
            self.Conv2d_1a_3x3 = _Unit(3, 32, (3, 3), stride=2, same=False)
            self.Conv2d_2a_3x3 = _Unit(32, 32, (3, 3), same=False)
            self.Conv2d_2b_3x3 = _Unit(32, 64, (3, 3))
            self.pool_1 = nn.MaxPool2d(3, 2)
            self.Conv2d_3b_1x1 = _Unit(64, 80, (1, 1))
            self.Conv2d_4a_3x3 = _Unit(80, 192, (3, 3), same=False)
            self.pool_2 = nn.MaxPool2d(3, 2)
            self.Mixed_5b = _Block(192, BLOCK_A.format(num=32))
            self.Mixed_5c = _Block(256, BLOCK_A.format(num=64))
            self.Mixed_5d = _Block(288, BLOCK_A.format(num=64))
            self.Mixed_6a = _Block(288, BLOCK_B)
            self.Mixed_6b = _Block(768, BLOCK_C.format(num=128))
            self.Mixed_6c = _Block(768, BLOCK_C.format(num=160))
            self.Mixed_6d = _Block(768, BLOCK_C.format(num=160))
            self.Mixed_6e = _Block(768, BLOCK_C.format(num=192))
            self.Mixed_7a = _Block(768, BLOCK_D)
            self.Mixed_7b = _Block(1280, BLOCK_E.format(pool="average"))
            self.Mixed_7c = _Block(2048, BLOCK_E.format(pool="maximum"))
            self.fc = nn.Linear(2048, 1008, bias=False)
        expected = {k: tuple(v.shape) for k, v in self.state_dict().items() if not k.endswith("num_batches_tracked")}
        state = _read_weights(weights, expected | {"fc.bias": (1008,)})
        self.load_state_dict({name: state[name].float() for name in expected}, assign=True)
        self.requires_grad_(False).eval()
        for unit in self.modules():
            if isinstance(unit, _Unit):
                unit.conv, unit.bn = fuse_conv_bn_eval(unit.conv, unit.bn), nn.Identity()

    def train(self, mode: bool = True) -> "InceptionFeatures":
        """Stay in evaluation mode, whatever the mode asked for."""
        return super().train(False)

    def forward(self, images: UInt8[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _"]]:
        """Resize to 299x299 as TensorFlow 1 does, take (x - 128)/128, run the network.

        Args:
            images: uint8 RGB, or grey with one channel, which is repeated; of any size.

        Returns:
            float32: ``features``, pool3, 2048-d and non-negative; ``spatial``, the first 7 channels of ``mixed_6/conv``
            in the order row, column, channel, 2023-d (sFID, Nash et al. 2021, as the evaluator of Dhariwal & Nichol
            2021 takes them); ``logits`` of 1,008 classes without the bias, from which the authors' program computes
            the Inception Score.

        Raises:
            UserError: the images have neither one nor three channels.
        """
        if images.shape[1] not in (1, 3):
            raise UserError(f"images have {images.shape[1]} channels, expected 3 (RGB) or 1 (grey): convert them")
        x = (resize_tensorflow1(images.float()) - 128) / 128
        x = x.expand(-1, 3, -1, -1)
        for name, layer in self.named_children():
            if name == "fc":
                break
            x = layer(x)
            if name == "Mixed_6d":
                # TensorFlow's mixed_6; its 1x1 convolution is the first branch, and so the first channels.
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        features = x.mean((2, 3))
        return {"features": features, "spatial": spatial, "logits": self.fc(features)}
