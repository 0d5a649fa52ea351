"""How an update makes one gradient of its samples' losses: by their mean, or by weights that are learned along."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import Balancing, Training
from ..diffusion.clustering import log_snr
from ..diffusion.multitask import nash_weights, pcgrad_weights
from ..diffusion.process import Process, Timesteps
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..executors import distributed
from ..models.ranges import clusters_of
from ..seeds import generator

NUM_FEATURES = 128
UW_LEARNING_RATE = 0.025
Scale = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setup:
    """What the losses of a training are of.

    Attributes:
        own, global_prob: the timesteps that are drawn (DeMe, Eq. 6).
        parameters: of the network.
        key: of the training's random streams.
    """

    process: Process
    own: TimestepRange
    global_prob: float
    settings: Training
    parameters: list[nn.Parameter]
    key: tuple[int | str, ...]
    device: torch.device

    @property
    def balancing(self) -> Balancing:
        assert self.settings.balancing is not None
        return self.settings.balancing

    @property
    def drawn(self) -> TimestepRange:
        """The one range whose timesteps are drawn.

        Raises:
            UserError: a coin chooses between two.
        """
        if 0 < self.global_prob < 1:
            raise UserError(
                f"balancing is {self.balancing.method}, which cuts every batch among clusters of timesteps, and "
                f"global_prob is {self.global_prob:g}, which draws some samples elsewhere: set it to 0 or 1"
            )
        return self.process.split(1)[0] if self.global_prob else self.own


class Mean:
    """The mean over the samples, whose timesteps are drawn by the process's density.

    Attributes:
        learned: parameters that are trained along and dropped afterwards, by name.
        kept: other tensors that the next updates depend on, by name.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.learned: dict[str, nn.Parameter] = {}
        self.kept: dict[str, Tensor] = {}

    @property
    def learning_rate(self) -> float:
        """Of what is trained along, before the schedule."""
        return self.setup.settings.learning_rate

    def groups(self) -> list[dict[str, Any]]:
        """List what is trained along in groups, each with the ``scale`` of its learning rate, without weight decay."""
        scale = self.learning_rate / self.setup.settings.learning_rate
        return [{"params": list(self.learned.values()), "scale": scale, "weight_decay": 0.0}] if self.learned else []

    def tensors(self) -> dict[str, Tensor]:
        """List what the state of a training must hold, by name."""
        return {f"balancing.{name}": value for name, value in {**self.learned, **self.kept}.items()}

    def draw(self, num: int, draws: torch.Generator) -> Timesteps:
        """Draw the timesteps of a batch, one that all processes share."""
        setup = self.setup
        return setup.process.draw(num, setup.own, setup.global_prob, draws, setup.settings.antithetic)

    def takes_gradients(self, update: int) -> bool:
        """Say whether an update (0-based) takes the gradients of several losses, which ``finish`` averages itself."""
        return False

    def objective(self, losses: Float[Tensor, " batch"], t: Timesteps) -> Float[Tensor, ""]:
        """Compute what is minimised."""
        return losses.mean()

    def backward(self, losses: Float[Tensor, " batch"], t: Timesteps, scale: Scale, update: int) -> None:
        """Add to the gradients what a micro-batch says."""
        scale(self.objective(losses, t)).backward()

    def finish(self, update: int) -> None:
        """Complete the gradients after the last micro-batch: those of the network are averaged over processes."""
        for parameter in self.learned.values():
            assert parameter.grad is not None
            distributed.mean(parameter.grad)


class Uncertainty(Mean):
    """The mean of ℓ / exp(u(t)) + u(t), where u is one linear map of random Fourier features of c = ln(σ) / 4.

    At the optimum u = ln E[ℓ | t], so that all timesteps pull alike (Karras et al. 2024, section 2.2: EDM2). The 128
    features are √2·cos(2π(f·c + φ)) with f of N(0, 1) and φ uniform, drawn once; σ² = 1/SNR. The map starts at 0, so
    that the first update is that of the plain loss.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        draws = generator(*setup.key, "uncertainty")
        self.frequencies = torch.randn(NUM_FEATURES, generator=draws).to(setup.device)
        self.phases = torch.rand(NUM_FEATURES, generator=draws).to(setup.device)
        self.learned = {"u": nn.Parameter(torch.zeros(NUM_FEATURES, device=setup.device))}

    @property
    def learning_rate(self) -> float:
        return self.setup.balancing.learning_rate or self.setup.settings.learning_rate

    def u(self, t: Timesteps) -> Float[Tensor, " batch"]:
        """Compute u(t)."""
        c = -log_snr(self.setup.process, t)[:, None] / 8
        features = math.sqrt(2) * (2 * math.pi * (c * self.frequencies + self.phases)).cos()
        return features @ self.learned["u"]

    def objective(self, losses: Float[Tensor, " batch"], t: Timesteps) -> Float[Tensor, ""]:
        u = self.u(t)
        return (losses / u.exp() + u).mean()


class _Clustered(Mean):
    """Losses of k clusters of timesteps, of which each batch has equal parts (Go et al. 2023: ANT).

    Sample j is of cluster j mod k. The loss l_i of a cluster is the mean over its samples in all processes.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.k = setup.balancing.num_clusters
        self.clusters = clusters_of(setup.process, setup.drawn, setup.balancing, self.k)
        num, rank, world = setup.settings.batch_size, distributed.rank(), distributed.world_size()
        cluster = torch.arange(world * num, device=setup.device) % self.k
        member = nn.functional.one_hot(cluster, self.k).T.float()
        # This process's part of the sum over a cluster; the mean over processes divides by their number.
        self.share = world * (member / member.sum(1, keepdim=True))[:, rank * num : (rank + 1) * num]

    def draw(self, num: int, draws: torch.Generator) -> Timesteps:
        process, antithetic = self.setup.process, self.setup.settings.antithetic
        counts = [len(range(i, num, self.k)) for i in range(self.k)]
        parts = [process.draw(n, own, 0.0, draws, antithetic) for n, own in zip(counts, self.clusters, strict=True)]
        t = parts[0].new_empty(num)
        for i, part in enumerate(parts):
            t[i :: self.k] = part
        return t

    def cluster_losses(self, losses: Float[Tensor, " batch"]) -> Float[Tensor, " k"]:
        """Compute l_i, or of several processes what has l_i as its mean over them."""
        return self.share @ losses


class ClusterUncertainty(_Clustered):
    """The sum of ½(exp(-s_i)·l_i/k + s_i), with an s_i for each cluster, 0 at first (Kendall et al. 2018; ANT-UW)."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.learned = {"s": nn.Parameter(torch.zeros(self.k, device=setup.device))}

    @property
    def learning_rate(self) -> float:
        return self.setup.balancing.learning_rate or UW_LEARNING_RATE

    def objective(self, losses: Float[Tensor, " batch"], t: Timesteps) -> Float[Tensor, ""]:
        s = self.learned["s"]
        return (0.5 * ((-s).exp() * self.cluster_losses(losses) / self.k + s)).sum()


class _OfGradients(_Clustered):
    """The gradient Σ a_i ∇l_i / k, with factors a from the inner products of the k gradients over all parameters.

    Every few updates the gradients are taken one by one, over all micro-batches and processes: k backward passes, and
    k times the memory of the parameters. In between, the factors stay.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.kept = {"factors": torch.ones(self.k, dtype=torch.float64)}
        self.gradients: list[list[Tensor]] = []

    @property
    def every(self) -> int:
        """Updates from one choice of factors to the next."""
        return 1

    def factors(self, gram: Float[Tensor, "k k"], update: int) -> Float[Tensor, " k"]:
        """Choose a by the inner products, divided by their Frobenius norm."""
        raise NotImplementedError

    def takes_gradients(self, update: int) -> bool:
        return update % self.every == 0

    def objective(self, losses: Float[Tensor, " batch"], t: Timesteps) -> Float[Tensor, ""]:
        return (self.kept["factors"].to(losses) * self.cluster_losses(losses)).mean()

    def backward(self, losses: Float[Tensor, " batch"], t: Timesteps, scale: Scale, update: int) -> None:
        if not self.takes_gradients(update):
            super().backward(losses, t, scale, update)
            return
        each = scale(self.cluster_losses(losses) / self.k)
        found = [self._gradient(each[i], is_last=i == self.k - 1) for i in range(self.k)]
        if self.gradients:
            found = [list(torch._foreach_add(a, b)) for a, b in zip(self.gradients, found, strict=True)]
        self.gradients = found

    def _gradient(self, loss: Tensor, is_last: bool) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.setup.parameters, retain_graph=not is_last, materialize_grads=True))

    def finish(self, update: int) -> None:
        if not self.takes_gradients(update):
            return
        # Copies: some gradients are views that no process may write into.
        rows = [[distributed.mean(g.clone(memory_format=torch.contiguous_format)) for g in r] for r in self.gradients]
        self.gradients = []
        gram = torch.stack([torch.stack([_inner(a, b) for b in rows]) for a in rows])
        # Where fp16 overflows, the same update comes again, with the factors that it began with.
        if bool(gram.isfinite().all()):
            self.kept["factors"].copy_(self.factors(gram / gram.norm().clamp(min=1e-300), update))
        factors = self.kept["factors"].tolist()
        for parameter, each in zip(self.setup.parameters, zip(*rows, strict=True), strict=True):
            parameter.grad = sum((a * g for a, g in zip(factors[1:], each[1:], strict=True)), factors[0] * each[0])


def _inner(a: list[Tensor], b: list[Tensor]) -> Float[Tensor, ""]:
    """Compute ⟨a, b⟩, float64 on the CPU."""
    return torch.stack([x.flatten() @ y.flatten() for x, y in zip(a, b, strict=True)]).cpu().double().sum()


class Nash(_OfGradients):
    """Factors of the Nash bargain between the clusters, once in ``solve_every`` updates (Navon et al. 2022)."""

    @property
    def every(self) -> int:
        return self.setup.balancing.solve_every

    def factors(self, gram: Float[Tensor, "k k"], update: int) -> Float[Tensor, " k"]:
        return nash_weights(gram)


class PCGrad(_OfGradients):
    """Factors of the sum without conflicts, in an order that seed and update give (Yu et al. 2020)."""

    def factors(self, gram: Float[Tensor, "k k"], update: int) -> Float[Tensor, " k"]:
        return pcgrad_weights(gram, generator(*self.setup.key, "pcgrad", update))


BALANCERS: dict[str, type[Mean]] = {
    "uncertainty": Uncertainty,
    "ant_uw": ClusterUncertainty,
    "ant_nash": Nash,
    "pcgrad": PCGrad,
}


def balancer_of(setup: Setup) -> Mean:
    """Make the strategy that a training's settings name.

    Raises:
        UserError: it cuts batches among clusters, and a coin chooses between two ranges, or there are more clusters
            than timesteps.
    """
    balancing = setup.settings.balancing
    return Mean(setup) if balancing is None else BALANCERS[balancing.method](setup)
