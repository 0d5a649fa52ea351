"""The section ``analyze``: the settings of each analysis, under its name."""

from pydantic import Field

from .numbers import Integer, NonNegativeFloat, NonNegativeInt, Number, PositiveFloat, PositiveInt
from .paths import FilePath
from .section import Section


class GradientSimilarity(Section):
    """Cosines of the gradients at every two timesteps.

    Attributes:
        num_images: whose mean gradient is taken; two halves of them are compared, too.
        stride: every so many timesteps.
        per_layer: for each layer, too.
        max_gigabytes: of gradients that are compared whole; larger ones are projected.
        num_projected: numbers that a projected gradient has.
    """

    num_images: Integer = Field(512, ge=2)
    stride: PositiveInt = 10
    per_layer: bool = False
    max_gigabytes: NonNegativeFloat = 4.0
    num_projected: Integer = Field(4096, ge=2)


class LandscapeRanges(Section):
    """The loss on a plane around the base.

    Attributes:
        num_images: each with one timestep of every range.
        num_points: on each side of the grid.
        span: of both directions, in lengths of the weights' filters.
        num_gradient_images: for the gradient on each range; two halves of them are compared.
    """

    num_images: PositiveInt = 128
    num_points: Integer = Field(15, ge=3)
    span: PositiveFloat = 0.1
    num_gradient_images: Integer = Field(512, ge=2)


class LandscapeTaskVectors(Section):
    """The loss on the planes of two task vectors.

    Attributes:
        num_images: each with one timestep of every range.
        num_points: on each side of the grid.
        low, high: of both merging weights.
        pairs: of experts, by number; None takes all.
    """

    num_images: PositiveInt = 128
    num_points: Integer = Field(15, ge=3)
    low: Number = -0.2
    high: Number = 1.2
    pairs: list[tuple[NonNegativeInt, NonNegativeInt]] | None = Field(None, min_length=1)


class Activations(Section):
    """What blocks write before and after.

    Attributes:
        num_images: that blocks see, at each timestep.
        timesteps: None takes the middle of each range.
        blocks: by name; None takes all.
    """

    num_images: Integer = Field(64, ge=4)
    timesteps: list[NonNegativeFloat] | None = Field(None, min_length=1)
    blocks: list[str] | None = Field(None, min_length=1)


class LossWeights(Section):
    """The merge as a weighting of the loss.

    Attributes:
        run: folder of another run of the same base, whose models' changes are compared with the merge's: such as one
            with the merge's weights as ``finetune.weighting``.
    """

    run: FilePath | None = None


class Qualitative(Section):
    """Images of the same seeds by every model.

    Attributes:
        num_shown: in a row.
        num_candidates: report seeds of which those with the largest change are looked for.
    """

    num_shown: PositiveInt = 8
    num_candidates: PositiveInt = 64


class Sensitivity(Section):
    """A metric over a setting, from several runs.

    Attributes:
        over: the setting, such as ``finetune.num_ranges``.
        metric: None takes the first of the first run.
    """

    over: str | None = None
    metric: str | None = None


class Analyze(Section):
    """What ``deme analyze`` computes.

    Attributes:
        seed: of images, noise and directions.
        batch_size: images at once; None takes as many as the training did. With another, numbers differ by rounding.
    """

    seed: NonNegativeInt = 0
    batch_size: PositiveInt | None = None
    activations: Activations = Activations()
    gradient_similarity: GradientSimilarity = GradientSimilarity()
    landscape_ranges: LandscapeRanges = LandscapeRanges()
    landscape_task_vectors: LandscapeTaskVectors = LandscapeTaskVectors()
    loss_weights: LossWeights = LossWeights()
    qualitative: Qualitative = Qualitative()
    sensitivity: Sensitivity = Sensitivity()

    def of(self, name: str) -> Section | None:
        """Find the settings of an analysis; None where it has none of its own."""
        return getattr(self, name.replace("-", "_"), None)
