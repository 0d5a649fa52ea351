"""What a run doesn't say: so that nobody reads more into a page than was measured."""

from collections.abc import Sequence

from ..evaluation.metrics import METRICS
from .contents import Contents
from .verdict import EQUAL_COMPUTE, MERGED, metrics_of

# With fewer images a Fréchet distance says more of their number than of the model; papers take 10,000 to 50,000.
FEW_IMAGES = 5_000


def not_measured(runs: list[Contents], all_analyses: Sequence[str]) -> list[str]:
    """List in sentences what the runs leave open, the weightiest first."""
    metrics, first = metrics_of(runs), runs[0]
    models = {m for run in runs for m in run.models}
    gaps = []
    if MERGED not in models and first.config.search.over != "nothing":
        gaps.append("The merged model isn't scored: the run isn't finished.")
    has_equal_compute = any(m.startswith(EQUAL_COMPUTE) for m in models)
    if not has_equal_compute:
        gaps.append("Nothing that got the same compute was scored, so plain finetuning may do as well.")
    if len(runs) == 1:
        gaps.append("One training seed: how much another training differs isn't known. Runs with other seeds tell.")
    gaps += _of_metrics(runs, metrics)
    if has_equal_compute:
        gaps.append(
            "Equal compute counts updates, not the search: the equally finetuned model got as many updates as all "
            "experts together."
        )
    if not any("prompts" in r and r["prompts"] for r in first.metrics):
        gaps.append(f"One sampler: {first.drawn_with}. Others weren't tried.")
    missing = [name for name in all_analyses if name not in {a.name for run in runs for a in run.analyses}]
    if missing:
        gaps.append(f"Analyses that weren't made: {', '.join(missing)}. deme analyze makes them.")
    if not all(run.costs for run in runs):
        gaps.append("The time of trainings and evaluation wasn't recorded.")
    return gaps


def _of_metrics(runs: list[Contents], metrics: list[str]) -> list[str]:
    if not metrics:
        return ["No images were scored."]
    gaps, chosen_by = [], runs[0].config.search.metric
    if metrics[0] == chosen_by:
        others = f"; the table also has {', '.join(metrics[1:])}" if metrics[1:] else ""
        gaps.append(
            f"{chosen_by} also chose the merging weights, on other seeds{others}. A metric that it never saw is "
            "a stricter judge."
        )
    if len({METRICS[m].extractor for m in metrics if m in METRICS}) == 1:
        gaps.append(f"All numbers are on features of one network, {METRICS[metrics[0]].extractor}.")
    sizes = [r["num_images"] for run in runs for r in run.metrics]
    if max(sizes) < FEW_IMAGES:
        gaps.append(
            f"Sets of {max(sizes):,} images are few: a Fréchet distance of them is larger than that of many, for all "
            "models. Only the comparison means something."
        )
    if runs[0].config.evaluate.reference is None:
        gaps.append("Images were compared with what the models were trained on; other data may judge otherwise.")
    return gaps
