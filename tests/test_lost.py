"""Images that are NaN: an error that names seed and sampler, and in a search a candidate that is lost."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor
from typer.testing import CliRunner

from conftest import make_unet
from decouple_merge.cli import main as cli
from decouple_merge.config import Config, Sample
from decouple_merge.errors import NotFiniteError
from decouple_merge.evaluation.extractors import Extractor
from decouple_merge.evaluation.score import Features, extract, score_features
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.planned import Plan
from decouple_merge.experiment.selection import search_weights
from decouple_merge.models.base import load_base
from decouple_merge.sampling.sampler import sample_images
from decouple_merge.searching.candidates import ranked
from decouple_merge.searching.levels import search
from decouple_merge.searching.scorer import Scorer
from decouple_merge.searching.strategies import Weights
from decouple_merge.searching.study import trials
from decouple_merge.searching.trial import Level, Score
from test_search import STRATEGIES, config, in_file, in_memory

CPU = torch.device("cpu")


def zero_snr(folder: Path) -> Path:
    """Save a pipeline that predicts ε and starts at pure noise, which says nothing of the image."""
    schedule = DDPMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    DDPMPipeline(make_unet(), schedule).save_pretrained(folder)
    return folder


def bad_above(limit: float) -> Callable[[Weights, Level], Score]:
    """Make an objective that loses candidates of large weights, and likes others the better the larger they are."""

    def score(weights: Weights, level: Level) -> Score:
        lost = max(weights) > limit
        return Score(math.inf if lost else 5 - sum(weights), "", "3 of 8 images are NaN" if lost else "")

    return score


def test_an_image_that_is_nan_names_its_seed_and_the_sampler(tiny_base: Path) -> None:
    def model(x: Tensor, t: int) -> Tensor:
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 1, math.nan, 0.0) * x

    settings = Sample(num_steps=2, batch_size=2)
    drawn = sample_images(model, load_base(str(tiny_base)), range(5, 8), settings, CPU)
    with pytest.raises(NotFiniteError, match=r"1 of 2 images are NaN or infinite, the first of seed 6.*DDIM with 2 st"):
        next(drawn)
    # The last batch is filled up with copies that nobody sees.
    alone = sample_images(model, load_base(str(tiny_base)), range(7, 8), settings, CPU)
    assert next(alone).shape[0] == 1


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_zero_snr_with_epsilon_is_an_error_of_every_verb_that_draws(tmp_path: Path, verb: str) -> None:
    base, out = zero_snr(tmp_path / "base"), tmp_path / "out"
    arguments = {
        "sample": ["sample", str(base), "--out", str(out), "--num-images", "3"],
        "evaluate": ["evaluate", str(base), "--reference", str(base), "--num-images", "3", "--out", str(out)],
    }[verb]
    found = CliRunner().invoke(cli.app, arguments)
    assert isinstance(found.exception, NotFiniteError)
    assert re.search(r"the first of seed [03], drawn in fp32 by DDIM with 50 steps", str(found.exception))
    assert not list(tmp_path.glob("out/*.png"))
    assert verb == "sample" or not out.exists()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_features_that_are_nan_are_an_error(number: float) -> None:
    rows = torch.ones(4, 3)
    rows[2, 1] = number
    network = Extractor("inception", "test", {"logits": 3}, lambda batch: {"logits": rows})
    images = [torch.zeros(4, 3, 8, 8, dtype=torch.uint8)]
    with pytest.raises(NotFiniteError, match="the logits of inception have NaN or infinity for images 0 to 3"):
        score_features(extract(images, [network]), ["inception_score"], [(network, None)])


@pytest.mark.parametrize("strategy", [*STRATEGIES, "grid", "greedy"])
def test_a_lost_candidate_is_never_chosen_and_doesnt_end_the_search(strategy: str) -> None:
    found = list(search(in_memory(), config(strategy, num_trials=14, num_finalists=2), 2, bad_above(1.2)))
    lost = [t for t in found if t.failure]
    assert lost
    assert all(t.value == math.inf for t in lost)
    assert max(ranked(found)[0].weights) <= 1.2
    assert not any(t.failure for t in found if t.level == "final")


def test_a_search_with_lost_candidates_goes_on_after_a_kill_with_the_same_trials(tmp_path: Path) -> None:
    asked = config("gp", num_trials=12)
    whole = list(search(in_memory(), asked, 2, bad_above(1.2)))
    for _ in range(12):
        next(search(in_file(tmp_path), asked, 2, bad_above(1.2)), None)
    list(search(in_file(tmp_path), asked, 2, bad_above(1.2)))
    again = trials(in_file(tmp_path)("screen"))
    assert [(t.weights, t.value, t.failure) for t in again] == [(t.weights, t.value, t.failure) for t in whole]
    assert any(t.failure for t in again)


@pytest.mark.parametrize("strategy", ["gp", "cmaes"])
def test_a_search_that_loses_all_candidates_is_an_error_that_says_why(strategy: str) -> None:
    with pytest.raises(ValueError, match="no candidate of 6 on level screen may be chosen: 3 of 8 images are NaN"):
        list(search(in_memory(), config(strategy, num_trials=6), 2, bad_above(-1.0)))


def test_a_run_records_what_it_lost(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan: Plan = prepare(tiny_config(search={"num_finalists": 0}), tmp_path / "run")
    list(finetune_experts(plan))
    original, num_calls = Scorer._distance, 0

    def distance(self: Scorer, features: Iterator[Features]) -> float:
        """Lose the third candidate, which is the sum of all."""
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise NotFiniteError("2 of 8 images are NaN")
        return original(self, features)

    monkeypatch.setattr(Scorer, "_distance", distance)
    lines = [e for e in search_weights(plan) if isinstance(e, str)]
    records = [json.loads(line) for line in plan.run.trials.read_text().splitlines()]
    lost = [r for r in records if r["failure"]]
    assert [(r["value"], r["failure"]) for r in lost] == [(None, "2 of 8 images are NaN")]
    assert any("sum lost" in line for line in lines)
    assert json.loads(plan.run.candidates.read_text())["sum"] is None
    assert json.loads((plan.run.merged / "merge.json").read_text())["weights"] != lost[0]["weights"]
