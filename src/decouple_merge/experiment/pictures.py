"""Images of the first report seeds by every model that a run has so far, and one figure of them all."""

from collections.abc import Iterator

from ..analysis.figures import sample_grid
from ..executors.devices import default_device
from ..executors.distributed import is_first
from ..sampling.folder import drawn_from, write_images
from ..sampling.model import drawn_with
from ..sampling.sampler import choose_prompts, sample_images
from .planned import Plan
from .reported import report_models
from .table_models import denoiser_of, is_made, sha256_of


def draw_samples(plan: Plan) -> Iterator[str]:
    """Draw the models that are there, where their images aren't, and the figure; yields a line where it is new.

    Called between stages, it shows first what the pretrained model draws, and then what each stage has made of it.
    """
    models = [model for model in report_models(plan) if is_made(plan, model)]
    if not models or not is_first():
        return
    drawn = [model for model in models if _draw(plan, model)]
    if drawn or not plan.run.sample_figure.exists():
        sample_grid({model: plan.run.samples(model) for model in models}, plan.run.sample_figure)
        yield f"picture: {plan.run.sample_figure}, {', '.join(models)}"


def _draw(plan: Plan, model: str) -> bool:
    """Draw those images of a model that are missing, or were drawn from something else; says whether some were."""
    config, device = plan.config, default_device()
    seeds = range(config.evaluate.first_seed, config.evaluate.first_seed + config.evaluate.num_sample_images)
    asked = choose_prompts(plan.prompts, seeds, 0) if plan.prompts else [None] * len(seeds)
    common = {"model_sha256": sha256_of(plan, model), **drawn_with(plan.base, config.report_sample, config.text)}
    records = {seed: {**common, "prompt": prompt} for seed, prompt in zip(seeds, asked, strict=True)}
    folder = plan.run.samples(model)
    missing = [seed for seed, record in records.items() if drawn_from(folder / f"{seed}.png") != record]
    if missing:
        network, prompts = denoiser_of(plan, model, device), plan.open_prompts(device)
        images = sample_images(network, plan.base, missing, config.report_sample, device, prompts=prompts)
        write_images(images, missing, folder, records)
    return bool(missing)
