"""Noise processes: how images become noise, what a network says of the mixture, and which timesteps training draws.

Everything that depends on a schedule is behind ``Process``: ``VP`` for DDPM's variance-preserving schedules, ``Flow``
for the straight paths of flow matching. x_t = a·x0 + s·ε in both; a timestep counts from 0, the clean image, to T.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Real
from torch import Tensor

from ..errors import UserError
from .timesteps import TimestepRange, draw_timesteps, exact, split_timesteps

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
Timesteps = Real[Tensor, " batch"]


@runtime_checkable
class Process(Protocol):
    """What trainings, losses and analyses ask of a schedule. Tensors are [batch, …], t is [batch]."""

    @property
    def num_train_timesteps(self) -> int:
        """T, the length of the schedule."""
        ...

    def mix(self, x0: Tensor, noise: Tensor, t: Timesteps) -> Tensor:
        """Compute x_t = a·x0 + s·ε."""
        ...

    def target(self, x0: Tensor, noise: Tensor, t: Timesteps) -> Tensor:
        """Say what the network should output."""
        ...

    def x0_of(self, x_t: Tensor, output: Tensor, t: Timesteps) -> Tensor:
        """Compute the estimate of x0 that an output amounts to."""
        ...

    def snr(self, t: Timesteps) -> Float[Tensor, " batch"]:
        """Compute the signal-to-noise ratio a²/s², in [0, ∞]."""
        ...

    def x0_error(self, t: Timesteps) -> Float[Tensor, " batch"]:
        """Compute the factor from the squared error of an output to that of the x0 which it amounts to, in [0, ∞]."""
        ...

    def visited(self, t: Tensor) -> Tensor:
        """Map timesteps that a sampler visits to some that ranges hold."""
        ...

    def to(self, device: torch.device) -> "Process":
        """Move what tensors the process has."""
        ...

    def draw(
        self, num: int, own: TimestepRange, global_prob: float, generator: torch.Generator, antithetic: bool = False
    ) -> Timesteps:
        """Draw training timesteps by the base's density: restricted to a range, or of all with probability p."""
        ...

    def spread(self, own: TimestepRange, num: int) -> Timesteps:
        """Place timesteps evenly over a range, for losses that are compared with each other."""
        ...

    def split(self, num_ranges: int) -> list[TimestepRange]:
        """Cut the schedule into the ranges that N experts have by default."""
        ...

    def share(self, own: TimestepRange) -> float:
        """Compute the share of the training's draws that fall into a range, without a global probability."""
        ...

    def step_share(self, own: TimestepRange) -> float:
        """Compute the share of a sampler's steps, spread evenly over the schedule, that fall into a range."""
        ...


def _as(coefficient: Tensor, like: Tensor) -> Tensor:
    return coefficient.reshape(-1, *[1] * (like.dim() - 1)).to(like)


@dataclass(frozen=True)
class VP:
    """A variance-preserving schedule: a = √ᾱ_t, s = √(1 - ᾱ_t), integer timesteps, drawn uniformly (DDPM, Eq. 4).

    Attributes:
        alphas_cumprod: ᾱ_t, float32 [T]; the last may be 0 (zero terminal SNR, Lin et al. 2023).
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction`` (v = a·ε - s·x0, Salimans & Ho 2022, appendix D).

    Raises:
        UserError: the prediction type is none of these.
    """

    alphas_cumprod: Float[Tensor, " T"]
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(f"prediction type is {self.prediction_type!r}, not one of {', '.join(PREDICTION_TYPES)}")

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> "VP":
        """Move the schedule."""
        return VP(self.alphas_cumprod.to(device), self.prediction_type)

    def visited(self, t: Tensor) -> Tensor:
        """Cut fractions off: some samplers visit timesteps between those of the schedule."""
        return t.long()

    def _scales(self, t: Timesteps, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod[t]
        return _as(alpha_bar.sqrt(), like), _as((1 - alpha_bar).sqrt(), like)

    def mix(self, x0: Tensor, noise: Tensor, t: Timesteps) -> Tensor:
        signal, sigma = self._scales(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Timesteps) -> Tensor:
        if self.prediction_type == "v_prediction":
            signal, sigma = self._scales(t, x0)
            return signal * noise - sigma * x0
        return noise if self.prediction_type == "epsilon" else x0

    def x0_of(self, x_t: Tensor, output: Tensor, t: Timesteps) -> Tensor:
        """Compute x0; of an ε it is undefined where ᾱ_t is 0, and infinite or NaN there."""
        signal, sigma = self._scales(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / signal
        return output if self.prediction_type == "sample" else signal * x_t - sigma * output

    def snr(self, t: Timesteps) -> Float[Tensor, " batch"]:
        alpha_bar = self.alphas_cumprod[t]
        return alpha_bar / (1 - alpha_bar)

    def x0_error(self, t: Timesteps) -> Float[Tensor, " batch"]:
        """Compute s²/a² for ε, 1 for x0, s² for v."""
        alpha_bar = self.alphas_cumprod[t]
        if self.prediction_type == "sample":
            return torch.ones_like(alpha_bar)
        return (1 - alpha_bar) / alpha_bar if self.prediction_type == "epsilon" else 1 - alpha_bar

    def draw(
        self, num: int, own: TimestepRange, global_prob: float, generator: torch.Generator, antithetic: bool = False
    ) -> Timesteps:
        return draw_timesteps(num, own, self.num_train_timesteps, global_prob, generator, antithetic)

    def spread(self, own: TimestepRange, num: int) -> Timesteps:
        return (own.low + (torch.arange(num) + 0.5) / num * (own.high - own.low)).long()

    def split(self, num_ranges: int) -> list[TimestepRange]:
        return split_timesteps(self.num_train_timesteps, num_ranges)

    def share(self, own: TimestepRange) -> float:
        return (own.high - own.low) / self.num_train_timesteps

    def step_share(self, own: TimestepRange) -> float:
        return self.share(own)


@dataclass(frozen=True)
class Flow:
    """Straight paths from image to noise: a = 1 - σ, s = σ, t = 1000·σ, velocity ε - x0 (Lipman et al. 2023).

    Timesteps are real numbers in (0, T]. A range is stated in the noise level, whatever the shift: that is what the
    network is told, and what a router compares with. The shift σ = s·u / (1 + (s - 1)·u) (Esser et al. 2024, Eq. 23)
    says only how many of a sampler's steps, spread evenly in u, and how many training draws fall into a range.

    Attributes:
        shift: s > 0 of the sampler and of the density, at the size that is trained on; 1 leaves σ = u.
        density: of u in training: ``uniform``, or ``logit_normal``, u = sigmoid(N(mean, std)).
    """

    shift: float = 1.0
    density: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    num_train_timesteps: int = 1000

    def to(self, device: torch.device) -> "Flow":
        """Return itself: it holds no tensors."""
        return self

    def visited(self, t: Tensor) -> Tensor:
        """Put T itself, where sampling starts, into the noisiest range, and a step on an edge into the one above.

        Sampler and edges are rounded differently: what is within 0.001 of an edge lies on it. On the CPU, since the
        number below T needs float64, which Apple's GPUs don't have.
        """
        return (t.detach().cpu().double() + 1e-3).clamp(max=math.nextafter(self.num_train_timesteps, 0))

    def _sigma(self, t: Timesteps, like: Tensor) -> Tensor:
        return _as(exact(t) / self.num_train_timesteps, like)

    def mix(self, x0: Tensor, noise: Tensor, t: Timesteps) -> Tensor:
        sigma = self._sigma(t, x0)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Timesteps) -> Tensor:
        return noise - x0

    def x0_of(self, x_t: Tensor, output: Tensor, t: Timesteps) -> Tensor:
        return x_t - self._sigma(t, x_t) * output

    def snr(self, t: Timesteps) -> Float[Tensor, " batch"]:
        sigma = exact(t) / self.num_train_timesteps
        return ((1 - sigma) / sigma).square().float()

    def x0_error(self, t: Timesteps) -> Float[Tensor, " batch"]:
        """Compute s²."""
        return (exact(t) / self.num_train_timesteps).square().float()

    def shifted(self, u: Tensor) -> Tensor:
        """Map u in [0, 1] to σ in [0, 1]."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def unshifted(self, sigma: Tensor) -> Tensor:
        """Map σ back to u."""
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def cumulative(self, t: Tensor) -> Tensor:
        """Compute the share of the training's draws below timesteps, float64."""
        u = self.unshifted(t.double() / self.num_train_timesteps).clamp(0, 1)
        return u if self.density == "uniform" else torch.special.ndtr((torch.logit(u) - self.mean) / self.std)

    def quantile(self, q: Tensor) -> Tensor:
        """Invert ``cumulative``."""
        u = q if self.density == "uniform" else torch.sigmoid(self.mean + self.std * torch.special.ndtri(q))
        return self.num_train_timesteps * self.shifted(u)

    def draw(
        self, num: int, own: TimestepRange, global_prob: float, generator: torch.Generator, antithetic: bool = False
    ) -> Timesteps:
        """Draw timesteps by the density itself: what of it lies in the range, not the density squeezed onto it.

        The coin p is tossed for every sample (DeMe, Eq. 6). With ``antithetic``, draws come in pairs of mirrored
        quantiles, which leaves each sample's distribution unchanged.

        Returns:
            float32 timesteps in the range, or in (0, T) where the coin says so, on the CPU.
        """
        half = (num + 1) // 2 if antithetic else num
        is_global = torch.rand(half, generator=generator) < global_prob
        uniform = torch.rand(half, generator=generator, dtype=torch.float64)
        low, high = self.cumulative(torch.tensor([own.low, own.high], dtype=torch.float64)).tolist()
        first, last = (torch.where(is_global, a, b).double() for a, b in ((0.0, low), (1.0, high)))
        q = first + uniform * (last - first)
        if antithetic:
            q, is_global = torch.cat([q, first + last - q])[:num], is_global.repeat(2)[:num]
        t = self.quantile(q).float()
        # Rounding may not carry a draw over an edge, nor to σ = 0, where there is nothing to learn.
        smallest = math.ulp(1.0) * self.num_train_timesteps
        bounds = torch.tensor([max(own.low, smallest), own.high]), torch.tensor([smallest, self.num_train_timesteps])
        (low_own, high_own), (low_all, high_all) = (torch.nextafter(b.float(), b.float().flip(0)) for b in bounds)
        return t.clamp(torch.where(is_global, low_all, low_own), torch.where(is_global, high_all, high_own))

    def spread(self, own: TimestepRange, num: int) -> Timesteps:
        return (own.low + (torch.arange(num, dtype=torch.float64) + 0.5) / num * (own.high - own.low)).float()

    def split(self, num_ranges: int) -> list[TimestepRange]:
        """Cut the noise levels so that every expert gets an equal share of the sampler's steps.

        Raises:
            UserError: the number is below 1.
        """
        if num_ranges < 1:
            raise UserError(f"num_ranges is {num_ranges}, expected at least 1")
        inner = self.shifted(torch.arange(1, num_ranges, dtype=torch.float64) / num_ranges)
        edges = [0.0, *(inner * self.num_train_timesteps).tolist(), float(self.num_train_timesteps)]
        return [TimestepRange(low, high) for low, high in pairwise(edges)]

    def share(self, own: TimestepRange) -> float:
        low, high = self.cumulative(torch.tensor([own.low, own.high], dtype=torch.float64)).tolist()
        return high - low

    def step_share(self, own: TimestepRange) -> float:
        """Compute the share of a sampler's steps, spread evenly in u, that fall into a range."""
        edges = torch.tensor([own.low, own.high], dtype=torch.float64) / self.num_train_timesteps
        low, high = self.unshifted(edges).tolist()
        return high - low
