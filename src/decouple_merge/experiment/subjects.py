"""What a run holds for its analyses."""

from collections.abc import Callable, Sequence

from ..analysis.subject import Subject
from ..config import Analyze
from ..data.batches import Batch, training_batches
from ..data.split import split
from ..errors import UserError
from ..executors.devices import default_device
from ..models.network import load_network
from ..seeds import stream_seed
from ..storage.files import read_records
from .plan import Plan, load_experts

# What an analysis may need besides the base, and whether a run holds it.
HELD: dict[str, Callable[[Plan], bool]] = {
    "experts": lambda plan: all((plan.run.expert(i) / "model.safetensors").exists() for i in range(len(plan.ranges))),
    "two experts": lambda plan: len(plan.ranges) > 1,
    "merged": lambda plan: plan.run.merged.is_dir(),
}


def subject_of(plan: Plan, settings: Analyze, needs: dict[str, Sequence[str]]) -> Subject:
    """Load what some analyses need of a run.

    Args:
        needs: of each analysis by its name.

    Raises:
        UserError: an expert is damaged, or of another base; there are fewer images than an analysis is set to take.
    """
    needed = {need for own in needs.values() for need in own}
    num = len(split(plan.images, plan.config.data).trained)
    for name in needs:
        own = settings.of(name)
        for key in ("num_images", "num_gradient_images"):
            if (wanted := getattr(own, key, 0)) > num:
                place = name.replace("-", "_")
                raise UserError(
                    f"{name} takes {wanted} images, and {num} are trained on; give --set {place}.{key}={num}"
                )

    def images(num_wanted: int) -> Batch:
        seed = stream_seed(settings.seed, "analysis")
        return next(training_batches(plan.images, plan.config.data, num_wanted, seed, 0, 1))

    trials = read_records(plan.run.trials, level=str, weights=list, metric=str)
    screened = [
        (r["weights"], r["value"])
        for r in trials
        if r["level"] == trials[0]["level"] and r["value"] is not None and len(r["weights"]) == len(plan.ranges)
    ]
    return Subject(
        base=plan.base,
        ranges=plan.ranges,
        experts=load_experts(plan) if "experts" in needed else [],
        merged=load_network(plan.run.merged) if "merged" in needed else None,
        trials=screened,
        metric=trials[0]["metric"] if trials else "",
        settings=settings,
        images=images,
        device=default_device(),
    )
