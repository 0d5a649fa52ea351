"""Train models/fashion-judge, a classifier of Fashion-MNIST whose features no search of ours sees, and test it.

It learns from the 60,000 training images, mirrored and moved by up to two pixels. The table is of the 10,000 test
images.

    python benchmarks/fashion_judge.py --out models/fashion-judge
"""

import argparse
import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from decouple_merge.config import Data
from decouple_merge.data.fashion import FOLDER
from decouple_merge.data.sources import load_images
from decouple_merge.evaluation.distances import FeatureStats, frechet_distance
from decouple_merge.evaluation.judge import Judge, load_judge, save_judge
from decouple_merge.seeds import generator

NUM_CLASSES, MAX_SHIFT = 10, 2


def read_split(split: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Read the images and labels of ``train`` or ``test``."""
    images = load_images(Data(source="fashion-mnist", split=split, path=folder), 1, 28)
    name = {"train": "train", "test": "t10k"}[split]
    raw = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    return images.stack(range(len(images))), torch.from_numpy(np.frombuffer(raw, np.uint8, offset=8).astype(np.int64))


def moved(images: Tensor, draws: torch.Generator) -> Tensor:
    """Mirror half of a batch, and move each image by its own number of pixels."""
    num, size = len(images), images.shape[-1]
    padded = F.pad(images, (MAX_SHIFT,) * 4)
    top, left = torch.randint(2 * MAX_SHIFT + 1, (2, num), generator=draws)
    place = torch.arange(size)
    rows, columns = top[:, None] + place, left[:, None] + place
    mirrored = torch.rand(num, generator=draws) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    return padded[torch.arange(num)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(judge: Judge, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(judge.parameters(), lr=arguments.learning_rate, weight_decay=0.05)
    draws, num = generator("fashion judge", arguments.seed), len(images) // arguments.batch_size
    total = arguments.num_epochs * num
    for epoch in range(arguments.num_epochs):
        order, losses = torch.randperm(len(images), generator=draws), []
        for i, batch in enumerate(order.split(arguments.batch_size)[:num]):
            done = (epoch * num + i) / total
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * min(1, done * 10) * (1 + math.cos(math.pi * done)) / 2
            logits = judge(moved(images[batch], draws))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / num:.4f}", flush=True)


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: Tensor) -> float:
    found = torch.cat([judge(batch).argmax(1) for batch in images.split(1000)])
    return float((found == labels).double().mean())


@torch.no_grad()
def stats(judge: Judge, images: Tensor) -> FeatureStats:
    found = FeatureStats.empty(judge.width)
    for batch in images.split(1000):
        found.add(judge.features(batch))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/fashion-judge"))
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = read_split("train", arguments.data)
    if not arguments.out.exists():
        torch.manual_seed(arguments.seed)
        judge = Judge(1, 28, NUM_CLASSES)
        train(judge, images, labels, arguments)
        save_judge(judge.eval(), arguments.out)

    judge = load_judge(arguments.out)
    test, test_labels = read_split("test", arguments.data)
    print(f"accuracy on the test images: {accuracy(judge, test, test_labels):.4f}")
    real = stats(judge, images)
    noise = torch.randn(test.shape, generator=generator("noise", 0))
    blurred = F.avg_pool2d(test.float(), 3, 1, 1).round().to(torch.uint8)
    print("| test images | Fréchet distance to the training images |\n|---|---|")
    for name, pixels in {
        "as they are": test,
        "noise of 5 levels added": (test + 5 * noise).clamp(0, 255).to(torch.uint8),
        "noise of 20 levels added": (test + 20 * noise).clamp(0, 255).to(torch.uint8),
        "each the mean of 3×3 pixels": blurred,
        "upside down": test.flip(2),
        "without the first class": test[test_labels != 0],
    }.items():
        found = stats(judge, pixels)
        value = frechet_distance(found.mean, found.covariance, real.mean, real.covariance)
        print(f"| {name} | {value:.3f} |", flush=True)


if __name__ == "__main__":
    main()
