"""Time merging against its limits: python benchmarks/merge.py --in-memory 36, or --files 400.

In memory: one candidate of the search against the loop over state dicts that one would write (a dict of scaled
differences for each expert, summed, added, loaded), and against the memory's bandwidth, taken as a copy of as many
bytes as a candidate reads and writes. Files: ``deme merge`` of synthetic fp16 networks against copying the same bytes,
that is reading every input and writing one output. Contenders run in turn; ratios are medians of the repeats.
"""

import argparse
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from decouple_merge.config import Merge
from decouple_merge.standalone import merge_models
from decouple_merge.weights import Stacked

WEIGHTS = [0.3, 0.9, -0.2, 1.4]


def layers(num_millions: float, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Make random weights in square matrices of a million elements, as many as asked for."""
    draws = torch.Generator().manual_seed(seed)
    return {f"blocks.{i}.weight": torch.randn(1000, 1000, generator=draws).to(dtype) for i in range(int(num_millions))}


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(contenders: dict[str, Callable[[], object]], num_repeats: int) -> None:
    """Print each contender's median time and its ratio to the first, from interleaved repeats after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(num_repeats + 1):
        for name, function in list(contenders.items())[:: 1 if repeat % 2 else -1]:
            seconds = timed(function)
            if repeat:
                times[name].append(seconds)
    first = next(iter(times.values()))
    for name, found in times.items():
        ratio = statistics.median(t / f for t, f in zip(found, first, strict=True))
        print(f"| {name} | {statistics.median(found):.4g} s | {ratio:.3g} |")


def in_memory(num_millions: float, num_repeats: int) -> None:
    base, *experts = [layers(num_millions, torch.float32, seed) for seed in range(5)]
    network = {k: v.clone() for k, v in base.items()}
    stacked = Stacked(base, experts, torch.device("cpu"))
    num_rows = len(stacked.matrix) + 1
    # Half of the bytes are read, half written.
    source = torch.zeros(num_rows * stacked.merged.numel() // 2)
    target = torch.zeros_like(source)

    def loop() -> None:
        scaled = [{k: w * (e[k] - base[k]) for k in base} for w, e in zip(WEIGHTS, experts, strict=True)]
        total = {k: sum(s[k] for s in scaled) for k in base}
        for k, v in network.items():
            v.copy_(base[k] + total[k])

    compare(
        {
            "copy of as many bytes": lambda: target.copy_(source),
            "ours": lambda: stacked.merge(WEIGHTS),
            "loop over state dicts": loop,
        },
        num_repeats,
    )


def files(num_millions: float, num_repeats: int, folder: Path) -> None:
    paths = [folder / f"{i}.safetensors" for i in range(5)]
    for seed, path in enumerate(paths):
        save_file(layers(num_millions, torch.float16, seed), path, {"format": "pt"})

    def copied() -> None:
        for path in paths:
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
        shutil.copyfile(paths[0], folder / "copy.safetensors")

    def merged() -> None:
        for _ in merge_models(str(paths[0]), paths[1:], Merge(weights=WEIGHTS), folder / "merged.safetensors"):
            pass

    compare({"copy": copied, "deme merge": merged}, num_repeats)
    print(f"peak memory with mapped files: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-memory", type=float, metavar="M", help="millions of parameters")
    parser.add_argument("--files", type=float, metavar="M", help="millions of parameters")
    parser.add_argument("--num-repeats", type=int, default=5)
    arguments = parser.parse_args()
    print("| | median | / first |\n|---|---|---|")
    if arguments.in_memory:
        in_memory(arguments.in_memory, arguments.num_repeats)
    if arguments.files:
        with tempfile.TemporaryDirectory() as folder:
            files(arguments.files, arguments.num_repeats, Path(folder))


if __name__ == "__main__":
    main()
