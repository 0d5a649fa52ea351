"""Precision, recall, density and coverage against their definitions in loops and against the authors' package."""

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torch import Tensor

from decouple_merge.evaluation.neighbours import density_coverage, precision_recall, squared_distances, squared_radii


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    """The four numbers, pair by pair, from their formulas."""

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    generated_radii = [radius(generated, j) for j in range(len(generated))]
    distance = np.array([[np.linalg.norm(x - y) for y in generated] for x in real])
    inside = distance <= np.array(real_radii)[:, None]
    return {
        "precision": np.mean([inside[:, j].any() for j in range(len(generated))]),
        "recall": np.mean([(distance[i] <= generated_radii).any() for i in range(len(real))]),
        "density": inside.sum() / (k * len(generated)),
        "coverage": np.mean([distance[i].min() <= real_radii[i] for i in range(len(real))]),
    }


def all_four(real: Tensor, generated: Tensor, k: int) -> dict[str, float]:
    precision, recall = precision_recall(real, generated, k)
    density, coverage = density_coverage(real, generated, k)
    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.6, 0.3), (1.8, 0.5)])
def test_the_four_numbers_are_those_of_their_definitions(k: int, scale: float, shift: float) -> None:
    real, generated = draw(60, 3), draw(45, 3, seed=1) * scale + shift
    expected = by_definition(real.numpy(), generated.numpy(), k)
    assert all_four(real, generated, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_features", [8, 2048])
def test_the_four_numbers_are_those_of_the_authors_package(num_features: int) -> None:
    # Features as networks give them: not negative, few degrees of freedom, float32; more rows than a block has.
    weights = draw(6, num_features, seed=2)
    real = (draw(1100, 6) @ weights + 0.5).relu().float()
    generated = (draw(1050, 6, seed=1) * 0.9 @ weights + 0.5).relu().float()
    expected = compute_prdc(real.double().numpy(), generated.double().numpy(), 5)
    assert 0.2 < expected["recall"] < expected["precision"] < 1
    assert all_four(real, generated, 5) == pytest.approx(expected, abs=1e-12)


def test_a_narrow_distribution_is_precise_without_recall_and_a_wide_one_the_reverse() -> None:
    real, narrow = draw(200, 4), draw(200, 4, seed=1) * 0.2
    assert precision_recall(real, narrow)[0] > 0.95
    assert precision_recall(real, narrow)[1] < 0.2
    # Arguments exchanged are the two numbers exchanged.
    assert precision_recall(narrow, real) == precision_recall(real, narrow)[::-1]


def test_copies_of_the_reference_are_precise_and_cover_it() -> None:
    real = draw(50, 4)
    assert precision_recall(real, real.flip(0)) == (1.0, 1.0)
    # Every ball holds its centre and k others: density (k + 1)/k.
    assert density_coverage(real, real, 5) == (pytest.approx(6 / 5), 1.0)


def test_a_far_distribution_scores_zero() -> None:
    assert set(all_four(draw(40, 3), draw(40, 3, seed=1) + 100, 3).values()) == {0.0}


def test_density_of_equal_distributions_is_about_one() -> None:
    density, coverage = density_coverage(draw(2000, 4), draw(2000, 4, seed=1), 5)
    assert density == pytest.approx(1, abs=0.05)
    # 1 - 2^-k for many features (Naeem et al. 2020, Lemma 2).
    assert coverage == pytest.approx(1 - 2**-5, abs=0.015)


def test_order_changes_nothing() -> None:
    real, generated = draw(1300, 5), draw(1200, 5, seed=1)
    shuffled = (x[torch.randperm(len(x), generator=torch.Generator().manual_seed(3))] for x in (real, generated))
    assert all_four(*shuffled, 3) == all_four(real, generated, 3)


def test_radii_pass_over_the_row_itself_but_not_over_its_copies() -> None:
    points = torch.tensor([[0.0], [0.0], [1.0], [3.0]]) + 1000
    assert squared_radii(points, 1).tolist() == [0, 0, 1, 4]
    assert squared_radii(points, 2).tolist() == [1, 1, 1, 9]


def test_distances_are_float64() -> None:
    # Two rows that are 1e-3 apart at 1000: in float32 the difference of the squares is lost.
    a = torch.tensor([[1000.0, 0.0]]).double()
    assert squared_distances(a, a + 1e-3).item() == pytest.approx(2e-6, rel=1e-3)


def test_too_few_features_for_k_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="found 3 features, expected more than k = 3"):
        precision_recall(draw(3, 2), draw(9, 2))
    with pytest.raises(ValueError, match="found 5 features, expected more than k = 5"):
        density_coverage(draw(5, 2), draw(9, 2))
    with pytest.raises(ValueError, match="found no generated features"):
        density_coverage(draw(9, 2), draw(0, 2))
