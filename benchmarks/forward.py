"""Time a float32 forward pass of a network laid out and compiled in several ways, in turn, in seconds of a CPU thread.

    python benchmarks/forward.py models/fashion-ddpm --batch-size 125 --num-repeats 15

What each way costs beside the eager network is what a sampler would gain by it, since sampling is forward passes.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from decouple_merge.models.base import load_base
from decouple_merge.storage.provenance import git_commit
from interleaved import ratios

LAST = torch.channels_last


def ways(network: nn.Module, x: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """List the ways, each with its input."""
    laid_out = copy.deepcopy(network).to(memory_format=LAST)  # type: ignore[call-overload]
    compiled, both = copy.deepcopy(network), copy.deepcopy(laid_out)
    compiled.compile()
    both.compile()
    last = x.contiguous(memory_format=LAST)
    return {
        "eager": (network, x),
        "channels last": (laid_out, last),
        "compiled": (compiled, x),
        "compiled, channels last": (both, last),
    }


def seconds_of(function: Callable[[], object]) -> float:
    """Time a call by the processor's clock, which other work on the machine moves less."""
    started = time.process_time()
    function()
    return time.process_time() - started


@torch.no_grad()
def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="pipeline folder or hub name")
    parser.add_argument("--batch-size", type=int, default=125)
    parser.add_argument("--num-repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(arguments.base)
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(arguments.batch_size, *base.shape, generator=draws)
    t = torch.full((len(x),), base.num_train_timesteps // 2)
    every, first = ways(base.network.eval(), x), dict[str, tuple[float, Tensor]]()
    for name, (network, given) in every.items():
        started = time.perf_counter()
        out = network(given, t, return_dict=False)[0]
        first[name] = time.perf_counter() - started, out
    seconds: dict[str, list[float]] = {name: [] for name in every}
    for repeat in range(arguments.num_repeats):
        for name in list(every)[:: -1 if repeat % 2 else 1]:
            network, given = every[name]
            seconds[name].append(seconds_of(partial(network, given, t, return_dict=False)))
    print(f"commit {git_commit()}, torch {torch.__version__}, one CPU thread, {arguments.base}, {len(x)} images")
    print("| network | seconds | eager / it | the first call, s | largest difference |")
    print("|---|---|---|---|---|")
    for name, found in seconds.items():
        difference = float((first[name][1] - first["eager"][1]).abs().max())
        row = f"{statistics.median(found):.3f} | {ratios(seconds['eager'], found)} | {first[name][0]:.1f}"
        print(f"| {name} | {row} | {difference:.1e} |")


if __name__ == "__main__":
    main()
