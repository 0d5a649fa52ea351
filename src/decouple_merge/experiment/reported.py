"""What a run's report is of, and compares with: the data, or images that neither training nor search sees."""

from typing import Any

from ..config import Config, Data
from ..data.images import Images
from ..data.sources import load_images
from ..errors import UserError
from ..evaluation.metrics import METRICS
from ..evaluation.references import reference_name, texts_name
from ..models.base import Base
from ..sampling.sampler import sampling_fields
from .planned import BASELINE, Plan


def report_models(plan: Plan) -> list[str]:
    """List the models of the result table; the ensemble of a base's own denoisers is the pretrained model."""
    over, is_trained = plan.config.search.over, plan.config.finetune.experts == "trained"
    models = {
        "pretrained": is_trained,
        BASELINE: is_trained and plan.config.finetune.baseline,
        "ensemble": plan.config.search.combines_experts,
        "merged": over != "nothing",
        "distilled": plan.config.distil is not None,
    }
    return [name for name, is_made in models.items() if is_made]


def reference_data(config: Config) -> Data:
    """Say where the images are that a report compares with; they are brought to the base's size as the data is."""
    data, asked = config.data, config.evaluate.reference
    if asked is None:
        return data
    # A folder of its own is that of one known set.
    place = {} if asked.source in (None, data.source) else {"source": asked.source, "path": None}
    return data.model_copy(update={"split": asked.split, **place})


def report_references(config: Config, base: Base, images: Images) -> tuple[str, Images]:
    """Open the images that a report compares with; returns their name, as records carry it, and them.

    Args:
        images: the data's.

    Raises:
        UserError: they can't be opened for this base, or are those of the data.
    """
    data = reference_data(config)
    if data == config.data:
        if config.evaluate.reference is not None:
            raise UserError(
                f"evaluate.reference is {data.source}, split {data.split}, which is the data itself; expected images "
                "that training and search don't see, such as evaluate.reference.split=test; or leave it out"
            )
        return data.source, images
    found = load_images(data, base.channels, base.image_size, "evaluate.reference.source")
    if found.sha256 == images.sha256:
        raise UserError(
            f"evaluate.reference is {data.source}, split {data.split}, which holds the same images as the data; "
            "expected images that training and search don't see"
        )
    return (data.source if data.split == config.data.split else f"{data.source} {data.split}"), found


def compared_fields(plan: Plan) -> dict[str, dict[str, Any]]:
    """Say of each metric what its numbers depend on besides models, seeds and feature networks, as records carry it.

    That is how images are drawn, and what they are compared with.
    """
    evaluate = plan.config.evaluate
    source, images = report_references(plan.config, plan.base, plan.references)
    images_name = reference_name(source, images, evaluate.num_reference_images)
    references: dict[str | None, str | None] = {None: None, "texts": texts_name(plan.prompts)}
    drawn = sampling_fields(plan.base, plan.config.report_sample, plan.prompts_label)
    return {
        metric: drawn | {"reference": references.get(METRICS[metric].needs, images_name)} for metric in evaluate.metrics
    }
