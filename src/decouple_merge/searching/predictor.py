"""A small network that ranks model schedules by the distance their images will have (OMS-DPM, section 4.3)."""

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..seeds import stream_seed
from .schedules import Slots

WIDTH = 32
LEARNING_RATE = 2e-3
# Pairs whose values differ by less than so many standard deviations say nothing: few images are noise.
MIN_DIFFERENCE = 0.05


class Predictor(nn.Module):
    """A schedule's slots, each as model and place, to one number: smaller is better.

    What a slot adds on its own is summed; a convolution over the slots adds what depends on those beside it. It stands
    in the place of OMS-DPM's LSTM, which takes ten times as long on a CPU.

    Args:
        num_models: of the zoo; 0 stands for a step that is skipped.
        num_slots: of every schedule.
    """

    def __init__(self, num_models: int, num_slots: int) -> None:
        super().__init__()
        self.model = nn.Embedding(num_models + 1, WIDTH // 2)
        self.register_buffer("time", _sinusoids(num_slots, WIDTH // 2))
        self.slot = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.alone = nn.Linear(WIDTH, 1)
        self.beside = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 5, padding=2), nn.SiLU())
        self.together = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    def forward(self, slots: Int[Tensor, "n s"]) -> Float[Tensor, " n"]:
        time: Tensor = self.time  # type: ignore[assignment]
        read = self.slot(torch.cat([self.model(slots), time.expand(len(slots), -1, -1)], -1))
        return (self.alone(read).sum(1) + self.together(self.beside(read.mT).mean(2))).squeeze(-1)


def _sinusoids(num: int, width: int) -> Float[Tensor, "num width"]:
    """Embed places in [0, 1] by sines and cosines of frequencies from π/2 to 8π."""
    place = torch.linspace(0, 1, num)[:, None]
    frequencies = torch.pi / 2 * torch.logspace(0, 1, width // 2, base=16)
    return torch.cat([(place * frequencies).sin(), (place * frequencies).cos()], 1)


def hinge(predicted: Float[Tensor, " n"], values: Float[Tensor, " n"], margin: float = 1.0) -> Float[Tensor, ""]:
    """Compute the pairwise hinge loss: the mean of max(0, margin - (s_j - s_i)) over pairs with v_i < v_j.

    Pairs whose values differ by less than 0.05 standard deviations are left out. 0 where there is no other.
    """
    higher = values[None, :] - values[:, None] > MIN_DIFFERENCE * values.std()
    losses = (margin - (predicted[None, :] - predicted[:, None])).clamp(min=0)
    return losses[higher].mean() if bool(higher.any()) else predicted.sum() * 0


def fit_predictor(
    schedules: Sequence[Slots], values: Sequence[float], num_models: int, num_updates: int, seed: int
) -> Predictor:
    """Train a predictor on schedules whose values are known, with Adam on all pairs at once.

    Nothing but the arguments decides the result; no global random state is changed.
    """
    slots, known = torch.tensor(schedules), torch.tensor(values, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "predictor"))
        predictor = Predictor(num_models, slots.shape[1])
        optimizer = torch.optim.AdamW(predictor.parameters(), LEARNING_RATE, weight_decay=0.01)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)
        for _ in range(num_updates):
            optimizer.zero_grad()
            hinge(predictor(slots), known).backward()
            optimizer.step()
            rates.step()
    return predictor.eval()


@torch.no_grad()
def predict(predictor: Predictor, schedules: Sequence[Slots]) -> list[float]:
    """Predict how schedules rank: smaller is better; the numbers have no unit."""
    return predictor(torch.tensor(schedules)).tolist() if schedules else []


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Compute Kendall's τ-b: agreeing less disagreeing pairs, over √ of the pairs untied in each.

    NaN where one of the two is constant.
    """
    signs = [
        (((a > b) - (a < b)), ((c > d) - (c < d)))
        for (a, c), (b, d) in combinations(zip(first, second, strict=True), 2)
    ]
    untied = sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs)
    return sum(x * y for x, y in signs) / untied**0.5 if untied else float("nan")
