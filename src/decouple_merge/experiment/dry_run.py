"""What a run would do, in words."""

from collections.abc import Iterator
from pathlib import Path

from ..config import Config
from ..diffusion.process import Flow
from ..models.network import num_parameters
from ..models.schedulers import sampler_of
from ..sampling.shares import steps_of, unlike_shares
from ..searching.levels import levels
from ..storage.run_folder import Run
from ..training.made_from import images_of_update
from .given import describe_given
from .located import located
from .manifest import check_owner
from .memory import describe_memory
from .plan import check
from .planned import Plan
from .provenance import check_stages


def describe(config: Config, out: Path) -> Iterator[str]:
    """Say what memory a config needs, before anything is loaded; check it as ``run`` would and say what it will do.

    Computes and writes nothing.
    """
    config = located(config)
    check_owner(Run(out), config, [config.base, config.data.source])
    yield from describe_memory(config)
    plan = check(config, out)
    check_stages(plan)
    finetune, evaluate, num = config.finetune, config.evaluate, len(plan.ranges)
    base, size = plan.base, plan.base.image_size
    yield f"base {config.base}: {num_parameters(base.network):,} parameters, {size} x {size}"
    yield f"data {config.data.source}: {len(plan.images):,} images"
    if plan.prompts:
        yield f"prompts: {len(plan.prompts):,}, guidance {config.text.guidance_scale:g}"
    if finetune.experts == "denoisers":
        yield from describe_given(plan)
    elif config.search.combines_experts:
        yield (
            f"experts: {num} x {finetune.num_updates} updates of {images_of_update(finetune)} images on "
            + ", ".join(map(str, plan.ranges))
        )
    if finetune.baseline and finetune.experts == "trained":
        yield f"baseline: {num * finetune.num_updates} updates"
    if config.search.combines_experts:
        yield from describe_ranges(plan)
    yield describe_search(config)
    if config.distil is not None:
        yield f"distil: {config.distil.num_updates} updates of {images_of_update(config.distil)} images"
    yield (
        f"evaluation: {evaluate.num_seed_sets} x {evaluate.num_images} images a model, "
        f"{sampler_of(base, config.report_sample.sampler)} {config.report_sample.num_steps}, "
        f"{', '.join(evaluate.metrics)}"
    )
    yield f"run folder: {out}"


def describe_search(config: Config) -> str:
    """Say what a search will combine and draw."""
    search = config.search
    if search.over == "nothing":
        return "search: none"
    combined = "" if search.over == "experts" else f" over {search.over}, {config.num_combined} models"
    return f"search: {search.strategy}{combined}, up to " + ", then ".join(
        f"{level.num_candidates} x {len(level.seeds)} images of {level.num_steps or config.sample.num_steps} steps"
        for level in levels(config, config.num_combined)
    )


def describe_ranges(plan: Plan) -> Iterator[str]:
    """Say of each range what of the training's draws and of the sampler's steps lies in it."""
    base, steps = plan.base, steps_of(plan.base, plan.ranges, plan.config.sample)
    for index, own in enumerate(plan.ranges):
        low, high = (edge / base.num_train_timesteps for edge in (own.low, own.high))
        level = f"σ (or boundary) [{low:.4g}, {high:.4g}), " if isinstance(base.process, Flow) else ""
        yield (
            f"  expert {index}: {level}timesteps {own}, {base.process.share(own):.1%} of the training's draws without "
            f"global_prob, {steps[index]} of {sum(steps)} sampling steps"
        )
    yield from unlike_shares(base, plan.ranges, plan.config.sample)
