"""Numbers of models: images that several processes draw together, and who computes what they are worth."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import NotFiniteError
from ..evaluation.extractors import EXTRACTORS, Extractor, load_extractor, weights_of
from ..evaluation.metrics import extractors_of
from ..evaluation.records import with_value
from ..evaluation.references import Compared, text_reference
from ..evaluation.score import Features, extract, score_features
from ..evaluation.shared_features import Draw, SharedFeatures
from ..executors import run_all
from ..executors.devices import default_device
from ..sampling.sampler import Denoiser, Prompts, choose_prompts, sample_images
from ..storage.locks import free_lock
from ..storage.made_from import digest_of
from .planned import Plan
from .table_models import denoiser_of
from .watch import reported_with

# The records that are wanted of one model on one set of seeds.
Wanted = list[dict[str, Any]]


def score_sets(plan: Plan, sets: list[Wanted]) -> Iterator[dict[str, Any]]:
    """Draw sets of images and score each, in ``num_processes`` together; yields the records.

    A process begins with a set of its own and helps with the others afterwards: few open a model, and all end at about
    the same time. What is drawn is kept until its numbers are known. A set whose process was lost at a bad moment has
    no records.

    Raises:
        NotFiniteError: images or features are NaN or infinite.
    """
    shared = {_name(wanted): _shared(plan, wanted) for wanted in sets}
    for features in shared.values():
        features.begin()
        # Nobody is at work yet: these are what a killed one left.
        for path in [_mark(features), *features.folder.glob("*.lock")]:
            path.unlink(missing_ok=True)
    num = min(plan.config.num_processes, sum(len(features.shares) for features in shared.values()))
    firsts = [i * len(sets) // num for i in range(num)]
    calls = [(plan, [*sets[first:], *sets[:first]]) for first in firsts]
    try:
        for records in run_all(_work, calls, *plan.config.where, folder=plan.run.folder):
            yield from records
            shared[_name(records)].end()
    except NotFiniteError:
        # Whoever mends a model, or its sampler, is not to meet them again.
        shutil.rmtree(plan.run.shares, ignore_errors=True)
        raise
    shutil.rmtree(plan.run.shares, ignore_errors=True)


def _work(plan: Plan, sets: list[Wanted]) -> Iterator[Wanted]:
    """Draw what is left of each set in turn; yields the records of those that are complete then."""
    load = functools.cache(lambda name: load_extractor(name, default_device(), weights_of(name, plan.config.evaluate)))
    for again, wanted in [*((False, wanted) for wanted in sets), *((True, wanted) for wanted in sets)]:
        shared, draw = _shared(plan, wanted), _drawing(plan, wanted, load)
        while shared.draw_next(draw, again):
            pass
        with free_lock(shared.folder.with_suffix(".lock")) as is_mine:
            # In this order: the folder is removed after the mark was made.
            if is_mine and not _mark(shared).exists() and shared.is_complete:
                records = _scored(plan, wanted, shared.gather(draw))
                _mark(shared).touch()
                yield records


def _name(wanted: Wanted) -> str:
    """Name a set of images by all that their features depend on."""
    plain = {key: value for key, value in wanted[0].items() if key not in ("metric", "value", "git", "time")}
    return digest_of(plain | {"extractor": sorted({str(r["extractor"]) for r in wanted}), "reference": None})


def _shared(plan: Plan, wanted: Wanted) -> SharedFeatures:
    size = plan.config.report_sample.batch_size
    return SharedFeatures(plan.run.shares / f"{_name(wanted)}-{size}", wanted[0]["num_images"], size)


def _mark(shared: SharedFeatures) -> Path:
    """Say where a file says that somebody has told the numbers."""
    return shared.folder / "scored"


def _drawing(plan: Plan, wanted: Wanted, load: Callable[[str], Extractor]) -> Draw:
    """Make what draws a share of a set; the model is opened for the first."""
    first, device = wanted[0], default_device()

    @functools.cache
    def opened() -> tuple[Denoiser, Prompts | None, list[Extractor]]:
        names = extractors_of([record["metric"] for record in wanted])
        return denoiser_of(plan, first["model"], device), plan.open_prompts(device), [load(name) for name in names]

    def draw(share: slice) -> Iterator[Features]:
        model, prompts, extractors = opened()
        sample = plan.config.report_sample
        images = sample_images(model, plan.base, _seeds(first), sample, device, prompts=prompts, share=share)
        return extract(images, extractors)

    return draw


def _seeds(record: dict[str, Any]) -> range:
    return range(record["seeds"][0], record["seeds"][1] + 1)


def _scored(plan: Plan, wanted: Wanted, features: Iterator[Features]) -> Wanted:
    """Compute the numbers of a set of images."""
    metrics, compared = [record["metric"] for record in wanted], list[Compared]()
    for name in extractors_of(metrics):
        if EXTRACTORS[name].reads_texts:
            extractor = load_extractor(name, default_device(), weights_of(name, plan.config.evaluate))
            texts = choose_prompts(plan.prompts, _seeds(wanted[0]), 0)
            compared.append((extractor, text_reference(plan.prompts, texts, extractor)))
        else:
            compared.append(reported_with(plan, name))
    values, _ = score_features(features, metrics, compared)
    return [with_value(record, values[record["metric"]]) for record in wanted]
