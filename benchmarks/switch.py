"""Time the switches of an ensemble with one network in memory: the next one's files read ahead, or not.

Before each repeat the files are put out of the system's cache (``posix_fadvise``, Linux). Each network computes for
some seconds on two steps, as a sampler does on its range. Only switches count, but for the first, which nothing
announces.

    python benchmarks/switch.py --megabytes 400 --seconds 1
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from decouple_merge.diffusion.routing import RangeRouter
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.models import ensemble
from decouple_merge.models.ensemble import TimestepEnsemble
from decouple_merge.models.members import FileWeights
from decouple_merge.storage.files import read_ahead, write_tensors
from decouple_merge.storage.provenance import git_commit
from decouple_merge.storage.tensors import TensorFiles
from interleaved import interleaved, ratios

NUM_NETWORKS, SIDE = 4, 2048


class Busy(nn.Module):
    """A network that computes for a fixed time."""

    def __init__(self, num_layers: int, seconds: float) -> None:
        super().__init__()
        layers = [nn.Parameter(torch.empty(SIDE, SIDE), requires_grad=False) for _ in range(num_layers)]
        self.layers, self.seconds = nn.ParameterList(layers), seconds

    def forward(self, x: Tensor, t: int) -> Tensor:
        end, y = time.monotonic() + self.seconds, torch.ones(256, 256)
        while time.monotonic() < end:
            y = (y @ y).tanh()
        return x


def forget(path: Path) -> None:
    """Put a file out of the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    num_layers = max(1, round(asked.megabytes * 1e6 / (4 * SIDE**2)))
    network = Busy(num_layers, asked.seconds)
    router = RangeRouter([TimestepRange(10 * i, 10 * i + 10) for i in range(NUM_NETWORKS)], 10 * NUM_NETWORKS)
    switches: dict[str, list[float]] = {"read ahead": [], "not": []}

    def run(name: str, paths: list[Path]) -> None:
        ensemble.read_ahead = read_ahead if name == "read ahead" else lambda paths: None
        weights = [FileWeights(TensorFiles([path])) for path in paths]
        module, spent = TimestepEnsemble([network] * NUM_NETWORKS, router, torch.Tensor.long, weights), 0.0
        for path in paths:
            forget(path)
        for i, t in enumerate(range(10 * NUM_NETWORKS - 1, -1, -5)):
            started = time.monotonic()
            module(torch.zeros(1), t)
            spent += time.monotonic() - started - asked.seconds if i else 0.0
        switches[name].append(spent / (NUM_NETWORKS - 1))

    with tempfile.TemporaryDirectory(dir=".") as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(NUM_NETWORKS)]
        for path in paths:
            write_tensors(path, {f"layers.{i}": torch.rand(SIDE, SIDE) for i in range(num_layers)})
        interleaved({name: partial(run, name, paths) for name in switches}, asked.repeats)
    print(f"commit {git_commit()}, {num_layers * 4 * SIDE**2 / 1e6:.0f} MB a network, {asked.repeats} repeats")
    for name, seconds in switches.items():
        print(f"| {name} | {statistics.median(seconds):.2f} s a switch | {ratios(seconds, switches['not'])} |")


if __name__ == "__main__":
    main()
