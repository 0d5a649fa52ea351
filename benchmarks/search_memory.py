"""Peak memory of a search worker, less what it maps: python benchmarks/search_memory.py --folder /tmp/search-memory.

A synthetic network and its experts are written to files, as a run has them. Then a process of its own for each case
opens them as a worker does, and merges, hashes and draws a few candidates. Its anonymous memory is read every five
milliseconds, less what it was before a model was opened. Mapped files are what the system may drop, and don't count;
networks of metrics aren't opened. Linux alone tells these numbers.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

from decouple_merge.config import Sample
from decouple_merge.merging.adapted import Adapted
from decouple_merge.merging.merger import Merger
from decouple_merge.merging.rules.rule import Context, Settings
from decouple_merge.models.base import load_base
from decouple_merge.sampling.sampler import denoiser, sample_images
from decouple_merge.searching.scorer import Scorer
from decouple_merge.storage.files import read_tensors

CASES = ["adapters", "linear", "ties"]
CPU, RANK = torch.device("cpu"), 32
WEIGHTS = [[0.3, 0.9, -0.2, 1.4], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.5, 0.5]]


def anonymous_bytes() -> int:
    """Read what this process holds in memory less mapped file pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


class Peak:
    """The most that was held, less what was at first, while it is watched."""

    def __init__(self) -> None:
        self.first = self.most = anonymous_bytes()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.005)

    @property
    def num_bytes(self) -> int:
        return self.most - self.first


def write_models(folder: Path, width: int, num_experts: int) -> None:
    """Write a pipeline, experts that differ everywhere, and factors that change the attention layers."""
    attention = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    network: Any = UNet2DModel(8, 1, 1, block_out_channels=(width, 2 * width), attention_head_dim=64, **attention)
    pipeline: Any = DDPMPipeline(network, DDPMScheduler(num_train_timesteps=40))
    pipeline.save_pretrained(folder / "base")
    for index in range(num_experts):
        draws = torch.Generator().manual_seed(index)
        moved = {k: v + 1e-3 * torch.randn(v.shape, generator=draws) for k, v in network.state_dict().items()}
        save_file(moved, folder / f"{index}.safetensors")
        factors = {}
        for key, value in network.state_dict().items():
            if key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")):
                factors[f"{key}.down"] = torch.randn(RANK, value.shape[1], generator=draws)
                factors[f"{key}.up"] = 1e-3 * torch.randn(len(value), RANK, generator=draws)
        save_file(factors, folder / f"{index}.factors.safetensors")


def measure(folder: Path, case: str, precision: str, num_experts: int) -> dict[str, float]:
    """Work as a search worker does, on a few candidates."""
    read_tensors(folder / "0.factors.safetensors")  # Brings what is loaded once.
    peak = Peak()
    base = load_base(str(folder / "base"))
    if case == "adapters":
        found = [read_tensors(folder / f"{i}.factors.safetensors")[0] for i in range(num_experts)]
        keys = [key.removesuffix(".down") for key in found[0] if key.endswith(".down")]
        factors = [{k: (f[f"{k}.down"], f[f"{k}.up"]) for k in keys} for f in found]
        experts: list[Any] = [Adapted(base.network.state_dict(), each) for each in factors]
    else:
        experts = [read_tensors(folder / f"{i}.safetensors")[0] for i in range(num_experts)]
    merger = Merger(
        base.network.state_dict(),
        experts,
        method="ties" if case == "ties" else "linear",
        context_of=lambda key: Context(key, Settings(density=0.3)),
        dtype=base.dtype,
        device=CPU,
    )
    settings, seconds = Sample(num_steps=1, batch_size=1, precision=precision), []
    comparing: Any = None
    scorer = Scorer(base, merger, "", comparing, settings)
    for weights in WEIGHTS:
        started = time.monotonic()
        merger.write(weights[:num_experts])
        seconds.append(time.monotonic() - started)
        list(sample_images(denoiser(base, scorer.network), base, [0], settings, CPU))
    size = sum(p.nbytes for p in scorer.network.parameters())
    return {"peak": peak.num_bytes, "network": size, "seconds": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for 5 GB of models, which are removed")
    parser.add_argument("--width", type=int, default=512, help="of the network: 512 makes 254 million parameters")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        case, precision = arguments.measure
        print(json.dumps(measure(arguments.folder, case, precision, arguments.experts)))
        return
    arguments.folder.mkdir(parents=True)
    try:
        write_models(arguments.folder, arguments.width, arguments.experts)
        print("| experts | drawn in | network, GB | peak, GB | / network | s, merging a candidate |")
        print("|---|---|---|---|---|---|")
        for case in arguments.cases:
            for precision in ("fp32", "bf16"):
                command = [sys.executable, *sys.argv, "--measure", case, precision]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
                size, peak = found["network"], found["peak"]
                kind = "adapters of rank 32" if case == "adapters" else f"whole, {case}"
                print(
                    f"| {arguments.experts}, {kind} | {precision} | {size / 1e9:.2f} | {peak / 1e9:.2f} | "
                    f"{peak / size:.2f} | {found['seconds']:.1f} |",
                    flush=True,
                )
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
