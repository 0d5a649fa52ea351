"""Time our finetuning update against a bare PyTorch loop of the same model and batch, interleaved in one process.

The bare loop does what nobody can leave out: draw a batch, student forward and backward, teacher forward, clipping,
AdamW, EMA. Ours is ``decouple_merge.training.loop.train`` as users run it. The network is the architecture of
configs/fashion-base.yaml, untrained; the images are random. Only ratios are meant to be quoted:

    python benchmarks/finetune.py
    python benchmarks/finetune.py --precision bf16 --compile
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import decouple_merge.training.loop as loop
from decouple_merge.config import Data, Finetune, Projection, load_config
from decouple_merge.data.images import ArrayImages
from decouple_merge.diffusion.process import VP
from decouple_merge.diffusion.timesteps import TimestepRange, split_timesteps
from decouple_merge.executors.devices import default_device
from decouple_merge.models.base import Base, create_base
from decouple_merge.models.network import new_network
from decouple_merge.storage.provenance import git_commit
from decouple_merge.training.records import StepRecord
from decouple_merge.training.trainer import Task
from interleaved import advance, interleaved, ratios

CONFIG = Path(__file__).parents[1] / "configs" / "fashion-base.yaml"
NUM_IMAGES = 4096


def our_updates(
    base: Base, images: ArrayImages, settings: Finetune, projection: str, folder: Path
) -> Iterator[StepRecord]:
    ranges = tuple(split_timesteps(base.num_train_timesteps, settings.num_ranges))
    changed = settings.model_copy(update={"projection": Projection(placement=projection)})
    return loop.train(base, images, Data(), Task("expert-0", ranges[0], ranges), changed, 0, folder)


def bare_updates(base: Base, pixels: Tensor, settings: Finetune, own: TimestepRange) -> Iterator[None]:
    device = default_device()
    assert isinstance(base.process, VP)
    pixels, alphas_cumprod = pixels.to(device), base.process.alphas_cumprod.to(device)
    student, teacher = new_network(base).to(device).train(), new_network(base).to(device).requires_grad_(False).eval()
    if settings.compile:
        student.compile()
        teacher.compile()
    parameters = list(student.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, settings.betas, settings.eps, settings.weight_decay, fused=True
    )
    bf16 = settings.mixed_precision == "bf16"
    while True:
        x0 = pixels[torch.randint(len(pixels), (settings.batch_size,), device=device)].float() / 127.5 - 1
        t = torch.randint(int(own.low), int(own.high), (settings.batch_size,), device=device)
        noise = torch.randn_like(x0)
        alpha_bar = alphas_cumprod[t][:, None, None, None]
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            with torch.no_grad():
                taught = teacher(x_t, t, return_dict=False)[0]
            output = student(x_t, t, return_dict=False)[0]
        loss = F.mse_loss(output.float(), noise) + F.mse_loss(output.float(), taught.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(ema, [p.data for p in parameters], 0.001)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-updates", type=int, default=5, help="updates of each side in a repeat")
    parser.add_argument("--num-repeats", type=int, default=20)
    parser.add_argument("--num-warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    # A record after every update: the time between two records is then that of one update, its logging included.
    loop.SECONDS_BETWEEN_RECORDS = 0.0
    never = 10**9
    settings = Finetune(
        num_updates=never,
        batch_size=args.batch_size,
        mixed_precision=args.precision,
        compile=args.compile,
        validate_every=never,
        checkpoint_every=never,
        tracker="none",
    )
    section = load_config(CONFIG).pretrain
    assert section is not None
    base = create_base(section.model, section.scheduler, seed=0)
    shape = (NUM_IMAGES, base.channels, base.image_size, base.image_size)
    images = ArrayImages(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    own = split_timesteps(base.num_train_timesteps, settings.num_ranges)[0]

    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Iterator[object]] = {
            "bare loop": bare_updates(base, images.pixels, settings, own),
            "ours, no projection": our_updates(base, images, settings, "none", Path(folder) / "none"),
            "ours, folded projections": our_updates(base, images, settings, "folded", Path(folder) / "folded"),
        }
        for updates in sides.values():
            advance(updates, args.num_warmup)
        # Both sides yield after each update.
        contenders = {n: partial(advance, updates, args.num_updates) for n, updates in sides.items()}
        seconds = interleaved(contenders, args.num_repeats)

    print(f"commit {git_commit()}, torch {torch.__version__}, {default_device().type}, {args.threads} thread(s)")
    print(
        f"batch {args.batch_size}, precision {args.precision}, {'compiled' if args.compile else 'eager'}, "
        f"{args.num_repeats} repeats of {args.num_updates} updates\n"
    )
    print("| update | time / bare loop, median (quartiles) |\n|---|---|")
    for name in list(sides)[1:]:
        print(f"| {name} | {ratios(seconds[name], seconds['bare loop'], 3)} |")


if __name__ == "__main__":
    main()
