"""The analysis of task vectors, against closed forms and plain loops."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decouple_merge.analysis import analyses, open_analysis
from decouple_merge.analysis.task_vectors import cosines, effective_rank, gram_matrix, sign_agreement
from decouple_merge.config import Config
from decouple_merge.experiment.analyses import analyze
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.planned import Plan
from decouple_merge.experiment.provenance import made_from
from decouple_merge.storage.files import write_json, write_tensors


def weights(*values: float) -> dict[str, Tensor]:
    a, b = torch.tensor(values[:4]).float().view(2, 2), torch.tensor(values[4:]).float()
    return {"a.weight": a, "b.bias": b, "steps": torch.tensor(3)}


BASE = weights(1, 2, 3, 4, 5, 6)
EXPERTS = [weights(2, 2, 3, 4, 5, 7), weights(0, 2, 3, 4, 5, 8), weights(1, 2, 3, 4, 6, 7)]


def test_inner_products_are_over_all_floating_tensors() -> None:
    expected = torch.tensor([[2, 1, 1], [1, 5, 2], [1, 2, 2]], dtype=torch.float64)
    torch.testing.assert_close(gram_matrix(BASE, EXPERTS), expected)


def test_cosines_are_those_of_the_flattened_vectors() -> None:
    flat = [torch.cat([(e[k] - BASE[k]).flatten() for k in ("a.weight", "b.bias")]) for e in EXPERTS]
    expected = torch.tensor([[float(torch.cosine_similarity(x, y, 0)) for y in flat] for x in flat])
    torch.testing.assert_close(cosines(gram_matrix(BASE, EXPERTS)).float(), expected)


def test_an_expert_that_did_not_move_has_no_direction() -> None:
    found = cosines(gram_matrix(BASE, [EXPERTS[0], BASE]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))


def test_signs_agree_where_all_move_the_same_way() -> None:
    # Only the last of six entries goes up in all three; entries that stay agree with nobody.
    assert sign_agreement(BASE, EXPERTS) == 1 / 6


def test_random_vectors_agree_by_chance() -> None:
    draws = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(100_000)}
    experts = [{"w": torch.randn(100_000, generator=draws)} for _ in range(4)]
    assert sign_agreement(base, experts) == pytest.approx(2**-3, abs=0.005)


@pytest.mark.parametrize(
    ("matrix", "rank"),
    [
        (torch.eye(4), 4.0),
        (torch.outer(torch.arange(1.0, 4.0), torch.ones(5)), 1.0),
        (torch.diag(torch.tensor([1.0, 1.0, 0.0])), 2.0),
        (torch.zeros(3, 3), 0.0),
    ],
)
def test_the_effective_rank_counts_directions(matrix: Tensor, rank: float) -> None:
    assert effective_rank(matrix) == pytest.approx(rank, rel=1e-5)


def test_every_analysis_is_found_by_its_file() -> None:
    for name in analyses():
        module = open_analysis(name)
        assert {"TITLE", "CAPTIONS", "NEEDS", "cost", "compute", "draw"} <= set(dir(module))
        assert "" in module.CAPTIONS
    with pytest.raises(ValueError, match=r"analysis is 'task-vector', expected one of .*task-vectors"):
        open_analysis("task-vector")


@pytest.fixture
def plan(tiny_config: Callable[..., Config], tmp_path: Path) -> Plan:
    """Make a run whose experts were never trained, but moved by steps of known size."""
    plan = prepare(tiny_config(), tmp_path / "run")
    state = plan.base.network.state_dict()
    for index in range(len(plan.ranges)):
        draws, folder = torch.Generator().manual_seed(index), plan.run.expert(index)
        moved = {k: v + 0.01 * (index + 1) * torch.randn(v.shape, generator=draws) for k, v in state.items()}
        write_tensors(folder / "model.safetensors", moved)
        write_json(folder / "expert.json", made_from(f"experts/{index}", plan))
    return plan


def test_a_run_is_analysed_once_and_to_the_same_bytes(plan: Plan) -> None:
    lines = list(analyze(plan, ["task-vectors"]))
    assert lines[-1] == f"task-vectors: {plan.run.analysis('task-vectors.csv')}"
    table, summary = plan.run.analysis("task-vectors.csv"), plan.run.analysis("task-vectors.json")
    record = json.loads(summary.read_text())
    pictures = [plan.run.figure(figure["file"]) for figure in record["figures"]]
    files = [table, summary, *pictures, *(picture.with_suffix(".svg") for picture in pictures)]
    assert len(pictures) == 2
    written = [file.read_bytes() for file in files]
    assert next(analyze(plan, ["task-vectors"])).startswith("task-vectors: done")
    summary.unlink()
    list(analyze(plan, ["task-vectors"]))
    assert [file.read_bytes() for file in files] == written


def test_the_norms_are_those_of_the_steps(plan: Plan) -> None:
    list(analyze(plan, ["task-vectors"]))
    norms = json.loads(plan.run.analysis("task-vectors.json").read_text())["summary"]["norms"]
    assert norms[1] / norms[0] == pytest.approx(2, rel=0.05)
    num_rows = len(plan.base.network.state_dict()) * len(plan.ranges)
    assert len(plan.run.analysis("task-vectors.csv").read_text().splitlines()) == 1 + num_rows
