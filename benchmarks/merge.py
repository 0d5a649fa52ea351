"""Time merging of files against copying them, and against other tools.

    python benchmarks/merge.py --millions 160 640 --experts 2 4 8
    python benchmarks/merge.py --sdxl --peers FOLDER
    python benchmarks/merge.py --millions 160 --methods ties dare breadcrumbs

Synthetic fp16 networks are merged linearly. The first row is the limit: reading every input and writing one output.
Every contender is a process of its own, with its start and imports, in turn, in an order that is reversed from repeat
to repeat; ratios to the first row are medians. Peak memory is what is resident less mapped file pages. FOLDER has
sd-mecha and mergekit (``pip install --no-deps --target FOLDER sd-mecha mergekit …``); sd-mecha only merges what it
knows, so that it takes part with the tensors of the SDXL U-Net alone.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = [0.3, 0.9, 0.2, 1.4, 0.5, 0.1, 0.7, 0.4]
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
MECHA = """
import sys, torch, sd_mecha
from sd_mecha.extensions.builtin.merge_methods import linear
out, base, *experts = sys.argv[1:]
weights = {weights}
model = lambda path: sd_mecha.model(path, config="sdxl-diffusers_unet_only")
recipe = model(base)
for path, w in zip(experts, weights):
    recipe = linear.add_difference(recipe, linear.subtract(model(path), model(base)), alpha=w)
sd_mecha.merge(recipe, output=out, merge_dtype=torch.float32, output_dtype=torch.float16, threads=2)
"""


def shapes(num_millions: float | None) -> dict[str, torch.Size]:
    """List the tensors of the SDXL U-Net, or square matrices of a million elements."""
    if num_millions is not None:
        return {f"blocks.{i}.weight": torch.Size((1000, 1000)) for i in range(int(num_millions))}
    with torch.device("meta"):
        network: Any = UNet2DConditionModel(**SDXL)
        return {k: v.shape for k, v in network.state_dict().items()}


def random_tensors(wanted: dict[str, torch.Size], seed: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    # Cut from one block of noise: billions of normal numbers would take longer to draw than to merge.
    noise = torch.randn(1 << 25, generator=draws).half()
    starts = {k: 7919 * i % (len(noise) - s.numel()) for i, (k, s) in enumerate(wanted.items())}
    return {k: noise[starts[k] :][: s.numel()].clone().view(s) for k, s in wanted.items()}


def drop_caches() -> None:
    """Make the next contender read from the disk (Linux, as root)."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run_and_watch(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run a command; returns its seconds and its peak of resident memory less mapped file pages, in GB."""
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=errors, stderr=errors)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")))
            except (OSError, TypeError):
                pass
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command[:4])}: {errors.read().decode()[-2000:]}")
    return seconds, peak / 1e6


def contenders(
    folder: Path, num_experts: int, peers: Path | None, is_sdxl: bool, methods: list[str]
) -> dict[str, tuple[list[str], dict[str, str]]]:
    base, *experts = [str(folder / f"{i}.safetensors") for i in range(num_experts + 1)]
    weights = ",".join(map(str, WEIGHTS[:num_experts]))
    copied = f"cat {base} {' '.join(experts)} > /dev/null && cp {base} {folder}/copy.safetensors"
    deme = [sys.executable, "-m", "decouple_merge.cli.main", "merge", base, *experts, "--weights", weights]
    found: dict[str, tuple[list[str], dict[str, str]]] = {
        "read every input, write one": (["sh", "-c", copied], {}),
        "deme merge": ([*deme, "--out", f"{folder}/deme.safetensors"], {}),
    }
    for method in methods:
        options = ["--method", method, "--set", "density=0.7", "--out", f"{folder}/{method}.safetensors"]
        found[f"deme merge --method {method}"] = ([*deme, *options], {})
    if peers is None:
        return found
    path = {"PYTHONPATH": str(peers)}
    settings = "".join(
        f"  - model: {e}\n    parameters: {{weight: {w}}}\n" for e, w in zip(experts, WEIGHTS, strict=False)
    )
    recipe = folder / "mergekit.yaml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nparameters: {{normalize: false}}\ndtype: float32\n"
        f"out_dtype: float16\nmodels:\n{settings}"
    )
    code = "from mergekit.scripts.merge_raw_pytorch import main; main()"
    found["mergekit-pytorch"] = (
        [sys.executable, "-c", code, str(recipe), f"{folder}/mergekit", "--out-shard-size", "100B"],
        path,
    )
    if is_sdxl:
        code = MECHA.format(weights=WEIGHTS[:num_experts])
        found["sd-mecha"] = ([sys.executable, "-c", code, f"{folder}/mecha.safetensors", base, *experts], path)
    return found


def compare(
    num_millions: float | None,
    num_experts: int,
    peers: Path | None,
    num_repeats: int,
    where: Path,
    is_cold: bool,
    methods: list[str],
) -> None:
    """Print a row for each contender."""
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder, wanted = Path(name), shapes(num_millions)
        for seed in range(num_experts + 1):
            save_file(random_tensors(wanted, seed), folder / f"{seed}.safetensors", {"format": "pt"})
        size = (folder / "0.safetensors").stat().st_size / 1e9
        times: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        for repeat in range(num_repeats):
            for who, (command, environment) in list(
                contenders(folder, num_experts, peers, num_millions is None, methods).items()
            )[:: -1 if repeat % 2 else 1]:
                if is_cold:
                    drop_caches()
                seconds, peaks[who] = run_and_watch(command, environment)
                times.setdefault(who, []).append(seconds)
        first = times["read every input, write one"]
        for who, seconds_of in times.items():
            ratio = statistics.median(t / f for t, f in zip(seconds_of, first, strict=True))
            median = statistics.median(seconds_of)
            print(
                f"| {size:.2f} GB | {num_experts} | {who} | {median:.1f} | {ratio:.2f} | {peaks[who]:.2f} |", flush=True
            )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="*", default=[], help="of parameters")
    parser.add_argument("--experts", type=int, nargs="*", default=[4])
    parser.add_argument("--sdxl", action="store_true", help="the tensors of the SDXL U-Net, 2.6 billion parameters")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--num-repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the system's file cache before each (as root)")
    parser.add_argument("--methods", nargs="*", default=[], help="other rules than the linear one, at density 0.7")
    parser.add_argument("--where", type=Path, help="folder for the files: six times the network's size")
    arguments = parser.parse_args()
    print("| a file | experts | | seconds | / first | memory, GB |\n|---|---|---|---|---|---|")
    for num_millions in [*arguments.millions, *([None] if arguments.sdxl else [])]:
        for num_experts in arguments.experts:
            compare(
                num_millions,
                num_experts,
                arguments.peers,
                arguments.num_repeats,
                arguments.where,
                arguments.cold,
                arguments.methods,
            )


if __name__ == "__main__":
    main()
