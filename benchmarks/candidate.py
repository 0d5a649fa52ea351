"""Time one candidate of the search: python benchmarks/candidate.py --millions 36 --experts 4.

``Merger.merge`` against the loop over state dicts that one would write (a dict of scaled differences for each
expert, summed, added, loaded), and against the memory's bandwidth: a copy of as many bytes as a candidate reads and
writes. Contenders run in turn; ratios to the copy are medians of the repeats.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from decouple_merge.merging.merger import Merger
from interleaved import interleaved, ratios

WEIGHTS = [0.3, 0.9, -0.2, 1.4]


def compare(num_millions: int, num_experts: int, num_repeats: int, dtype: torch.dtype) -> None:
    """Print a row for each contender."""
    names = [f"blocks.{i}.weight" for i in range(num_millions)]
    base: dict[str, Tensor] = {k: torch.randn(1000, 1000).to(dtype) for k in names}
    weights = WEIGHTS[:num_experts]
    versions = [base] + [{k: v.clone() for k, v in base.items()} for _ in range(num_experts)]
    network = {k: torch.empty_like(v) for k, v in base.items()}
    merger = Merger(base, versions[1:], dtype=dtype, device=torch.device("cpu"))
    # Half of the bytes are read, half written; in parts, or large networks would leave no memory for it.
    num_copied = (num_experts + 2) * num_millions * 1_000_000 // 2
    source = torch.zeros(min(num_copied, 1 << 26), dtype=dtype)
    target = torch.zeros_like(source)

    def copy() -> None:
        for start in range(0, num_copied, len(source)):
            num = min(len(source), num_copied - start)
            target[:num].copy_(source[:num])

    def loop() -> None:
        first, *others = versions
        scaled = [{k: w * (e[k] - first[k]) for k in names} for w, e in zip(weights, others, strict=True)]
        total = {k: sum(s[k] for s in scaled) for k in names}
        for k, v in network.items():
            v.copy_(first[k] + total[k])

    contenders: dict[str, Callable[[], object]] = {
        "copy of as many bytes": copy,
        "ours": lambda: merger.merge(weights, network),
        "loop over state dicts": loop,
    }
    interleaved(contenders, 1)
    times = interleaved(contenders, num_repeats)
    for name, found in times.items():
        ratio, milliseconds = ratios(found, times["copy of as many bytes"]), 1000 * statistics.median(found)
        print(f"| {num_millions}M {dtype} | {num_experts} | {name} | {milliseconds:.1f} | {ratio} |")


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, nargs="*", default=[36])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-repeats", type=int, default=9)
    arguments = parser.parse_args()
    print("| parameters | experts | | ms | / first |\n|---|---|---|---|---|")
    for num_millions in arguments.millions:
        compare(num_millions, arguments.experts, arguments.num_repeats, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
