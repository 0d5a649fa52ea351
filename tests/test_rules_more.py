"""Merge rules of other papers and programs: against their definitions, their numbers, and their own limits."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from decouple_merge.merging.arithmetic import merge
from decouple_merge.merging.merger import Merger
from decouple_merge.merging.rules import RULES, order_statistics, sums
from decouple_merge.merging.rules.rule import Context, Settings, merge_tensor
from decouple_merge.merging.rules.sparsifiers import _order

PLAIN = sorted(name for name, rule in RULES.items() if not rule.needs and name != "slerp")


def versions(shape: Sequence[int] = (12, 10), num: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A base and experts around it, of different lengths."""
    draws = torch.Generator().manual_seed(0)
    base = torch.randn(*shape, generator=draws, dtype=torch.float64)
    moves = [0.1 * (i + 1) * torch.randn(*shape, generator=draws, dtype=torch.float64) for i in range(num)]
    return [t.to(dtype) for t in (base, *(base + move for move in moves))]


def change(name: str, tensors: list[Tensor], weights: Sequence[float], **chosen: Any) -> np.ndarray:
    base, *experts = tensors
    context = Context("layer", Settings(**chosen), [7 + i for i in range(len(experts))])
    return (merge_tensor(RULES[name], base, experts, weights, context) - base).double().numpy()


def task_vectors(tensors: list[Tensor]) -> np.ndarray:
    return np.stack([(e - tensors[0]).double().numpy() for e in tensors[1:]])


# -- order statistics


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3), st.sampled_from([1, 2, 1000, 69_999, 70_000]), st.sampled_from([1, 10, 10_000, 2**30]))
def test_an_order_statistic_is_that_of_the_sorted_numbers(seed: int, rank: int, num_values: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, num_values, (70_000,), generator=draws).float()
    numbers = numbers.sort().values if seed == 3 else numbers
    [found] = order_statistics.order_statistics(lambda x: x, [numbers], [rank])
    assert found == numbers.sort().values[rank - 1]


def test_a_sample_that_misleads_costs_time_and_no_digit() -> None:
    numbers = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    # The sample is every twelfth entry.
    numbers[:: 200_000 // order_statistics.SAMPLE] += 5
    [found] = order_statistics.order_statistics(lambda x: x, [numbers], [100_000])
    assert found == numbers.sort().values[99_999]


# -- TIES as others do it: who does what is in docs/merging.md

THREE = [[5.0, -3, 2, -1, 0.5, 0], [-1, 3, -2, 4, -0.25, 0], [-1.5, -2.5, 3, 1, 0.75, 6]]


def of_three(weights: list[float], **chosen: Any) -> list[float]:
    vectors = [torch.tensor(v, dtype=torch.float64) for v in THREE]
    return change("ties", [torch.zeros(6, dtype=torch.float64), *vectors], weights, **chosen).tolist()


# Numbers of mergekit 0.1.5's ties at lambda 0.8, consensus_method sum or count, normalize true or false. Where counts
# are equal, as in the fifth entry, it takes those above 0, and we nobody.
MERGEKITS = {
    ("sum", "weights"): [4.0, -2.133333, 2.133333, 1.76, 0.4, 4.8],
    ("sum", "none"): [3.0, -4.8, 4.8, 4.4, 0.3, 7.2],
    ("count", "weights"): [-1.04, -2.133333, 2.133333, 1.76, 0.0, 4.8],
    ("count", "none"): [-2.6, -4.8, 4.8, 4.4, 0.0, 7.2],
}


@pytest.mark.parametrize(("vote", "normalize"), MERGEKITS)
def test_ties_is_mergekits_where_it_is_asked_for(vote: str, normalize: str) -> None:
    found = of_three([0.75, 1.0, 1.5], density=5 / 6, vote=vote, normalize=normalize, scale=0.8)
    np.testing.assert_allclose(found, MERGEKITS[vote, normalize], atol=1e-6)


# Numbers of sd-mecha 1.1.8's ties_sum at k = 2/3, vote_sgn true or false.
MECHAS = {"sum": [5.0, -2.75, 2.5, 2.5, 0.5, 6.0], "count": [-1.25, -2.75, 2.5, 2.5, 0.0, 6.0]}


@pytest.mark.parametrize("vote", MECHAS)
def test_ties_of_equal_weights_is_sd_mechas(vote: str) -> None:
    # It keeps one entry more than k·n.
    np.testing.assert_allclose(of_three([1.0, 1.0, 1.0], density=2 / 3 + 1 / 6, vote=vote), MECHAS[vote])


@pytest.mark.parametrize(("vote", "method"), [("sum", "total"), ("count", "frequency")])
def test_ties_of_equal_weights_is_pefts(vote: str, method: Any) -> None:
    tensors = versions(num=3)
    vectors = [torch.from_numpy(v) for v in task_vectors(tensors)]
    expected = merge_utils.ties(vectors, torch.full((3,), 0.7, dtype=torch.float64), 0.5, method)
    found = change("ties", tensors, [0.7] * 3, density=0.5, vote=vote)
    trimmed = [merge_utils.prune(v, 0.5, "magnitude").sign().numpy() for v in vectors]
    # Where counts are equal, it takes those above 0.
    decided = np.sum(trimmed, axis=0) != 0 if vote == "count" else np.full(found.shape, True)
    np.testing.assert_allclose(found[decided], expected.numpy()[decided], atol=1e-12)
    assert not found[~decided].any()


def test_each_expert_may_have_a_density_of_its_own() -> None:
    tensors = versions(num=2)
    found = change("breadcrumbs", tensors, [1.0, 1.0], density=[0.25, 1.0], gamma=0.0)
    alone = change("breadcrumbs", tensors[:2], [1.0], density=0.25, gamma=0.0)
    np.testing.assert_allclose(found, alone + task_vectors(tensors)[1], atol=1e-12)
    assert np.count_nonzero(alone) == 30
    swapped = change("breadcrumbs", [tensors[0], *tensors[:0:-1]], [1.0, 1.0], density=[1.0, 0.25], gamma=0.0)
    assert np.array_equal(found, swapped)
    with pytest.raises(ValueError, match="density has 2 numbers for 1 experts, expected one, or one for each"):
        change("ties", tensors[:2], [1.0], density=[0.25, 1.0])


# -- the other rules, against their definitions


@pytest.mark.parametrize(("density", "gamma"), [(0.6, 0.1), (0.95, 0.2), (0.3, 0.0)])
def test_breadcrumbs_drops_the_largest_and_the_smallest(density: float, gamma: float) -> None:
    tensors, expected = versions(), 0.0
    for weight, vector in zip((0.5, 1.0, -0.3, 2.0), task_vectors(tensors), strict=True):
        order, num = np.abs(vector).ravel().argsort(), math.ceil(density * vector.size)
        last = vector.size - min(int(gamma * vector.size), vector.size - num)
        kept = np.zeros(vector.size)
        kept[order[last - num : last]] = 1
        expected = expected + weight * vector * kept.reshape(vector.shape)
    found = change("breadcrumbs", tensors, [0.5, 1.0, -0.3, 2.0], density=density, gamma=gamma)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_rows_are_ordered_as_by_a_stable_sort() -> None:
    draws = torch.Generator().manual_seed(0)
    few = torch.randint(0, 5, (6, 300), generator=draws).float() * 1e-30
    special = torch.tensor([[0.0, math.inf, 1e-45, 3e38, 0.0, 1.0]])
    for rows in (few, special, torch.rand(4, 257, generator=draws), torch.rand(3, 40, generator=draws).double()):
        assert torch.equal(_order(rows), rows.argsort(dim=1, stable=True))


def test_della_keeps_by_rank_in_a_row_and_rescales() -> None:
    base = torch.zeros(20_000, 5, dtype=torch.float64)
    sizes = torch.tensor([3.0, -1.0, 5.0, 2.0, -4.0], dtype=torch.float64)
    found = change("della_linear", [base, base + sizes], [1.0], density=0.5, epsilon=0.2)
    shares = (found != 0).mean(axis=0)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.7, 0.4, 0.6], atol=0.02)
    # What stays is divided by its chance, so that the mean is the task vector.
    np.testing.assert_allclose(found.max(axis=0)[[0, 2, 3]], [3 / 0.5, 5 / 0.7, 2 / 0.4])
    np.testing.assert_allclose(found.mean(axis=0), sizes, rtol=0.05)
    elected = change("della", [base, base + sizes], [1.0], density=0.5, epsilon=0.2)
    np.testing.assert_allclose(elected, found)
    with pytest.raises(ValueError, match=r"density is 0\.9 and epsilon 0\.1, expected both their sum"):
        change("della", [base, base + sizes], [1.0], density=0.9, epsilon=0.1)


@pytest.mark.parametrize(("low", "high"), [(2, None), (1, 1), (0, None), (4, None)])
def test_consensus_keeps_what_enough_experts_need(low: int, high: int | None) -> None:
    tensors, weights = versions(), np.array([0.5, 1.0, -0.3, 2.0])
    vectors = weights[:, None, None] * task_vectors(tensors)
    needed = (np.abs(vectors) > 0.4 * np.abs(vectors.sum(axis=0) - vectors)).sum(axis=0)
    kept = (needed >= low) & (needed <= (4 if high is None else high))
    found = change("consensus", tensors, weights.tolist(), threshold=0.4, min_tasks=low, max_tasks=high)
    np.testing.assert_allclose(found, vectors.sum(axis=0) * kept, atol=1e-12)
    with pytest.raises(ValueError, match="min_tasks is 5 with 4 experts, so that nothing is kept; expected at most 4"):
        change("consensus", tensors, weights.tolist(), min_tasks=5)


def test_two_medians_of_equal_weight_meet_in_the_middle() -> None:
    base, a, b = versions()[:3]
    found = change("geometric_median", [base, a, b], [1.0, 1.0])
    np.testing.assert_allclose(found, ((a + b) / 2 - base).double().numpy(), atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_nothing_stays_at_density_0(method: str) -> None:
    assert not change(method, versions()[:3], [1.0, 0.5], density=0.0).any()


def test_emr_elects_the_largest_of_the_elected_sign() -> None:
    tensors, weights = versions(), np.array([0.5, 1.0, -0.3, 2.0])
    vectors = weights[:, None, None] * task_vectors(tensors)
    sign = np.sign(vectors.sum(axis=0))
    expected = sign * np.maximum(vectors * sign, 0).max(axis=0)
    np.testing.assert_allclose(change("emr", tensors, weights.tolist()), expected, atol=1e-12)


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_sce_selects_calculates_and_erases(density: float) -> None:
    tensors, weights = versions(), np.array([0.5, 1.0, -0.3, 2.0])
    vectors = weights[:, None, None] * task_vectors(tensors)
    variance = vectors.var(axis=0)
    vectors = vectors * (variance >= np.sort(variance.ravel())[-int(density * variance.size)])
    energies = np.square(vectors).mean(axis=(1, 2))[:, None, None]
    agree = energies * (vectors * np.sign(vectors.sum(axis=0)) > 0)
    divisor = agree.sum(axis=0)
    expected = np.where(divisor > 0, (agree * vectors).sum(axis=0) / np.where(divisor > 0, divisor, 1), 0)
    np.testing.assert_allclose(change("sce", tensors, weights.tolist(), density=density), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 10), (6, 3, 2, 2), (9,)])
def test_iso_c_makes_the_spectrum_of_the_sum_flat(shape: tuple[int, ...]) -> None:
    tensors, weights = versions(shape), [0.5, 1.0, -0.3, 2.0]
    total = np.tensordot(weights, task_vectors(tensors), axes=1)
    found = change("iso_c", tensors, weights)
    if len(shape) == 1:
        np.testing.assert_allclose(found, total / 4, atol=1e-12)
        return
    u, s, vh = np.linalg.svd(total.reshape(shape[0], -1), full_matrices=False)
    np.testing.assert_allclose(found.reshape(shape[0], -1), s.mean() * u @ vh, atol=1e-9)


def test_iso_c_invents_no_directions_that_the_sum_lacks() -> None:
    base = torch.zeros(8, 6, dtype=torch.float64)
    low = torch.outer(torch.arange(8.0), torch.arange(6.0)).double()
    np.testing.assert_allclose(change("iso_c", [base, base + low], [1.0]), low.numpy(), atol=1e-9)


def test_tsv_m_keeps_a_share_of_the_directions_and_makes_them_orthogonal() -> None:
    tensors, weights = versions(), [0.5, 1.0, -0.3, 2.0]
    parts = [np.linalg.svd(v, full_matrices=False) for v in task_vectors(tensors)]
    u, vh = np.hstack([p[0][:, :2] for p in parts]), np.vstack([p[2][:2] for p in parts])
    s = np.concatenate([w * p[1][:2] for w, p in zip(weights, parts, strict=True)])

    def polar(x: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(x.T @ x)
        return x @ vectors @ np.diag(values**-0.5) @ vectors.T

    found = change("tsv_m", tensors, weights)
    np.testing.assert_allclose(found, polar(u) * s @ polar(vh.T).T, atol=1e-9)
    np.testing.assert_allclose(np.linalg.svd(found)[1][:8], np.sort(np.abs(s))[::-1], atol=1e-9)
    np.testing.assert_allclose(change("tsv_m", tensors[:2], [1.0]), task_vectors(tensors)[0], atol=1e-9)


def test_model_stock_goes_as_far_as_the_angles_say() -> None:
    tensors = versions(num=3)
    vectors = task_vectors(tensors).reshape(3, -1)
    pairs = itertools.combinations(vectors, 2)
    cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    expected = 3 * cosine / (1 + 2 * cosine) * vectors.mean(axis=0)
    np.testing.assert_allclose(change("model_stock", tensors, [1.0] * 3).ravel(), expected, atol=1e-12)


def test_the_geometric_median_is_where_the_pulls_cancel() -> None:
    tensors, weights = versions(), np.array([0.5, 1.0, 0.3, 0.9])
    vectors = task_vectors(tensors).reshape(4, -1)
    apart = change("geometric_median", tensors, weights.tolist()).ravel() - vectors
    pulls = weights[:, None] * apart / np.linalg.norm(apart, axis=1, keepdims=True)
    np.testing.assert_allclose(pulls.sum(axis=0), 0, atol=1e-6)
    # One that has half of all weight is the median.
    heavy = change("geometric_median", tensors, [9.0, 1.0, 1.0, 1.0]).ravel()
    np.testing.assert_allclose(heavy, vectors[0], atol=1e-9)


def test_the_karcher_mean_is_where_the_logarithms_cancel() -> None:
    tensors, weights = versions(), np.array([0.5, 1.0, 0.3, 0.2])
    experts = np.stack([e.numpy().ravel() for e in tensors[1:]])
    norms = np.linalg.norm(experts, axis=1)
    found = change("karcher", tensors, weights.tolist()).ravel() + tensors[0].numpy().ravel()
    assert np.linalg.norm(found) == pytest.approx(weights @ norms / weights.sum())
    x, units = found / np.linalg.norm(found), experts / norms[:, None]
    cosines = units @ x
    logarithms = (np.arccos(cosines) / np.sqrt(1 - cosines**2))[:, None] * (units - cosines[:, None] * x)
    np.testing.assert_allclose(weights @ logarithms, 0, atol=1e-9)


def test_the_karcher_mean_of_two_is_slerp_between_tensors_of_equal_length() -> None:
    base, a, b = versions(num=2)
    b = b * (a.norm() / b.norm())
    karcher, slerp = (change(name, [base, a, b], [0.75, 0.25]) for name in ("karcher", "slerp"))
    np.testing.assert_allclose(karcher, slerp, atol=1e-9)


# -- what holds for all


def test_what_needs_more_than_tensors_is_refused_in_memory() -> None:
    with pytest.raises(ValueError, match="dare needs seeds beside the tensors; use merge_models, or deme merge"):
        merge({"w": torch.zeros(2)}, [{"w": torch.ones(2)}], [1.0], "dare")


@pytest.mark.parametrize("name", PLAIN)
def test_the_chunks_of_a_merge_and_of_a_merger_dont_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = versions((31, 17), dtype=torch.float32)
    base, *experts = [{"w": t, "bias": t[0].clone()} for t in tensors]
    weights, chosen = [0.3, 0.7, 1.9, 0.011], Settings(0.5)
    whole = merge(base, experts, weights, name, chosen)
    for size in (1, 7, 64, 4096):
        monkeypatch.setattr(sums, "CHUNK", size)
        monkeypatch.setattr(sums, "SMALL_CHUNK", size)
        context_of, device = partial(Context, settings=chosen), torch.device("cpu")
        merger = Merger(base, experts, method=name, context_of=context_of, device=device)
        for found in (merge(base, experts, weights, name, chosen), merger.merge(weights), merger.merge(weights)):
            assert all(torch.equal(found[key], whole[key]) for key in whole)


class Largest(TorchDispatchMode):
    """Remember the largest tensor that was made."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given_memory = [a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)]
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in given_memory:
            self.num = max(self.num, found.numel())
        return found


# On matrices, or on a variance that is kept.
@pytest.mark.parametrize("name", sorted(RULES.keys() - {"slerp", "iso_c", "tsv_m", "sce"}))
def test_a_rule_makes_no_temporaries_of_a_tensors_size(name: str) -> None:
    base, *experts = versions((1 << 11, 1 << 10), num=2, dtype=torch.float16)
    fishers = [e.abs() for e in experts]
    context = Context("w", Settings(0.7), [1, 2], fishers)
    flat = [t.view(-1) for t in (base, *experts)]
    out = torch.zeros(base.numel())
    with Largest() as watched:
        sums.combine_into(out, flat, RULES[name].answer(base, experts, [0.5, 1.0], context))
    assert watched.num <= sums.CHUNK < base.numel()
