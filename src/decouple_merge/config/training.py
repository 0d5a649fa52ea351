"""How a network is trained: what the sections ``finetune`` and ``pretrain`` share."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import UserError
from .balancing import Balancing, by_method
from .numbers import Decay, Integer, NonNegativeFloat, NonNegativeInt, Number, PositiveFloat, PositiveInt
from .section import Precision, Section


class Ema(Section):
    """Exponential moving average of the weights, decay at update s: min(max_decay, 1 - (1 + s)^-power).

    Attributes:
        max_decay: what is kept of the average at an update, at most.
        power: how fast the decay rises.
    """

    max_decay: Decay = 0.9999
    power: PositiveFloat = 0.75


class Distance(Section):
    """What is drawn and compared with the data while a model is trained: its averaged weights, in few images.

    An expert draws on its own range and the base on the others, so that only the range's training counts. The seeds lie
    behind the search's: whoever stops a training by this number chooses a model by it.

    Attributes:
        every: updates; a multiple of ``validate_every``, since it is logged with the validation. Also after the last.
        metric: a distance.
        num_images: drawn each time.
        num_steps: of the sampler of ``sample``.
    """

    every: PositiveInt = 1000
    metric: str = "kd_effnetlite0"
    num_images: Integer = Field(256, ge=2)
    num_steps: PositiveInt = 20


class Density(Section):
    """Which timesteps the training of a flow draws; its name alone may stand for it.

    Attributes:
        name: of the density of u, from which the base's shift makes σ: ``uniform``, or ``logit_normal``,
            u = sigmoid(N(mean, std)).
    """

    name: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: Number = 0.0
    std: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _read_by_its_name(self) -> "Density":
        if self.name == "uniform" and (self.mean, self.std) != (0, 1):
            raise UserError(f"density is uniform, and has mean {self.mean} and std {self.std}: leave both out")
        return self


class Training(Section):
    """One training run: an expert, the baseline or a base model. Updates are optimiser updates.

    Attributes:
        num_updates: after which it ends.
        batch_size: images per process and micro-batch; an update sees processes × batch_size × accumulation.
        num_ranks: processes that train one model together, each on batches of its own, on one machine and its GPUs;
            where torchrun started several, those do.
        sharding: ``none``, every process holds the network, its averages and AdamW's moments; or ``full``, each holds a
            part of every tensor (FSDP2), for networks that one GPU can't hold.
        learning_rate: the highest of the training.
        num_warmup_updates: in which the rate rises from 0, whatever the schedule.
        schedule: the rate over the updates: ``constant``; ``cosine`` and ``linear`` fall to
            learning_rate × floor, which they reach after ``decay_fraction`` of the updates.
        optimizer: ``adamw``, torch's, fused; or ``adamw8bit``, bitsandbytes', whose moments take a quarter of that.
        betas, weight_decay, eps: of the optimiser; DeMe's where not given.
        max_grad_norm: longer gradients are made as long.
        antithetic: draw timesteps in pairs that mirror each other in their range, which makes the loss less noisy.
        mixed_precision: of the network while it is trained; its weights, averages and moments stay in float32.
        compile: the network, by torch.compile; a check of its gradients comes first.
        validate_every: updates after which the loss on held-out images is logged, range by range.
        checkpoint_every: updates after which all is written that a training goes on from.
        gradient_checkpointing: compute activations again for the backward pass: less memory, a third more compute.
        density: of a flow's timesteps; None is the logit-normal of mean 0 and deviation 1. Others have no density.
        weighting: of the loss over timesteps, a name of ``diffusion.weightings`` such as ``min_snr``; or a table w(t)
            of the error of the network's output, numbers for equal parts of the schedule, the cleanest first; None
            weighs that alike everywhere.
        weighting_options: of that weighting, such as ``gamma``.
        spectrum_power: of the frequency that weighs the error's spectrum: None weighs all alike, 1 gives detail more.
        balancing: weights that are learned while the network is trained, on top of the weighting; None learns none.
        keep_every: updates after which the averaged weights are kept as a model, in ``checkpoints/``; None keeps none.
        distance: None draws nothing during training.
        tracker: of the curves, by the library's name; ``log.jsonl`` holds the same numbers.
    """

    num_updates: PositiveInt = 20_000
    batch_size: PositiveInt = 64
    accumulation: PositiveInt = 1
    num_ranks: PositiveInt = 1
    sharding: Literal["none", "full"] = "none"
    learning_rate: PositiveFloat = 2e-4
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    num_warmup_updates: NonNegativeInt = 0
    floor: Number = Field(0.0, ge=0, le=1)
    decay_fraction: Number = Field(1.0, gt=0, le=1)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    betas: tuple[Decay, Decay] = (0.95, 0.999)
    weight_decay: NonNegativeFloat = 1e-6
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    antithetic: bool = True
    density: Density | None = None
    weighting: str | Annotated[list[NonNegativeFloat], Field(min_length=1)] | None = None
    weighting_options: dict[str, Number] = {}
    spectrum_power: Number | None = Field(None, ge=-2, le=2)
    balancing: Balancing | None = None
    mixed_precision: Precision = "fp32"
    compile: bool = False
    gradient_checkpointing: bool = False
    ema: Ema = Ema()
    validate_every: PositiveInt = 500
    checkpoint_every: PositiveInt = 1000
    keep_every: PositiveInt | None = None
    distance: Distance | None = None
    tracker: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = "none"

    @field_validator("density", mode="before")
    @classmethod
    def _density_by_name(cls, density: Any) -> Any:
        return {"name": density} if isinstance(density, str) else density

    @field_validator("balancing", mode="before")
    @classmethod
    def _balancing_by_name(cls, balancing: Any) -> Any:
        return by_method(balancing)

    @model_validator(mode="after")
    def _what_falls(self) -> "Training":
        if self.schedule == "constant" and (self.floor, self.decay_fraction) != (0, 1):
            raise UserError(
                f"floor is {self.floor} and decay_fraction {self.decay_fraction}, and the rate is constant: set "
                "schedule to cosine or linear, or leave both out"
            )
        return self

    @model_validator(mode="after")
    def _a_part_of_the_batch_for_each_cluster(self) -> "Training":
        balancing = self.balancing
        num = self.batch_size * self.num_ranks
        if balancing and balancing.cuts_batches and num < balancing.num_clusters:
            raise UserError(
                f"a batch of all processes has {num} images, and {balancing.method} cuts it among "
                f"{balancing.num_clusters} clusters of timesteps: raise batch_size, or lower balancing.num_clusters"
            )
        return self

    @model_validator(mode="after")
    def _distance_at_validations(self) -> "Training":
        if self.distance is not None and self.distance.every % self.validate_every:
            raise UserError(
                f"distance.every is {self.distance.every}, expected a multiple of validate_every, {self.validate_every}"
            )
        return self
