"""Hold our evaluation against torch-fidelity and pytorch-fid: the same numbers, their time, and our memory.

Both need torchvision, which this project does without, so they have an environment of their own:

    python -m venv fid && echo $PWD/.venv/lib/python3.*/site-packages > $(echo fid/lib/python3.*/site-packages)/ours.pth
    fid/bin/pip install --no-deps torchvision torch-fidelity pytorch-fid
    fid/bin/python benchmarks/evaluate.py
    fid/bin/python benchmarks/evaluate.py --weights pt_inception-2015-12-05-6726825d.pth

Without a file weights are drawn at random, which take the same time and disagree as much.
It ends with status 1 where values disagree by more than --tolerance. Only ratios of times are meant to be quoted.
"""

import argparse
import contextlib
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
if torch.version.cuda is None:
    # PyPI's torchvision has no compiled operators for a CPU build of torch, and asks for two of them on import.
    TORCHVISION = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from decouple_merge.config import Protocol
from decouple_merge.evaluation.distances import (
    FeatureStats,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    matrix_root,
)
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.evaluation.extractors import Extractor, load_extractor
from decouple_merge.evaluation.inception import resize_tensorflow1
from decouple_merge.evaluation.neighbours import density_coverage, precision_recall
from decouple_merge.evaluation.references import Reference
from decouple_merge.evaluation.score import score
from decouple_merge.executors.devices import default_device
from decouple_merge.storage.provenance import git_commit
from interleaved import interleaved, ratios
from test_inception import random_weights

CPU = torch.device("cpu")
PARTS = ["features", "metrics", "distance", "whole", "memory"]


def print_times(title: str, contenders: dict[str, Callable[[], Any]], num_repeats: int) -> None:
    """Time contenders in turn, and print their times as ratios to the first one's."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        seconds = interleaved(contenders, num_repeats)
    first = next(iter(seconds.values()))
    print(f"\n{title}\n\n| program | seconds, median | / first (quartiles) |\n|---|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(found):.3g} | {ratios(found, first)} |")


class Agreement:
    """A table of values that should agree."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance, self.failed = tolerance, False
        print("\n| value | other program | ours | theirs | difference / theirs |\n|---|---|---|---|---|")

    def add(self, value: str, program: str, ours: Any, theirs: Any, within: bool = True) -> None:
        """Add numbers, or features, of which the largest is shown and the largest difference counts."""
        ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        print(f"| {value} | {program} | {float(ours.max()):.7g} | {float(theirs.max()):.7g} | {difference:.1e} |")
        self.failed |= within and not difference <= self.tolerance


def their_networks(weights: Path) -> dict[str, Any]:
    """Load both programs' networks; pytorch-fid's also without its own preparation of images."""
    import pytorch_fid.inception
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    fidelity = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    port = pytorch_fid.inception.InceptionV3([3]).eval()
    bare = pytorch_fid.inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    return {
        "torch-fidelity": torch.no_grad()(lambda x: fidelity(x)[0]),
        "pytorch-fid": torch.no_grad()(lambda x: port(x.float() / 255)[0].flatten(1)),
        "pytorch-fid's network": torch.no_grad()(
            lambda x: bare((resize_tensorflow1(x.float()) - 128) / 128)[0].flatten(1)
        ),
    }


def draw_images(num: int, size: int, seed: int) -> Tensor:
    """Draw smooth random images: noise of an eighth of the size, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, max(size // 8, 2), max(size // 8, 2), generator=generator)
    return (torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def compare_features(args: argparse.Namespace) -> bool:
    theirs, ours = their_networks(args.weights), load_extractor("inception", CPU, args.weights)
    table = Agreement(args.tolerance)
    for size in (args.size, 420):
        images = draw_images(4, size, 0)
        found = ours.extract(images)["features"]
        for name, extract in theirs.items():
            # pytorch-fid resizes with half-pixel centres and divides by 127.5, as TensorFlow's program does not.
            table.add(f"features at {size}", name, found, extract(images), name != "pytorch-fid")
    del theirs["pytorch-fid's network"]
    images = draw_images(args.num_images, args.size, 1)

    def run(extract: Callable[[Tensor], Any]) -> Callable[[], object]:
        return lambda: [extract(batch) for batch in images.split(args.batch_size)]

    contenders = {"ours": run(ours.extract), **{name: run(extract) for name, extract in theirs.items()}}
    print_times(f"Features of {args.num_images} images of {args.size} pixels", contenders, args.num_repeats)
    return table.failed


def draw_features(num: int, width: int, seed: int) -> Tensor:
    """Draw features as networks give them: not negative, correlated, most of the variance in few directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, width, generator=torch.Generator().manual_seed(99)) / 8
    latent = torch.randn(num, 64, generator=generator) * (1 + 0.1 * seed)
    return (latent @ mixing + 0.2 * torch.randn(num, width, generator=generator) + 0.3).relu()


def moments_of(features: Tensor) -> FeatureStats:
    stats = FeatureStats.empty(features.shape[1])
    for batch in features.split(1000):
        stats.add(batch)
    return stats


def compare_metrics(args: argparse.Namespace) -> bool:
    from prdc import compute_prdc
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    num = 2 * args.num_features
    a, b = draw_features(num, args.num_features, 1), draw_features(num, args.num_features, 0)
    table = Agreement(args.tolerance)
    stats = [moments_of(x) for x in (a, b)]
    ours = frechet_distance(stats[0].mean, stats[0].covariance, stats[1].mean, stats[1].covariance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [metric_fid.fid_features_to_statistics(x) for x in (a, b)]
        fid = metric_fid.fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
        table.add("Fréchet distance", "torch-fidelity", ours, fid)
        from pytorch_fid.fid_score import calculate_frechet_distance

        arrays = [f(x.double().numpy()) for x in (a, b) for f in (lambda v: v.mean(0), lambda v: np.cov(v.T))]
        table.add("Fréchet distance", "pytorch-fid", ours, float(calculate_frechet_distance(*arrays)))
    subset = min(num, 1000)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        kid = metric_kid.kid_features_to_metric(a[:subset], b[:subset], kid_subsets=1, kid_subset_size=subset)
    table.add("kernel distance", "torch-fidelity", kernel_distance(a[:subset], b[:subset]),
              kid["kernel_inception_distance_mean"])  # fmt: skip
    expected = metric_prc.prc_features_to_metric(a, b, verbose=False)
    found = precision_recall(b, a)
    table.add("precision", "torch-fidelity", found[0], expected["precision"])
    table.add("recall", "torch-fidelity", found[1], expected["recall"])
    with contextlib.redirect_stdout(io.StringIO()):
        prdc = compute_prdc(b.double().numpy(), a.double().numpy(), 5)
    found = density_coverage(b, a)
    table.add("density", "prdc", found[0], float(prdc["density"]))
    table.add("coverage", "prdc", found[1], float(prdc["coverage"]))
    logits = a[:, :1008] * 4
    isc = metric_isc.isc_features_to_metric(logits, 10, shuffle=False)
    table.add("Inception Score", "torch-fidelity", inception_score(logits)[0], isc["inception_score_mean"])
    return table.failed


def compare_distances(args: argparse.Namespace) -> bool:
    a, b = (moments_of(draw_features(2 * args.num_features, args.num_features, s)) for s in (1, 0))
    first, second, root = a.covariance, b.covariance, matrix_root(b.covariance)
    product = (first @ second).numpy()
    contenders: dict[str, Callable[[], Any]] = {
        "eigh, reference's root cached": lambda: frechet_distance(a.mean, first, b.mean, second, root),
        "eigh, root computed": lambda: frechet_distance(a.mean, first, b.mean, second),
        "scipy sqrtm": lambda: scipy.linalg.sqrtm(product),
    }
    print_times(f"Distance step, {args.num_features} features", contenders, args.num_repeats)
    return False


def compare_whole(args: argparse.Namespace) -> bool:
    """Folder of PNG and statistics to a FID, with nothing cached."""
    import pytorch_fid.fid_score
    import torch_fidelity

    their_networks(args.weights)
    values: dict[str, list[float]] = {"ours": [], "torch-fidelity": [], "pytorch-fid": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, num, seed in (("images", args.num_images, 1), ("reference", args.num_reference_images, 0)):
            (folder / part).mkdir()
            for i, pixels in enumerate(draw_images(num, args.size, seed)):
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / part / f"{i:05}.png")

        def ours() -> None:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["DEME_CACHE"] = cache
                paths = str(folder / "images"), str(folder / "reference")
                events = evaluate_model(*paths, Protocol(metrics=["fid"], inception_weights=args.weights))
                values["ours"] += [event["value"] for event in events if isinstance(event, dict)]

        def fidelity() -> None:
            found = torch_fidelity.calculate_metrics(
                input1=str(folder / "images"), input2=str(folder / "reference"), fid=True, cuda=False, cache=False,
                verbose=False, feature_extractor_weights_path=str(args.weights), batch_size=args.batch_size,
            )  # fmt: skip
            values["torch-fidelity"].append(found["frechet_inception_distance"])

        def port() -> None:
            paths = [str(folder / "images"), str(folder / "reference")]
            found = pytorch_fid.fid_score.calculate_fid_given_paths(paths, args.batch_size, CPU, 2048, 0)
            values["pytorch-fid"].append(float(found))

        sizes = f"{args.num_images} and {args.num_reference_images}"
        contenders = {"ours": ours, "torch-fidelity": fidelity, "pytorch-fid": port}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print_times(f"FID of two folders of {sizes} PNG of {args.size} pixels", contenders, args.num_repeats)
    table = Agreement(args.tolerance)
    for program in ("torch-fidelity", "pytorch-fid"):
        # pytorch-fid prepares images in another way: see the features above.
        table.add("fid of folders", program, values["ours"][0], values[program][0], program == "torch-fidelity")
    return table.failed


def peak_megabytes(num_images: int) -> float:
    """Score so many images on features of nothing, and say how much memory this process has ever had."""
    generator = torch.Generator().manual_seed(0)
    extractor = Extractor(
        "inception", "0" * 64, {"features": 2048}, lambda x: {"features": torch.rand(len(x), 2048, generator=generator)}
    )
    identity = torch.eye(2048).double()
    moments = {"features": Moments(torch.zeros(2048).double(), identity, lambda: identity)}
    batches = (torch.zeros(len(b), 3, 32, 32, dtype=torch.uint8) for b in torch.arange(num_images).split(256))
    score(batches, ["fid"], [(extractor, Reference("nothing", 0, moments, {}))])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare_memory(args: argparse.Namespace) -> bool:
    """Measure each number of images in a process of its own."""
    print("\nPeak memory of scoring the FID\n\n| images | MB |\n|---|---|")
    for num in (1000, 50_000):
        command = [sys.executable, __file__, "--peak", str(num), "--threads", str(args.threads)]
        print(f"| {num} | {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()} |")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--weights", type=Path, help="the Inception file; random weights where not given")
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--num-reference-images", type=int, default=5000, help="of the FID of two folders")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-features", type=int, default=2048)
    parser.add_argument("--num-repeats", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(f"{peak_megabytes(args.peak):.0f}")
        return
    print(f"commit {git_commit()}, torch {torch.__version__}, {default_device().type}, {args.threads} thread(s)")
    print(f"{args.num_repeats} repeats")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        if args.weights is None:
            args.weights = Path(folder) / "random.pth"
            torch.save(random_weights(), args.weights)
        for part, compare in zip(
            PARTS, [compare_features, compare_metrics, compare_distances, compare_whole, compare_memory], strict=True
        ):
            failed |= part in args.only and compare(args)
    if failed:
        sys.exit(f"values differ by more than {args.tolerance}")


if __name__ == "__main__":
    main()
