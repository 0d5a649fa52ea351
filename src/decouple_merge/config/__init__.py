"""The typed config of a run: load, override, validate, dump.

Imports seeds.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ..merging.rules import RULES
from ..seeds import check_disjoint

Precision = Literal["fp32", "fp16", "bf16"]
Probability = Field(ge=0, le=1)


def _check_distance(metric: str) -> str:
    if metric.startswith(
        ("precision", "recall", "density", "coverage", "inception_score", "clip_score", "r_precision")
    ):
        raise ValueError("expected a distance, which is smaller for better images")
    return metric


DistanceName = Annotated[str, AfterValidator(_check_distance)]


class Section(BaseModel):
    """A part of the config; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


AnySection = TypeVar("AnySection", bound=Section)


class Data(Section):
    """Where training and reference images come from.

    Attributes:
        source: ``fashion-mnist``, ``noto-emoji``, an image folder, a ``.zip`` or ``.tar`` of one, an ``.npz``/``.npy``
            array, ``datasets:NAME``, or ``webdataset:SHARDS``, a folder of tar files or a path such as
            ``my/{000..127}.tar``.
        path: folder with the files of a known data set, where they are not in their usual place.
        split, column: for ``datasets:`` sources.
        fit: ``exact`` refuses images whose size or channels differ from the model's; ``resize`` crops them to a
            square, resizes and converts them.
        caption_column: of a ``datasets`` source, or the field in metadata.jsonl or in a shard's .json; for
            text-to-image bases; for class-conditional ones of classes.
        flip: mirror half of the training images.
        caption_dropout: share of the captions that training replaces by the empty one, so that guidance stays
            possible.
        cache_precision: of the cached latents and text embeddings.
        num_held_out: images at the end of the data that are never trained on; the validation loss uses them.
        skip_damaged: leave out images that can't be decoded; otherwise they end the run before it starts.
        num_workers: data loader processes; 0 loads in the training process.
    """

    source: str = "fashion-mnist"
    path: Path | None = None
    split: str = "train"
    column: str = "image"
    caption_column: str = "text"
    fit: Literal["exact", "resize"] = "exact"
    flip: bool = False
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    cache_precision: Precision = "fp32"
    num_held_out: PositiveInt = 512
    skip_damaged: bool = False
    num_workers: NonNegativeInt = 0


class Ema(Section):
    """Exponential moving average of the weights, decay at update s: min(max_decay, 1 - (1 + s)^-power)."""

    max_decay: float = Field(0.9999, ge=0, lt=1)
    power: PositiveFloat = 0.75


class Projection(Section):
    """Channel-wise projections P(F) = W·F.

    Attributes:
        placement: ``folded`` multiplies the layer that writes a block's output and folds away on saving;
            ``trunk`` is the paper's layout, whose layers stay in the merged model; ``none`` trains without.
        learning_rate_scale: factor on the learning rate for W, which multiplies how fast its layer moves.
    """

    placement: Literal["folded", "trunk", "none"] = "folded"
    learning_rate_scale: NonNegativeFloat = 0.1


class Lora(Section):
    """Low-rank adapters θ + (alpha / rank)·B·A, with which experts are trained in place of all weights.

    Attributes:
        alpha: None is the rank, a scale of 1.
        target_modules: by the ends of their names.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    target_modules: list[str] = Field(["to_q", "to_k", "to_v", "to_out.0"], min_length=1)


class Distance(Section):
    """What is drawn and compared with the data while a model is trained: its averaged weights, in few images.

    An expert draws on its own range and the base on the others, so that only the range's training counts. The seeds lie
    behind the search's: whoever stops a training by this number chooses a model by it.

    Attributes:
        every: updates; a multiple of ``validate_every``, since it is logged with the validation. Also after the last.
        num_steps: of the sampler of ``sample``.
    """

    every: PositiveInt = 1000
    metric: DistanceName = "kd_effnetlite0"
    num_images: int = Field(256, ge=2)
    num_steps: PositiveInt = 20


class Training(Section):
    """One training run: an expert, the baseline or a base model. Updates are optimiser updates.

    Attributes:
        batch_size: images per process and micro-batch; an update sees batch_size × accumulation × processes.
        schedule: the rate over the updates: ``constant``; ``cosine`` and ``linear`` fall to
            learning_rate × floor, which they reach after ``decay_fraction`` of the updates.
        optimizer: ``adamw``, torch's, fused; or ``adamw8bit``, bitsandbytes', whose moments take a quarter of that.
        gradient_checkpointing: compute activations again for the backward pass: less memory, a third more compute.
        distance: None draws nothing during training.
        tracker: any Accelerate tracker by name, or ``none``.
    """

    num_updates: PositiveInt = 20_000
    batch_size: PositiveInt = 64
    accumulation: PositiveInt = 1
    learning_rate: PositiveFloat = 2e-4
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    num_warmup_updates: NonNegativeInt = 0
    floor: float = Field(0.0, ge=0, le=1)
    decay_fraction: float = Field(1.0, gt=0, le=1)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: NonNegativeFloat = 1e-6
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    antithetic: bool = True
    mixed_precision: Precision = "fp32"
    compile: bool = False
    gradient_checkpointing: bool = False
    ema: Ema = Ema()
    validate_every: PositiveInt = 500
    checkpoint_every: PositiveInt = 1000
    distance: Distance | None = None
    tracker: str = "tensorboard"

    @model_validator(mode="after")
    def _distance_at_validations(self) -> "Training":
        if self.distance is not None and self.distance.every % self.validate_every:
            raise ValueError(
                f"distance.every is {self.distance.every}, expected a multiple of validate_every, {self.validate_every}"
            )
        return self


class Finetune(Training):
    """Training of the experts.

    Attributes:
        num_ranges: N equal timestep ranges, unless ``ranges`` lists [low, high) pairs in timesteps.
        global_prob: p of DeMe, Eq. 6.
        consistency_weight: λ of Eq. 5; 0 trains without the teacher.
        lora: train adapters, without projections; the teacher is the same network with them switched off.
        baseline: also finetune on all timesteps for the same total of updates, to compare with.
    """

    num_ranges: PositiveInt = 4
    ranges: list[tuple[int, int]] | None = None
    global_prob: float = Field(0.4, ge=0, le=1)
    consistency_weight: NonNegativeFloat = 1.0
    projection: Projection = Projection()
    lora: Lora | None = None
    baseline: bool = True

    @model_validator(mode="after")
    def _no_projections_of_adapters(self) -> "Finetune":
        if self.lora is not None and self.projection.placement != "none":
            raise ValueError(
                f"lora is set and projection.placement is {self.projection.placement}; an adapter trains no "
                "projections: set projection.placement to none"
            )
        return self


class Sample(Section):
    """How images are drawn.

    Attributes:
        sampler: a diffusers scheduler by name, with or without ``Scheduler``; built from the base's own config.
        timestep_spacing: leading, trailing or linspace; None keeps what the base's config says.
        precision: of the network while sampling; noise and scheduler stay in float32.
        one_resident: hold one expert of an ensemble in memory at a time, the others in their files; a batch of images
            reads each of them once.
    """

    sampler: str = "DDIM"
    num_steps: PositiveInt = 50
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    batch_size: PositiveInt = 256
    precision: Precision = "fp32"
    compile: bool = False
    one_resident: bool = False


class Text(Section):
    """What text-to-image and class-conditional models are asked for; other models don't use it.

    Attributes:
        prompts: a text file with one prompt a line, PartiPrompts' ``.tsv``, or ``.json`` of texts or COCO's captions;
            None takes the data's captions, in a fixed random order. The prompt of an image is the one at its seed,
            modulo their number.
        template: what is asked for, with the prompt of the file in the place of ``{}``.
        prompt_seed: of the choice of one caption for each of COCO's images, and of their order.
        negative_prompt: what guidance leads away from.
        guidance_scale: 1 is no guidance, which takes half the compute.
    """

    prompts: Path | None = None
    template: str = "{}"
    prompt_seed: NonNegativeInt = 0
    negative_prompt: str = ""
    guidance_scale: float = Field(7.5, ge=1)

    @field_validator("template")
    @classmethod
    def _has_place(cls, template: str) -> str:
        if "{}" not in template:
            raise ValueError("expected {} where the prompt goes, such as 'a photo of a {}'")
        return template


class Search(Section):
    """The search for merging weights.

    Attributes:
        strategy: ``gp`` or ``tpe`` (Optuna samplers), ``cmaes``, ``evolution``, ``coordinate``, ``random``, ``greedy``
            (soup), ``grid``, coarse to fine, or ``gradient``, which tries what was learned and multiples of it.
        method: how candidates are merged, a rule by name.
        density: share of a task vector that TIES keeps.
        blocks: patterns of keys such as ``down_blocks.*``, each with weights of its own; the first that matches counts,
            and the last is ``*`` for all others. A candidate holds the weights of the first, then of the second, ….
        checkpoints: pipelines or weight files to combine in place of the run's experts.
        low, high: bounds of every weight; ``frozen`` fixes some of the winner's, by their place in a candidate.
        start: weight vectors to evaluate before the strategy chooses.
        gradient_batches: training batches on which a weight vector to start with is learned by the gradient of the
            denoising loss; 0 learns none.
        num_trials: candidates to screen, at most; less where max_images, the images drawn for screening, or
            max_minutes, the time spent on it by all workers, are reached before.
        batch_size: candidates that ``gp`` and ``tpe`` propose at once, to keep several workers busy.
        grid_step: of the coarse grid; the fine grid around its best has half of it.
        metric: minimised; candidates are screened on num_images images of num_steps steps (None: as ``sample``).
        halving: each level keeps one candidate in so many, and draws so many times the images.
        num_finalists: compared at last on num_final_images images (None: as many as ``evaluate``) from fresh seeds;
            0 trusts the screening.
        first_seed: of the initial noise; the seeds from there on are the search's.
        storage: URL of the study for workers on several machines; None keeps an SQLite file in the run folder.
    """

    strategy: Literal["gp", "tpe", "cmaes", "evolution", "coordinate", "random", "greedy", "grid", "gradient"] = "gp"
    method: Literal["linear", "ties"] = "linear"
    density: float = Field(1.0, gt=0, le=1)
    blocks: list[str] = Field(["*"], min_length=1)
    checkpoints: list[str] = []
    low: float = -0.2
    high: float = 2.5
    frozen: dict[NonNegativeInt, float] = {}
    start: list[list[float]] = []
    gradient_batches: NonNegativeInt = 200
    num_trials: PositiveInt = 40
    max_images: PositiveInt | None = None
    max_minutes: PositiveFloat | None = None
    batch_size: PositiveInt = 1
    grid_step: PositiveFloat = 0.4
    metric: DistanceName = "fd_effnetlite0"
    num_images: PositiveInt = 1000
    num_steps: PositiveInt | None = None
    halving: int = Field(3, ge=2)
    num_finalists: NonNegativeInt = 3
    num_final_images: PositiveInt | None = None
    first_seed: NonNegativeInt = 1_000_000
    storage: str | None = None

    @model_validator(mode="after")
    def _bounds(self) -> "Search":
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}, expected low below high")
        if self.strategy == "gradient" and self.gradient_batches == 0:
            raise ValueError("gradient_batches is 0, which leaves the strategy gradient nothing to try; set it to 200")
        return self


class Merge(Section):
    """How models are merged.

    Attributes:
        method: a rule by name: of rules.py, or one that was added to its ``RULES``.
        weights: one for each expert.
        blocks: weights of the tensors whose keys match a pattern such as ``down_blocks.*``; the first that matches.
        density: share of a task vector that TIES and DARE keep.
        seed: of DARE's masks.
        fishers: a file for each expert with its diagonal Fisher information under the network's keys, for ``fisher``.
        dtype: of the floating tensors written, F64, F32, F16 or BF16; None keeps the base's.
        max_shard_bytes: a larger network is written as several files with an index.
        allow_non_finite: merge NaN and infinity as they come.
    """

    method: str = "linear"
    weights: list[float] = Field(min_length=1)
    blocks: dict[str, list[float]] = {}
    density: float = Field(1.0, gt=0, le=1)
    seed: NonNegativeInt = 0
    fishers: list[Path] = []
    dtype: Literal["F64", "F32", "F16", "BF16"] | None = None
    max_shard_bytes: PositiveInt = 10_000_000_000
    allow_non_finite: bool = False

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in RULES:
            raise ValueError(f"expected one of {', '.join(RULES)}")
        return method


class Evaluate(Section):
    """What is reported.

    Attributes:
        metrics: ``fd_effnetlite0``, ``kd_effnetlite0`` and others of that network; with ``inception_weights``, ``fid``,
            ``kid``, ``sfid``, ``inception_score`` and others; with ``dinov2`` or ``clip``, ``fd_dinov2``, ``cmmd`` and
            others: all of ``features.METRICS``.
        num_images: in each of num_seed_sets sets of consecutive seeds from first_seed on.
        num_reference_images: of the data, from the start; None takes all.
        num_sample_images: written as PNG for each model.
        inception_weights: the file ``pt_inception-2015-12-05-6726825d.pth``.
        dinov2, clip: folder or hub name of such a model; for ``clip_score`` and ``r_precision`` clip may also be a
            folder of ``alignment.save_image_text``.
    """

    metrics: list[str] = ["fd_effnetlite0", "kd_effnetlite0"]
    num_images: PositiveInt = 5000
    num_seed_sets: PositiveInt = 3
    first_seed: NonNegativeInt = 0
    num_reference_images: PositiveInt | None = None
    num_sample_images: PositiveInt = 64
    inception_weights: Path | None = None
    dinov2: str | None = None
    clip: str | None = None

    @property
    def encoders(self) -> dict[str, str]:
        """The models that are given, by the extractors they serve."""
        return {name: path for name, path in (("dinov2", self.dinov2), ("clip", self.clip)) if path is not None}


class Protocol(Section):
    """What ``deme evaluate`` measures on which images; protocols.yaml has those of papers by name.

    Attributes:
        metrics: of ``features.METRICS``.
        num_images: drawn from a model, 5,000 where it isn't set; of images the first so many, all where it isn't.
        num_reference_images: that the reference must have, where it isn't statistics.
        image_size: images and reference are cut to a square and resized to this before they are scored.
    """

    metrics: list[str] = Field(["fd_effnetlite0"], min_length=1)
    num_images: int | None = Field(None, ge=2)
    num_reference_images: PositiveInt | None = None
    image_size: PositiveInt | None = None
    sample: Sample = Sample()
    text: Text = Text()


class PartTraining(Section):
    """Training of a part that stands around the denoiser of a text-to-image base.

    The rate rises over the first twentieth of the updates and falls to zero by a cosine.
    """

    num_updates: PositiveInt = 4000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-2
    checkpoint_every: PositiveInt = 500


class Vae(PartTraining):
    """Training of a VAE: the mean absolute error of its images and kl_weight times the divergence of its latents.

    Attributes:
        model: arguments of diffusers' AutoencoderKL.
        kl_weight: both terms are means over the values of an image, so that 1e-6 is what Stable Diffusion's has.
    """

    model: dict[str, Any] = {}
    kl_weight: NonNegativeFloat = 1e-3


class TextEncoder(PartTraining):
    """Training of a text encoder, to tell the captions of images from each other (CLIP's loss).

    Attributes:
        model: arguments of transformers' CLIPTextConfig; max_position_embeddings is the length of a text in tokens.
        vocab_size: of the byte pair encoding learned from the captions.
    """

    model: dict[str, Any] = {}
    vocab_size: int = Field(2048, ge=514)


class Pretrain(Training):
    """Training of a base model from nothing.

    Attributes:
        model: arguments of diffusers' UNet2DModel; of UNet2DConditionModel where there are the parts below.
        scheduler: arguments of diffusers' DDPMScheduler; of PNDMScheduler where there are the parts below.
        num_ranges: validation loss is logged for this many equal ranges.
        vae, text_encoder: for a text-to-image base, which has both; they are trained before the denoiser.
    """

    model: dict[str, Any] = {}
    scheduler: dict[str, Any] = {}
    num_ranges: PositiveInt = 4
    vae: Vae | None = None
    text_encoder: TextEncoder | None = None

    @model_validator(mode="after")
    def _both_parts(self) -> "Pretrain":
        if (self.vae is None) != (self.text_encoder is None):
            missing = "vae" if self.vae is None else "text_encoder"
            raise ValueError(f"a text-to-image base has vae and text_encoder, {missing} is missing: give both, or none")
        return self


class Config(Section):
    """A whole run. ``base`` is a pipeline folder or a hub name; ``num_processes`` experts or shards run at once."""

    seed: NonNegativeInt = 0
    base: str = "models/fashion-ddpm"
    num_processes: PositiveInt = 1
    data: Data = Data()
    finetune: Finetune = Finetune()
    sample: Sample = Sample()
    text: Text = Text()
    search: Search = Search()
    evaluate: Evaluate = Evaluate()
    pretrain: Pretrain | None = None

    @property
    def search_seeds(self) -> range:
        return range(self.search.first_seed, self.search.first_seed + self.search.num_images)

    @property
    def final_seeds(self) -> range:
        """The finalists' seeds, after all those that chose them."""
        num = self.search.num_final_images or self.evaluate.num_images
        first = self.search.first_seed + max(num, self.search.num_images)
        return range(first, first + num)

    @property
    def all_search_seeds(self) -> range:
        """Every seed that may enter the choice of the model."""
        last = self.final_seeds if self.search.num_finalists else self.search_seeds
        return range(self.search.first_seed, last.stop)

    @property
    def distance_seeds(self) -> range:
        """Seeds of the images that are drawn during training, after all the search's."""
        trainings = [t for t in (self.finetune, self.pretrain) if t is not None]
        num = max(t.distance.num_images if t.distance else 0 for t in trainings)
        return range(self.all_search_seeds.stop, self.all_search_seeds.stop + num)

    @property
    def report_seeds(self) -> range:
        return range(
            self.evaluate.first_seed,
            self.evaluate.first_seed
            + max(self.evaluate.num_images * self.evaluate.num_seed_sets, self.evaluate.num_sample_images),
        )

    @model_validator(mode="after")
    def _seeds(self) -> "Config":
        check_disjoint(range(self.search.first_seed, self.distance_seeds.stop), self.report_seeds)
        return self


def _nearest_key(model: Any, location: tuple[int | str, ...]) -> str:
    """Name the valid key nearest to the unknown one at the end of a location."""
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation
        model = next((a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")), None)
    match = difflib.get_close_matches(str(location[-1]), list(model.model_fields), n=1, cutoff=0.0)
    return ".".join([*map(str, location[:-1]), *match])


def _explain(model: Any, error: ValidationError, where: str) -> str:
    lines = []
    for e in error.errors():
        key = ".".join(map(str, e["loc"]))
        if e["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}; the nearest valid key is {_nearest_key(model, e['loc'])!r}")
        else:
            message = e["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}, found {e['input']!r}" if key else message)
    return f"{where}: " + "; ".join(lines)


def _override(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {assignment!r}: expected key=value, for example finetune.num_updates=100")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        if child is None:
            child = values[parent] = {}
        if not isinstance(child, dict):
            raise ValueError(f"--set {assignment!r}: {parent!r} holds a value, not a section")
        values = child
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {assignment!r}: {text!r} is not valid YAML ({error})") from error


def validate(section: type[AnySection], values: dict[str, Any], where: str) -> AnySection:
    """Make a section from plain values.

    Raises:
        ValueError: a key is unknown, or a value has the wrong type or range; starts with ``where``.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ValueError(_explain(section, error, where)) from error


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config, apply ``a.b=c`` overrides, validate.

    Raises:
        ValueError: the file is missing or not YAML, a key is unknown (the nearest valid one is named), or a value
            has the wrong type or range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"config {path}: {error.strerror}; give the path of a YAML file, see configs/") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {path}: found {type(values).__name__}, expected keys and values")
    for assignment in overrides or []:
        _override(values, assignment)
    return validate(Config, values, f"config {path}")


def load_protocol(name: str | None, given: dict[str, Any], overrides: list[str] | None = None) -> Protocol:
    """Look up a protocol by name, change what is given, then what ``a.b=c`` overrides say.

    Args:
        name: of protocols.yaml; None starts from the defaults of every value.
        given: values, in sections as in that file; None is none.

    Raises:
        ValueError: there is no such protocol, or as ``load_config``.
    """
    known = yaml.safe_load(Path(__file__).with_name("protocols.yaml").read_text(encoding="utf-8"))
    if name is not None and name not in known:
        raise ValueError(f"--protocol is {name!r}, expected one of {', '.join(known)}")
    values = known[name] if name else {}
    for key, value in given.items():
        if isinstance(value, dict):
            values[key] = values.get(key, {}) | {k: v for k, v in value.items() if v is not None}
        elif value is not None:
            values[key] = value
    for assignment in overrides or []:
        _override(values, assignment)
    return validate(Protocol, values, f"protocol {name}" if name else "deme evaluate")


def dump_config(config: Config) -> str:
    """Write a config as YAML that ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
