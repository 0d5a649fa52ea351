"""Time a finetuning update from cached latents and embeddings against one that encodes its images and captions.

Both are ``training.loop.train`` with the same network, batch and settings, interleaved in one process. What
encodes does what trainers without a cache do: VAE and text encoders stay in memory, and see every batch. Images are
random, of the base's size. Only ratios are meant to be quoted:

    python benchmarks/cache.py --base models/emoji-sd
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import decouple_merge.training.loop as loop
from decouple_merge.config import Data, Finetune, Projection
from decouple_merge.data.batches import Examples, LatentBatch
from decouple_merge.data.images import ArrayImages, Images, to_model
from decouple_merge.data.latents import Latents
from decouple_merge.diffusion.timesteps import split_timesteps
from decouple_merge.executors.devices import default_device
from decouple_merge.models.base import load_base
from decouple_merge.models.family import Encoders
from decouple_merge.models.parts import load_text_encoders, load_vae
from decouple_merge.storage.provenance import git_commit
from decouple_merge.training.trainer import Task
from interleaved import advance, interleaved, ratios

NUM_IMAGES = 2048
DATA = Data(num_held_out=64)


class Encoded(Examples):
    """Captioned images, encoded whenever they are asked for."""

    labels = groups = ()

    def __init__(self, encoders: Encoders, images: Images, captions: list[str], device: torch.device) -> None:
        self.images, self.captions, self.device, self.sha256 = images, captions, device, images.sha256
        self.family = encoders.family
        self.vae, self.texts = load_vae(encoders, device), load_text_encoders(encoders, device)
        self.vae.disable_slicing()

    def __hash__(self) -> int:
        return id(self)

    def __len__(self) -> int:
        return len(self.captions)

    def stack(self, indices: Sequence[int]) -> LatentBatch:
        pixels = to_model(self.images.stack(indices)).to(self.device)
        condition = self.family.encode_texts(self.texts, [*(self.captions[i] for i in indices), ""])
        empty = {name: value[-1] for name, value in condition.items()}
        condition = {name: value[:-1] for name, value in condition.items()}
        return LatentBatch(self.family.encode_images(self.vae, pixels)[:, None], condition, empty)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/emoji-sd")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-updates", type=int, default=5, help="updates of each side in a repeat")
    parser.add_argument("--num-repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    # A record after every update: the time between two records is then that of one update, its logging included.
    loop.SECONDS_BETWEEN_RECORDS = 0.0
    never = 10**9
    settings = Finetune(
        num_updates=never,
        batch_size=args.batch_size,
        projection=Projection(placement="none"),
        validate_every=never,
        checkpoint_every=never,
        tracker="none",
    )
    base, device = load_base(args.base), default_device()
    assert base.encoders is not None, "the base is no latent model"
    encoders = base.encoders
    shape = (NUM_IMAGES, encoders.channels, encoders.image_size, encoders.image_size)
    images = ArrayImages(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    captions = [f"number {i}" for i in range(NUM_IMAGES)]
    ranges = tuple(split_timesteps(base.num_train_timesteps, settings.num_ranges))

    with tempfile.TemporaryDirectory() as folder:
        os.environ["DEME_CACHE"] = str(Path(folder, "cache"))
        cached = Latents(encoders, images, captions, encoders.image_size, DATA, device)
        for _ in cached.fill():
            pass
        contenders: dict[tuple[str, float], Callable[[], object]] = {}
        for name, examples in (("cached", cached), ("encoded", Encoded(encoders, images, captions, device))):
            for weight in (0.0, 1.0):
                task = Task("expert-0", ranges[0], ranges)
                changed = settings.model_copy(update={"consistency_weight": weight})
                where = Path(folder, f"{name}-{weight}")
                updates = loop.train(base, examples, DATA, task, changed, 0, where)
                # Both sides yield after each update; the first ones warm them up.
                contenders[name, weight] = partial(advance, updates, args.num_updates)
                contenders[name, weight]()
        seconds = interleaved(contenders, args.num_repeats)

    print(f"commit {git_commit()}, torch {torch.__version__}, {device.type}, {args.threads} thread(s)")
    print(f"{args.base}, batch {args.batch_size}, {args.num_repeats} repeats of {args.num_updates} updates\n")
    print("| update | encoding / cached, median (quartiles) |\n|---|---|")
    for weight, kind in ((0.0, "without a teacher"), (1.0, "with a teacher")):
        print(f"| {kind} | {ratios(seconds['encoded', weight], seconds['cached', weight])} |")


if __name__ == "__main__":
    main()
