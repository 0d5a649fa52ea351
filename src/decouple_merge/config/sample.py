"""The sections ``sample`` and ``text``: how images are drawn, and what is asked for."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..errors import UserError
from .numbers import NonNegativeInt, Number, PositiveInt
from .paths import FilePath
from .pieces import Pieces
from .section import Precision, Section


class Sample(Section):
    """How images are drawn.

    Attributes:
        sampler: a diffusers scheduler by name, with or without ``Scheduler``; built from the base's own config. None is
            DDIM, and for a flow, which DDIM can't sample, the kind that the base itself has.
        num_steps: of the sampler.
        batch_size: images that are drawn at once.
        compile: the network, by torch.compile.
        timestep_spacing: leading, trailing or linspace; None keeps what the base's config says.
        precision: of the network while sampling; noise and scheduler stay in float32.
        one_resident: hold one expert of an ensemble in memory at a time, the others in their files; a batch of images
            reads each of them once.
    """

    sampler: str | None = None
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

    prompts: FilePath | None = None
    template: str = "{}"
    prompt_seed: NonNegativeInt = 0
    negative_prompt: str = ""
    guidance_scale: Number = Field(7.5, ge=1)

    @field_validator("template")
    @classmethod
    def _has_place(cls, template: str) -> str:
        if "{}" not in template:
            raise UserError("expected {} where the prompt goes, such as 'a photo of a {}'")
        return template

    @model_validator(mode="after")
    def _of_a_file(self) -> "Text":
        of_file = {"template": self.template != "{}", "prompt_seed": self.prompt_seed != 0}
        if self.prompts is None and any(of_file.values()):
            name = next(name for name, is_set in of_file.items() if is_set)
            raise UserError(f"{name} is set, which is for the prompts of a file: set prompts, too, or leave it out")
        return self


class Drawing(Pieces):
    """What ``deme sample`` is asked for; its pieces are shares of the batches."""

    sample: Sample = Sample()
    text: Text = Text()
