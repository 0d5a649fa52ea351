"""Merge rules: their laws, and their agreement with definitions written out entry by entry in float64."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from decouple_merge.merging.order import summing_order
from decouple_merge.merging.rules import RULES
from decouple_merge.merging.rules.averages import linear
from decouple_merge.merging.rules.elections import ROUNDED_TIE, elected_signs
from decouple_merge.merging.rules.rule import Context, Settings, merge_tensor
from decouple_merge.merging.rules.sums import Coefficients, combine

DENSITIES = st.sampled_from([0.2, 0.5, 0.7, 1.0])
WEIGHTS = st.lists(st.floats(-2, 2), min_size=3, max_size=3)


@st.composite
def versions(draw: st.DrawFn, num: int) -> list[Tensor]:
    """One tensor in several versions, float32 with many equal and many opposite entries."""
    shape = draw(hnp.array_shapes(max_dims=3, max_side=4))
    values = st.integers(-64, 64).map(lambda i: i / 16)
    return [torch.from_numpy(draw(hnp.arrays("float32", shape, elements=values))) for _ in range(num)]


def merged(
    name: str, tensors: list[Tensor], weights: list[float], density: float = 1.0, order: tuple = (0, 1, 2)
) -> Tensor:
    base, *experts = tensors
    fishers = [(e - base).abs() for e in experts]
    context = Context("layer", Settings(density), [order[i] + 7 for i in range(len(experts))], fishers)
    return combine(tensors, RULES[name].answer(base, experts, weights, context))


@pytest.mark.parametrize("name", sorted(RULES))
@settings(deadline=None, max_examples=25)
@given(versions(4), DENSITIES)
def test_weights_of_zero_give_the_base_bit_for_bit(name: str, tensors: list[Tensor], density: float) -> None:
    # -0 stays -0.
    tensors = [-t for t in tensors[: 3 if name == "slerp" else 4]]
    found = merged(name, tensors, [0.0] * (len(tensors) - 1), density)
    assert torch.equal(found.view(torch.int32), tensors[0].view(torch.int32))


# Iso-C flattens a spectrum, TSV-M rounds in its decompositions, consensus needs two experts.
@pytest.mark.parametrize("name", sorted(RULES.keys() - {"iso_c", "tsv_m", "consensus"}))
@settings(deadline=None, max_examples=25)
@given(versions(2))
def test_one_expert_with_weight_one_is_the_merge(name: str, tensors: list[Tensor]) -> None:
    assert torch.equal(merged(name, tensors, [1.0]), tensors[1])


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0.7, 0.3, 0.3, 0.7], [1.0, 0.2, 0.2, 0.0]])
def test_experts_may_come_in_any_order_bit_for_bit(name: str, dtype: torch.dtype, weights: list[float]) -> None:
    draws = torch.Generator().manual_seed(0)
    base = torch.randn(3000, generator=draws).to(dtype)
    # Steps of few values: many votes cancel, and many entries of the experts are equal.
    experts = [base + (torch.randint(-3, 4, (3000,), generator=draws) / 64).to(dtype) for _ in range(4)]
    experts[3] = experts[2].clone()
    fishers, num = [torch.rand(3000, generator=draws) for _ in range(4)], 2 if name == "slerp" else 4
    seeds = [7, 8, 9, 10]

    def merged_in(order: Sequence[int]) -> Tensor:
        context = Context("w", Settings(0.7), [seeds[i] for i in order], [fishers[i] for i in order])
        return merge_tensor(RULES[name], base, [experts[i] for i in order], [weights[i] for i in order], context)

    found = [merged_in(order) for order in itertools.permutations(range(num))]
    assert all(torch.equal(found[0], other) for other in found[1:])


@settings(deadline=None, max_examples=100)
@given(versions(4), WEIGHTS, st.permutations(range(3)), st.sampled_from(sorted(RULES)), st.sampled_from(FLOATS))
def test_any_values_and_weights_may_come_in_any_order(
    tensors: list[Tensor], weights: list[float], order: list[int], name: str, dtype: torch.dtype
) -> None:
    num, weights = 2 if name == "slerp" else 3, [abs(w) + 0.001 for w in weights]
    base, *experts = [t.to(dtype) for t in tensors[: num + 1]]
    fishers, order = [(e - base).abs() for e in experts], [i for i in order if i < num]

    def merged_in(order: Sequence[int]) -> Tensor:
        context = Context("w", Settings(0.5), [i + 7 for i in order], [fishers[i] for i in order])
        return merge_tensor(RULES[name], base, [experts[i] for i in order], [weights[i] for i in order], context)

    assert torch.equal(merged_in(range(num)), merged_in(order))


def test_equal_tensors_are_in_the_order_of_their_fisher_information() -> None:
    a, rare = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert summing_order([a, a], [[0.5, 0.5]], [[rare, a]]) == [1, 0]
    assert summing_order([rare, a], [[0.5, 0.5]]) == [1, 0]
    assert summing_order([a, rare], [[0.5, 0.5], [2, 1]]) == [1, 0]
    assert summing_order([a, torch.full((2,), math.nan), -a], [[0.5] * 3]) == [2, 0, 1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_votes_that_cancel_elect_nobody(name: str, dtype: torch.dtype) -> None:
    # 0.1 + 0.2 - 0.3 isn't 0 in floating point.
    base = torch.tensor([1.0, 0.5, -2.0, 0.0], dtype=dtype)
    step = torch.tensor([0.25, -0.5, 0.125, 2.0], dtype=dtype)
    experts = [base + step, base + step, base - step]
    context = Context("w", Settings(1.0), [7, 8, 9])
    assert torch.equal(merge_tensor(RULES[name], base, experts, [0.1, 0.2, 0.3], context).to(dtype), base)
    moved = merge_tensor(RULES[name], base, experts, [0.1, 0.2, 0.2999], context) - base
    assert torch.equal(moved.sign(), step.sign().to(moved))


def ties_by_entry(
    tensors: list[Tensor], weights: list[float], density: float, kept: np.ndarray | None = None
) -> np.ndarray:
    """TIES as the paper's algorithm 1 reads, in Python numbers; ``kept`` replaces its trimming."""
    base, *experts = [t.double().numpy().ravel() for t in tensors]
    vectors = [e - base for e in experts]
    if kept is None:
        num = math.ceil(density * len(base))
        floors = [sorted(map(abs, v), reverse=True)[num - 1] for v in vectors]
        trimmed = [[x if abs(x) >= f else 0.0 for x in v] for v, f in zip(vectors, floors, strict=True)]
    else:
        trimmed = [list(v * k) for v, k in zip(vectors, kept, strict=True)]
    out = []
    for place in range(len(base)):
        entries = [w * v[place] for w, v in zip(weights, trimmed, strict=True)]
        sign = np.sign(sum(entries))
        agree = [x for x in entries if x != 0 and np.sign(x) == sign]
        out.append(base[place] + (sum(agree) / len(agree) if agree else 0.0))
    return np.array(out).reshape(tensors[0].shape)


# Weights that are sums of few powers of two: a vote that ties is one in float32 as well.
VOTES = st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=3, max_size=3)


@settings(deadline=None, max_examples=100)
@given(versions(4), VOTES, DENSITIES)
def test_ties_is_the_papers_algorithm(tensors: list[Tensor], weights: list[float], density: float) -> None:
    found = merged("ties", tensors, weights, density)
    np.testing.assert_allclose(found.numpy(), ties_by_entry(tensors, weights, density), rtol=1e-5, atol=1e-5)


def masks(shape: torch.Size, density: float) -> np.ndarray:
    return np.stack(
        [(torch.rand(shape, generator=torch.Generator().manual_seed(s)) < density).numpy().ravel() for s in (7, 8, 9)]
    )


@settings(deadline=None, max_examples=50)
@given(versions(4), WEIGHTS, DENSITIES)
def test_dare_drops_and_rescales(tensors: list[Tensor], weights: list[float], density: float) -> None:
    base, *experts = [t.double().numpy() for t in tensors]
    kept = masks(tensors[0].shape, density).reshape(3, *base.shape)
    expected = base + sum(w * k * (e - base) / density for w, k, e in zip(weights, kept, experts, strict=True))
    np.testing.assert_allclose(merged("dare", tensors, weights, density).numpy(), expected, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(versions(4), VOTES, DENSITIES)
def test_dare_ties_votes_on_what_dare_left(tensors: list[Tensor], weights: list[float], density: float) -> None:
    base = tensors[0].double().numpy()
    voted = ties_by_entry(tensors, weights, 1.0, masks(tensors[0].shape, density)) - base
    found = merged("dare_ties", tensors, weights, density).numpy()
    np.testing.assert_allclose(found, base + voted / density, rtol=1e-5, atol=1e-4)


def test_dares_mean_over_masks_is_task_arithmetic() -> None:
    tensors = [torch.zeros(20_000), torch.ones(20_000)]
    found = combine(tensors, RULES["dare"].answer(tensors[0], tensors[1:], [0.5], Context("", Settings(0.25), [3])))
    assert found.mean() == pytest.approx(0.5, abs=0.02)
    assert sorted(found.unique().tolist()) == [0.0, 2.0]


def test_fisher_weights_each_entry_by_its_information() -> None:
    base, experts = torch.tensor([1.0, 1.0, 1.0]), [torch.tensor([2.0, 2.0, 2.0]), torch.tensor([4.0, 4.0, 4.0])]
    fishers = [torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])]
    coefficients = RULES["fisher"].answer(base, experts, [1.0, 1.0], Context(fishers=fishers))
    torch.testing.assert_close(combine([base, *experts], coefficients), torch.tensor([3.0, 2.5, 1.0]))


def test_slerp_stays_on_the_sphere_where_lerp_cuts_through_it() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    half = combine([a, b], RULES["slerp"].answer(a, [b], [0.5], Context()))
    torch.testing.assert_close(half, torch.full((2,), 0.5**0.5))
    pair = combine([torch.zeros(2), a, b], RULES["slerp"].answer(torch.zeros(2), [a, b], [2.0, 1.0], Context()))
    torch.testing.assert_close(pair, torch.tensor([math.cos(math.pi / 6), 0.5]))


def test_slerp_of_parallel_tensors_is_linear() -> None:
    a = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(combine([a, 3 * a], RULES["slerp"].answer(a, [3 * a], [0.25], Context())), 1.5 * a)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("slerp", [0.2, 0.3, 0.5], "slerp has 3 experts"),
        ("fisher", [1.0, -1.0, 1.0], "expected none below 0"),
        ("karcher", [1.0, -1.0, 1.0], "expected none below 0"),
        ("geometric_median", [1.0, -1.0, 1.0], "expected none below 0"),
    ],
)
def test_what_a_rule_cant_do_is_refused(name: str, weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merged(name, [torch.ones(2)] * 4, weights)


def test_half_precision_is_summed_in_float32() -> None:
    base, expert = torch.full((4,), 1.0, dtype=torch.float16), torch.full((4,), 1.001, dtype=torch.float16)
    weights = [1 / 3]
    coefficients: Coefficients = linear(base, [expert], weights, Context())
    found = combine([base, expert], coefficients)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, base.float() + (expert.float() - base.float()) / 3, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if "normalize" in rule.params])
def test_weights_that_cancel_but_for_rounding_divide_nothing(name: str) -> None:
    draws = torch.Generator().manual_seed(0)
    base = torch.randn(8, 8, generator=draws)
    tensors = [base, *(base + 0.01 * torch.randn(8, 8, generator=draws) for _ in range(3))]
    context = Context("layer", Settings(0.5, normalize="weights", min_tasks=1), [1, 2, 3])
    weights = [0.1, 0.2, -0.3]
    assert sum(weights) != 0
    found = combine(tensors, RULES[name].answer(base, tensors[1:], weights, context))
    assert 0 < float((found - base).abs().max()) < 0.2


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_tensor_that_nobody_changed_or_without_entries_stays(name: str) -> None:
    base, weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), [0.3, 0.4]
    for start in (base, -torch.zeros(2), torch.zeros(0, 3), torch.zeros(3, 0)):
        experts = [start.clone() for _ in weights]
        context = Context("layer", Settings(), [1, 2], [torch.ones_like(start)] * 2, [torch.eye(start.shape[-1])] * 2)
        found = combine([start, *experts], RULES[name].answer(start, experts, weights, context))
        assert torch.equal(found.view(torch.int32), start.view(torch.int32))


def test_votes_that_cancel_but_for_the_rounding_of_a_rescale_elect_nobody() -> None:
    moves, weights = [3.25, -0.6875, 3.375], [1.5, -1.5, -1.75]
    assert sum(w * m for w, m in zip(weights, moves, strict=True)) == 0
    rescaled = [torch.tensor([m]) / 0.7 for m in moves]
    assert elected_signs(rescaled, weights).item() != 0
    assert elected_signs(rescaled, weights, ROUNDED_TIE).item() == 0
