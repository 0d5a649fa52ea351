"""Time our sampler against diffusers' own DDIMPipeline on the same weights, interleaved in one process.

Both draw the same seeds, so in float32 their images must agree within rounding, which is checked. In lower precision
the pipeline rounds the noise and every x_t as well, ours only the network, so their images differ. The row with batch 1
is what the pipeline does when it is not asked for more. Only ratios are meant to be quoted:

    python benchmarks/sample.py
    python benchmarks/sample.py --compile --num-steps 10
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMPipeline
from torch import Tensor

from decouple_merge.config import Sample
from decouple_merge.executors.devices import default_device
from decouple_merge.models.base import Base, load_base
from decouple_merge.sampling.sampler import denoiser, sample_images, sampling_copy
from decouple_merge.storage.provenance import git_commit
from interleaved import interleaved, ratios

Draw = Callable[[int, int], Tensor]
PIPELINE = "DDIMPipeline"
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def our_draw(base: Base, settings: Sample) -> Draw:
    """Make a function of (number of images, steps) that returns uint8 [n, C, H, W]."""
    device = default_device()
    network = denoiser(base, sampling_copy(base.network, settings, device))
    return lambda num, steps: torch.cat(list(sample_images(network, base, range(num), settings, device, steps)))


def pipeline_draw(base: Base, settings: Sample) -> Draw:
    """Make the same function from diffusers' pipeline, with the network in the same precision."""
    device = default_device()
    pipeline: Any = DDIMPipeline(sampling_copy(base.network, settings, device), base.pipeline.scheduler)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)

    def draw(num: int, steps: int) -> Tensor:
        batches = []
        for seeds in torch.arange(num).split(settings.batch_size):
            generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
            images = pipeline(len(seeds), generators, num_inference_steps=steps, output_type="pt").images
            batches.append((images.float() * 255).round().to(torch.uint8).cpu())
        return torch.cat(batches)

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/fashion-ddpm", help="pipeline folder or hub name")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="also with compiled networks")
    parser.add_argument("--batch-size", type=int, default=Sample().batch_size)
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--num-repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = load_base(args.base)

    draws: dict[tuple[str, str, int], Draw] = {}
    for precision in args.precisions:
        for compiled in [False, True] if args.compile else [False]:
            settings = Sample(precision=precision, compile=compiled, batch_size=args.batch_size)
            how = f"{NAMES[precision]}, {'compiled' if compiled else 'eager'}"
            draws[PIPELINE, how, args.batch_size] = pipeline_draw(base, settings)
            draws["ours", how, args.batch_size] = our_draw(base, settings)
    draws[PIPELINE, "float32, eager", 1] = pipeline_draw(base, Sample(batch_size=1))

    # A batch of one is slow: a few images tell its rate.
    num_images = {key: min(args.batch_size, 4) if key[2] == 1 else args.batch_size for key in draws}
    images = {key: draw(num_images[key], args.num_steps) for key, draw in draws.items()}
    contenders = {key: partial(draw, num_images[key], args.num_steps) for key, draw in draws.items()}
    seconds = interleaved(contenders, args.num_repeats)
    rates = {key: [num_images[key] / s for s in found] for key, found in seconds.items()}

    print(f"commit {git_commit()}, torch {torch.__version__}, {default_device().type}, {args.threads} thread(s)")
    print(f"{args.base}, DDIM {args.num_steps}, {args.num_repeats} repeats; median (quartiles)\n")
    print("| sampler | network | batch | images/s | / first row | / DDIMPipeline alike | largest difference |")
    print("|---|---|---|---|---|---|---|")
    first, agree = next(iter(rates.values())), True
    for (sampler, how, batch), found in rates.items():
        same, difference = "", ""
        if sampler == "ours":
            levels = int((images[sampler, how, batch].int() - images[PIPELINE, how, batch].int()).abs().max())
            same, difference = ratios(found, rates[PIPELINE, how, batch]), str(levels)
            agree &= levels <= 1 or not how.startswith("float32")
        speed = f"{statistics.median(found):.3g}"
        print(f"| {sampler} | {how} | {batch} | {speed} | {ratios(found, first)} | {same} | {difference} |")
    if not agree:
        sys.exit("float32 images differ by more than one of 255 levels")


if __name__ == "__main__":
    main()
