"""The Inception network against torch-fidelity 0.4.0: its names and shapes, and stored features of random weights.

torch-fidelity pulls torchvision, so it isn't installed here. The table UNITS and the numbers in EXPECTED come from its
``FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], file)`` on the file and the images
that are made below; the spatial features are what its Mixed_6d gave.
"""

import copy
import hashlib
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from decouple_merge.evaluation.extractors import load_extractor
from decouple_merge.evaluation.inception import OUTPUTS, InceptionFeatures, resize_tensorflow1

# Block, then its convolutions: name, channels out, channels in, kernel height and width.
UNITS = """
Conv2d_1a_3x3 ,32,3,3,3
Conv2d_2a_3x3 ,32,32,3,3
Conv2d_2b_3x3 ,64,32,3,3
Conv2d_3b_1x1 ,80,64,1,1
Conv2d_4a_3x3 ,192,80,3,3
Mixed_5b branch1x1,64,192,1,1 branch5x5_1,48,192,1,1 branch5x5_2,64,48,5,5 branch3x3dbl_1,64,192,1,1
Mixed_5b branch3x3dbl_2,96,64,3,3 branch3x3dbl_3,96,96,3,3 branch_pool,32,192,1,1
Mixed_5c branch1x1,64,256,1,1 branch5x5_1,48,256,1,1 branch5x5_2,64,48,5,5 branch3x3dbl_1,64,256,1,1
Mixed_5c branch3x3dbl_2,96,64,3,3 branch3x3dbl_3,96,96,3,3 branch_pool,64,256,1,1
Mixed_5d branch1x1,64,288,1,1 branch5x5_1,48,288,1,1 branch5x5_2,64,48,5,5 branch3x3dbl_1,64,288,1,1
Mixed_5d branch3x3dbl_2,96,64,3,3 branch3x3dbl_3,96,96,3,3 branch_pool,64,288,1,1
Mixed_6a branch3x3,384,288,3,3 branch3x3dbl_1,64,288,1,1 branch3x3dbl_2,96,64,3,3 branch3x3dbl_3,96,96,3,3
Mixed_6b branch1x1,192,768,1,1 branch7x7_1,128,768,1,1 branch7x7_2,128,128,1,7 branch7x7_3,192,128,7,1
Mixed_6b branch7x7dbl_1,128,768,1,1 branch7x7dbl_2,128,128,7,1 branch7x7dbl_3,128,128,1,7 branch7x7dbl_4,128,128,7,1
Mixed_6b branch7x7dbl_5,192,128,1,7 branch_pool,192,768,1,1
Mixed_6c branch1x1,192,768,1,1 branch7x7_1,160,768,1,1 branch7x7_2,160,160,1,7 branch7x7_3,192,160,7,1
Mixed_6c branch7x7dbl_1,160,768,1,1 branch7x7dbl_2,160,160,7,1 branch7x7dbl_3,160,160,1,7 branch7x7dbl_4,160,160,7,1
Mixed_6c branch7x7dbl_5,192,160,1,7 branch_pool,192,768,1,1
Mixed_6d branch1x1,192,768,1,1 branch7x7_1,160,768,1,1 branch7x7_2,160,160,1,7 branch7x7_3,192,160,7,1
Mixed_6d branch7x7dbl_1,160,768,1,1 branch7x7dbl_2,160,160,7,1 branch7x7dbl_3,160,160,1,7 branch7x7dbl_4,160,160,7,1
Mixed_6d branch7x7dbl_5,192,160,1,7 branch_pool,192,768,1,1
Mixed_6e branch1x1,192,768,1,1 branch7x7_1,192,768,1,1 branch7x7_2,192,192,1,7 branch7x7_3,192,192,7,1
Mixed_6e branch7x7dbl_1,192,768,1,1 branch7x7dbl_2,192,192,7,1 branch7x7dbl_3,192,192,1,7 branch7x7dbl_4,192,192,7,1
Mixed_6e branch7x7dbl_5,192,192,1,7 branch_pool,192,768,1,1
Mixed_7a branch3x3_1,192,768,1,1 branch3x3_2,320,192,3,3 branch7x7x3_1,192,768,1,1 branch7x7x3_2,192,192,1,7
Mixed_7a branch7x7x3_3,192,192,7,1 branch7x7x3_4,192,192,3,3
Mixed_7b branch1x1,320,1280,1,1 branch3x3_1,384,1280,1,1 branch3x3_2a,384,384,1,3 branch3x3_2b,384,384,3,1
Mixed_7b branch3x3dbl_1,448,1280,1,1 branch3x3dbl_2,384,448,3,3 branch3x3dbl_3a,384,384,1,3 branch3x3dbl_3b,384,384,3,1
Mixed_7b branch_pool,192,1280,1,1
Mixed_7c branch1x1,320,2048,1,1 branch3x3_1,384,2048,1,1 branch3x3_2a,384,384,1,3 branch3x3_2b,384,384,3,1
Mixed_7c branch3x3dbl_1,448,2048,1,1 branch3x3dbl_2,384,448,3,3 branch3x3dbl_3a,384,384,1,3 branch3x3dbl_3b,384,384,3,1
Mixed_7c branch_pool,192,2048,1,1
"""
# Two channels of each branch of the last block; EXPECTED holds the mean of an output, then these of its values.
CHECKED = {
    "features": [113, 269, 343, 687, 717, 909, 1145, 1439, 1527, 1695, 1914, 1983],
    "spatial": [2, 191, 397, 605, 818, 1045, 1276, 1517, 1752, 2021],
    "logits": [0, 1, 6, 7, 118, 119, 500, 800, 1000, 1007],
}
EXPECTED = {
    ("small", "features"): "2.90079 6.49895 6.22137 7.26664 8.10162 5.84003 6.6492 5.38133 7.3297 8.86446 8.25075 "
    "10.0742 11.4613",
    ("large", "features"): "3.24634 6.82688 7.27763 8.43791 8.85016 6.36916 7.57556 5.20815 7.98246 9.77043 8.88583 "
    "11.6964 13.0903",
    ("grey", "features"): "2.33705 5.15536 5.24166 5.7723 6.49439 4.57621 5.47829 4.50528 5.59195 6.96831 6.59921 "
    "8.43842 9.45181",
    ("small", "spatial"): "1.97875 1.17886 0.402376 6.2734 0.999009 0.953412 2.39112 2.98513 9.62099 1.73147 3.27148",
    ("large", "spatial"): "2.33142 1.28914 1.48284 7.96515 1.05403 0.753365 2.70099 2.82317 9.43153 1.78057 4.16416",
    ("grey", "spatial"): "1.56883 1.03442 0.443968 4.24309 1.51139 0.705103 1.99523 1.74907 6.98774 1.11248 2.11821",
    ("small", "logits"): "0.218359 19.4275 25.5763 -8.20891 38.7813 49.9337 -41.918 -48.8748 -19.6072 15.0129 -33.8402",
    ("large", "logits"): "0.245818 22.3974 30.8069 -9.20102 43.4058 57.3735 -46.7454 -54.5441 -19.8 16.373 -37.5676",
    ("grey", "logits"): "0.209461 14.8976 21.0826 -7.17604 30.0312 40.2835 -34.382 -39.0563 -16.6765 12.6991 -28.5928",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the file."""
    result: dict[str, tuple[int, ...]] = {}
    for line in UNITS.strip().splitlines():
        block, *units = line.split()
        for unit in units:
            name, *shape = unit.split(",")
            prefix = f"{block}.{name}" if name else block
            result[f"{prefix}.conv.weight"] = tuple(map(int, shape))
            for kind in ("weight", "bias", "running_mean", "running_var"):
                result[f"{prefix}.bn.{kind}"] = (int(shape[0]),)
    return result | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}


def random_weights() -> dict[str, Tensor]:
    """Uniform weights from NumPy's frozen generator, such that activations keep their size through the layers."""
    low_high = {"conv.weight": (-1, 1), "bn.weight": (0.8, 1.2), "bn.running_var": (0.2, 0.6)}
    weights = {}
    for name, shape in shapes().items():
        low, high = low_high.get(name.split(".", name.count(".") - 1)[-1], (-0.2, 0.2))
        values = np.random.RandomState(zlib.crc32(name.encode())).uniform(low, high, shape)
        if name.endswith("conv.weight"):
            values *= np.sqrt(2.4 / np.prod(shape[1:]))
        weights[name] = torch.from_numpy(values).float()
    return weights


def images() -> dict[str, Tensor]:
    """Random uint8 images: smaller than the network's input and larger, not square, colour and grey."""
    random = np.random.RandomState(0)
    sizes = {"small": (1, 3, 32, 48), "large": (1, 3, 420, 310), "grey": (1, 1, 28, 28)}
    return {name: torch.from_numpy(random.randint(0, 256, size, dtype=np.uint8)) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_weights(), path)
    return path


@pytest.fixture(scope="module")
def network(weights_file: Path) -> InceptionFeatures:
    return InceptionFeatures(weights_file)


@pytest.mark.parametrize("name", list(images()))
def test_outputs_equal_those_of_torch_fidelity(network: InceptionFeatures, name: str) -> None:
    for output, values in network(images()[name]).items():
        assert values.shape == (1, OUTPUTS.get(output, 1008))
        assert values.dtype == torch.float32
        found = [values.mean().item(), *values[0, CHECKED[output]].tolist()]
        assert found == pytest.approx(list(map(float, EXPECTED[name, output].split())), rel=1e-4)


def test_spatial_features_are_in_the_order_of_tensorflow(network: InceptionFeatures) -> None:
    """Row, column, channel: in another order, mu_s of ADM's files would not belong to them."""
    captured: list[Tensor] = []
    network = copy.deepcopy(network)
    network.get_submodule("Mixed_6d").register_forward_hook(lambda *call: captured.append(call[2]))
    spatial = network(images()["small"])["spatial"]
    for row, column, channel in [(0, 0, 6), (3, 9, 2), (16, 15, 0)]:
        assert spatial[0, (row * 17 + column) * 7 + channel] == captured[0][0, channel, row, column]


def test_resize_reads_row_i_at_i_times_h_over_side_and_clamps() -> None:
    """A plane 10·row + column: bilinear reading is exact, up to the last row and column."""
    height, width, side = 5, 8, 299
    plane = 10.0 * torch.arange(height)[:, None] + torch.arange(width)
    rows = (torch.arange(side) * height / side).clamp(max=height - 1)
    columns = (torch.arange(side) * width / side).clamp(max=width - 1)
    expected = 10 * rows[:, None] + columns
    torch.testing.assert_close(resize_tensorflow1(plane[None, None])[0, 0], expected, rtol=0, atol=1e-4)


def test_resize_keeps_an_image_of_the_right_size_and_does_not_antialias() -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.rand(1, 3, 299, 299, generator=generator)
    assert torch.equal(resize_tensorflow1(same), same)
    larger = torch.rand(1, 1, 598, 897, generator=generator)
    assert torch.equal(resize_tensorflow1(larger), larger[:, :, ::2, ::3])


def pass_through(network: InceptionFeatures) -> InceptionFeatures:
    """Copy the network and let output channel o of each convolution be its input channel o modulo their number."""
    network = copy.deepcopy(network)
    for name, value in network.state_dict().items():
        value.zero_()
        if name.endswith("conv.weight"):
            num_out, num_in, height, width = value.shape
            value[torch.arange(num_out), torch.arange(num_out) % num_in, height // 2, width // 2] = 1
    return network


def average_without_padding(x: Tensor) -> Tensor:
    windows = torch.nn.functional.pad(x, (1, 1, 1, 1), value=torch.nan).unfold(2, 3, 1).unfold(3, 3, 1)
    return windows.nanmean((-2, -1))


def maximum(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).amax((-2, -1))


def halved(x: Tensor) -> Tensor:
    return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-2, -1))


# Branches in the order of the output: the widths of the convolutions one after another, and the pooling before them.
BLOCKS = [
    ("Mixed_5b", 192, [[64], [48, 64], [64, 96, 96], [32]], average_without_padding),
    ("Mixed_6a", 288, [[384], [64, 96, 96], []], halved),
    ("Mixed_6c", 768, [[192], [160, 160, 192], [160, 160, 160, 160, 192], [192]], average_without_padding),
    ("Mixed_7a", 768, [[192, 320], [192, 192, 192, 192], []], halved),
    (
        "Mixed_7b",
        1280,
        [[320], [384, 384], [384, 384], [448, 384, 384], [448, 384, 384], [192]],
        average_without_padding,
    ),
    ("Mixed_7c", 2048, [[320], [384, 384], [384, 384], [448, 384, 384], [448, 384, 384], [192]], maximum),
]


@pytest.mark.parametrize(("name", "num_in", "widths", "pool"), BLOCKS, ids=[block[0] for block in BLOCKS])
def test_block_joins_its_branches(
    network: InceptionFeatures, name: str, num_in: int, widths: list[list[int]], pool: Callable[[Tensor], Tensor]
) -> None:
    x = torch.rand(2, num_in, 9, 7, generator=torch.Generator().manual_seed(0))
    shrinks = pool is halved
    expected = []
    for index, branch in enumerate(widths):
        channels = torch.arange(num_in)
        for width in branch:
            channels = channels[torch.arange(width) % len(channels)]
        y = pool(x) if index == len(widths) - 1 else x[:, :, 1:-1:2, 1:-1:2] if shrinks else x
        expected.append(y[:, channels])
    found = pass_through(network).get_submodule(name)(x)
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-5, atol=1e-6)


def test_features_do_not_depend_on_the_batch_and_grey_is_repeated(network: InceptionFeatures) -> None:
    grey = torch.randint(0, 256, (2, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    colour = network(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(network(grey), colour)
    alone = network(grey[1:])
    for output, values in colour.items():
        torch.testing.assert_close(alone[output], values[1:], rtol=1e-5, atol=1e-5)


def test_the_extractor_gives_the_networks_outputs(network: InceptionFeatures, weights_file: Path) -> None:
    extractor = load_extractor("inception", torch.device("cpu"), weights_file)
    images_ = images()["small"].repeat(2, 1, 1, 1)
    found, expected = extractor.extract(images_), network(images_)
    assert list(found) == ["features", "spatial", "logits"]
    assert {output: found[output].shape[1] for output in extractor.outputs} == {"features": 2048, "spatial": 2023}
    for output, values in expected.items():
        torch.testing.assert_close(found[output], values, rtol=1e-4, atol=1e-4)
    assert extractor.sha256 == hashlib.sha256(weights_file.read_bytes()).hexdigest()


def test_network_is_frozen_and_stays_in_evaluation_mode(network: InceptionFeatures) -> None:
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.train().modules())


def test_batch_counts_in_the_file_are_ignored(tmp_path: Path, network: InceptionFeatures) -> None:
    counts = {name.replace("running_var", "num_batches_tracked"): torch.tensor(7) for name in shapes() if "var" in name}
    torch.save(random_weights() | counts, tmp_path / "counts.pth")
    grey = images()["grey"]
    torch.testing.assert_close(InceptionFeatures(tmp_path / "counts.pth")(grey), network(grey), rtol=0, atol=0)


def test_channels_other_than_one_or_three_are_refused(network: InceptionFeatures) -> None:
    with pytest.raises(ValueError, match=r"images have 4 channels, expected 3 \(RGB\) or 1 \(grey\)"):
        network(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"^Inception weights: ") as caught:
        InceptionFeatures(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "expected pt_inception-2015-12-05-6726825d.pth, a plain state dict: download it (again)" in message
    return message


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "absent.pth")


@pytest.mark.parametrize("num_bytes", [0, 3, 1000, 1_000_000])
def test_truncated_file_is_refused(tmp_path: Path, weights_file: Path, num_bytes: int) -> None:
    path = tmp_path / "truncated.pth"
    with weights_file.open("rb") as file:
        path.write_bytes(file.read(num_bytes))
    assert "is damaged or holds pickled code" in refusal(path)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (canary,)

    path = tmp_path / "code.pth"
    torch.save({"fc.weight": Touch()}, path)
    assert "holds pickled code (UnpicklingError)" in refusal(path)
    path.write_bytes(pickle.dumps(Touch()))
    assert "is damaged or holds pickled code" in refusal(path)
    assert not canary.exists()


def test_file_without_a_dict_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    assert "holds a Tensor" in refusal(tmp_path / "tensor.pth")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Mixed_6b.branch7x7_2.conv.weight", None, r"(found nothing, expected (128, 128, 1, 7))"),
        ("AuxLogits.fc.weight", torch.zeros(2), r"(found (2,), expected nothing)"),
        ("fc.bias", torch.zeros(1000), r"(found (1000,), expected (1008,))"),
        ("fc.bias", "bias", r"(found no tensor, expected (1008,))"),
    ],
)
def test_other_names_or_shapes_are_refused(tmp_path: Path, name: str, value: object, message: str) -> None:
    weights = {key: torch.zeros(()).expand(shape) for key, shape in shapes().items()} | {name: value}
    if value is None:
        del weights[name]
    torch.save(weights, tmp_path / "other.pth")
    assert f"1 missing, unknown or misshapen entries, first {name} {message}" in refusal(tmp_path / "other.pth")
