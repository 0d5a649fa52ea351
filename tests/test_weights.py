"""Task arithmetic: exact at its corners, linear between them, and pure."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from decouple_merge.merging import arithmetic
from decouple_merge.merging.arithmetic import Tensors, inner_products, merge, task_vector_norms
from decouple_merge.merging.keys import check_same_keys
from decouple_merge.merging.merger import Merger
from decouple_merge.merging.rules import sums
from decouple_merge.merging.rules.rule import Context, Settings
from decouple_merge.storage.tensors import hash_tensors

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(3, 2, 2, generator=generator).to(dtype),
        "conv.bias": torch.randn(3, generator=generator).to(dtype),
    }


def same_bits(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].numpy().tobytes() == b[k].numpy().tobytes()
        for k in a
    )


def merger_of(base: Tensors, experts: list[Tensors], method: str = "linear", density: float = 1.0) -> Merger:
    return Merger(
        base,
        experts,
        method=method,
        context_of=lambda key: Context(key, Settings(density)),
        dtype=torch.promote_types(next(iter(base.values())).dtype, torch.float32),
        device=torch.device("cpu"),
    )


@st.composite
def state_dicts(draw: st.DrawFn, num: int) -> list[Tensors]:
    """State dicts of equal keys and shapes, with any finite float32 values."""
    shapes = draw(st.lists(hnp.array_shapes(max_dims=3, max_side=3), min_size=1, max_size=3))
    values = st.floats(-1000, 1000, width=32)
    return [
        {f"layer.{i}": torch.from_numpy(draw(hnp.arrays("float32", s, elements=values))) for i, s in enumerate(shapes)}
        for _ in range(num)
    ]


@settings(deadline=None, max_examples=50)
@given(state_dicts(3))
def test_weights_of_zero_give_the_base_bit_for_bit(tensors: list[Tensors]) -> None:
    assert same_bits(merge(tensors[0], tensors[1:], [0.0, 0.0]), tensors[0])


@settings(deadline=None, max_examples=100)
@given(state_dicts(4), st.integers(0, 2))
def test_a_single_one_gives_that_expert_bit_for_bit(tensors: list[Tensors], index: int) -> None:
    base, *experts = tensors
    assert same_bits(merge(base, experts, [float(i == index) for i in range(3)]), experts[index])


def test_a_single_one_gives_an_expert_far_smaller_than_the_base_bit_for_bit() -> None:
    # (θ_i - θ) + θ loses an expert's low bits, in float64 too, where θ is 2**29 times larger.
    base, expert = {"w": torch.tensor([1.0, 1.0, 1.0])}, {"w": torch.tensor([1.2345678e-10, 1e-30, -0.0])}
    assert same_bits(merge(base, [expert], [1.0]), expert)


@settings(deadline=None, max_examples=50)
@given(state_dicts(3), st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_merging_is_linear_in_the_weights(tensors: list[Tensors], w: list[float]) -> None:
    base, *experts = [{k: v.double() for k, v in t.items()} for t in tensors]
    a, b, both = (merge(base, experts, ws) for ws in (w[:2], w[2:], [w[0] + w[2], w[1] + w[3]]))
    for k in base:
        torch.testing.assert_close(both[k] - base[k], (a[k] - base[k]) + (b[k] - base[k]), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(state_dicts(4), st.permutations(range(3)), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_the_order_of_experts_does_not_matter(tensors: list[Tensors], order: list[int], w: list[float]) -> None:
    base, *experts = tensors
    assert same_bits(merge(base, experts, w), merge(base, [experts[i] for i in order], [w[i] for i in order]))


@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.3, 0.4], [0.25] * 4])
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merger_merges_alike_in_any_order(name: str, method: str, weights: list[float]) -> None:
    base, *experts = [random_tensors(i, FLOATS[name]) for i in range(5)]
    found = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        merger = merger_of(base, [experts[i] for i in order], method, 0.7)
        found.append(merger.merge([weights[i] for i in order]))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@pytest.mark.parametrize("weights", [[math.nan, 1.0], [1.0, -math.inf]])
def test_weights_that_are_no_numbers_are_refused(weights: list[float]) -> None:
    base, *experts = [random_tensors(i) for i in range(3)]
    for call in (lambda: merge(base, experts, weights), lambda: merger_of(base, experts).merge(weights)):
        with pytest.raises(ValueError, match=r"weights are \[.*\], expected finite numbers"):
            call()


@settings(deadline=None, max_examples=100)
@given(
    state_dicts(4),
    st.lists(st.sampled_from([0.0, 1.0, -0.2, 0.3, 1.7]), min_size=3, max_size=3),
    st.sampled_from(["linear", "ties"]),
    st.sampled_from([0.2, 0.5, 1.0]),
)
def test_a_mergers_merge_is_the_merge_bit_for_bit(
    tensors: list[Tensors], w: list[float], method: str, density: float
) -> None:
    base, *experts = [{**t, "ids": torch.arange(3)} for t in tensors]
    experts[0] = experts[0] | {"mid_block.projection.weight": torch.tensor([[3.0, 0.5], [0.0, 1.0]])}
    merger = merger_of(base, experts, method, density)
    merger.merge([0.5, 0.5, 0.5])
    assert same_bits(merger.merge(w), merge(base, experts, w, method, Settings(density)))


def test_a_merger_trims_once_and_keeps_two_numbers_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *experts = [random_tensors(i) for i in range(3)]
    merger = merger_of(base, experts, "ties", 0.5)
    expected = merge(base, experts, [0.0, 1.0], "ties", Settings(0.5))
    merger.merge([1.0, 0.0])
    monkeypatch.setattr(torch.Tensor, "kthvalue", None)
    assert same_bits(merger.merge([0.0, 1.0]), expected)
    kept = [context.statistics for context, _ in merger.known.values()]
    assert [[len(ends) for ends in each] for each in kept] == [[2, 2]] * len(base)
    assert all(type(end) is float for each in kept for ends in each for end in ends)
    with pytest.raises(ValueError, match="1 weights for 2 experts"):
        merger.merge([1.0])


def test_the_chunks_of_a_mergers_merge_dont_show(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *experts = [{"w": torch.randn(1009, generator=torch.Generator().manual_seed(i))} for i in range(5)]
    weights = [0.3, -0.7, 1.9, 0.011]
    whole = {method: merge(base, experts, weights, method, Settings(0.5)) for method in ("linear", "ties")}
    for size in (1, 7, 64, 1009, 4096):
        monkeypatch.setattr(sums, "CHUNK", size)
        monkeypatch.setattr(sums, "SMALL_CHUNK", size)
        for method, expected in whole.items():
            assert same_bits(merger_of(base, experts, method, 0.5).merge(weights), expected)
            assert same_bits(merge(base, experts, weights, method, Settings(0.5)), expected)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_merge_is_written_into_the_networks_memory(precision: torch.dtype) -> None:
    base, one, two = ({"weight": torch.randn(3, 5)} for _ in range(3))
    network = torch.nn.Linear(5, 3, bias=False).to(precision)
    memory, merger = network.weight.data_ptr(), Merger(base, [one, two], device=torch.device("cpu"))
    merger.attach(network)
    assert torch.equal(network.weight, base["weight"].to(precision))
    expected = merge(base, [one, two], [0.3, 0.6])
    assert merger.write([0.3, 0.6]) == hash_tensors(expected.items())
    assert network.weight.data_ptr() == memory
    assert torch.equal(network.weight, expected["weight"].to(precision))


def test_a_task_vector_far_smaller_than_the_weights_keeps_its_gradient() -> None:
    # ⟨g, θ_i⟩ - ⟨g, θ⟩ in float32 would be 0.
    base, expert = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.0 + 2**-22, 1.0])}
    gradient = {"w": torch.tensor([1.0, 3.0])}
    assert inner_products(base, [expert, base], gradient, ["w"], torch.device("cpu")).tolist() == [2**-22, 0.0]


def test_inner_products_are_sums_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    shapes = {"a": (10, 7), "b": (3,)}
    base, one, two, gradient = ({k: torch.randn(s, generator=draws) for k, s in shapes.items()} for _ in range(4))
    expected = [sum(float(((e[k] - base[k]) * gradient[k]).double().sum()) for k in "ab") for e in (one, two)]
    for size in (1, 16, 73, 1000):
        monkeypatch.setattr(arithmetic, "CHUNK", size)
        found = inner_products(base, [one, two], gradient, ["a", "b"], torch.device("cpu"))
        assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_merging_is_eq_8() -> None:
    base, experts = {"w": torch.tensor([1.0, 2.0])}, [{"w": torch.tensor([3.0, 2.0])}, {"w": torch.tensor([1.0, 6.0])}]
    assert torch.equal(merge(base, experts, [0.5, -0.25])["w"], torch.tensor([2.0, 1.0]))


def test_sums_are_rounded_once() -> None:
    # 1 + 2**-24 is halfway between float32 numbers: rounded after each expert it would stay at 1.
    step = 2.0**-24
    base, expert = {"w": torch.tensor([1.0])}, {"w": torch.tensor([1.0 + 2 * step])}
    assert merge(base, [expert] * 4, [0.25] * 4)["w"].item() == 1.0 + 2 * step


@pytest.mark.parametrize("name", FLOATS)
def test_the_dtype_of_the_base_is_kept(name: str) -> None:
    base, experts = random_tensors(0, FLOATS[name]), [random_tensors(1), random_tensors(2)]
    merged = merge(base, experts, [0.5, 0.25])
    for k, v in merged.items():
        assert v.dtype == FLOATS[name]
        expected = base[k].double() + sum(
            w * (e[k].double() - base[k].double()) for w, e in zip([0.5, 0.25], experts, strict=True)
        )
        torch.testing.assert_close(v, expected.to(v.dtype))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_corners_are_exact(name: str) -> None:
    base, experts = random_tensors(0, FLOATS[name]), [random_tensors(i, FLOATS[name]) for i in (1, 2)]
    for weights, expected in (([0.0, 0.0], base), ([0.0, 1.0], experts[1])):
        merged = merge(base, experts, weights)
        assert all(torch.equal(merged[k], expected[k]) and merged[k].dtype == FLOATS[name] for k in base)


@pytest.mark.parametrize(
    "value", [torch.tensor(7), torch.tensor([True, False]), torch.tensor([1, 2], dtype=torch.int8)]
)
def test_integer_tensors_are_the_bases(value: torch.Tensor) -> None:
    base, expert = {"num_batches": value}, {"num_batches": torch.zeros_like(value)}
    merged = merge(base, [expert], [1.0])["num_batches"]
    assert torch.equal(merged, value)
    assert merged.dtype == value.dtype


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, 0.0], [0.5, 0.7]], ids=str)
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_inputs_are_not_modified_nor_shared_with_the_result(name: str, weights: list[float]) -> None:
    inputs = [random_tensors(i, FLOATS[name]) | {"step": torch.tensor([i])} for i in range(3)]
    before = [{k: v.clone() for k, v in t.items()} for t in inputs]
    merged = merge(inputs[0], inputs[1:], list(weights))
    assert all(same_bits(a, b) for a, b in zip(inputs, before, strict=True))
    for value in merged.values():
        value.zero_()
    assert all(same_bits(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0]], ids=str)
def test_another_number_of_weights_than_experts_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(weights)} weights for 2 experts, expected one each"):
        merge(random_tensors(0), [random_tensors(1), random_tensors(2)], weights)


def test_a_projection_is_a_task_vector_around_the_identity() -> None:
    base = random_tensors(0)
    projections = [torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [4.0, 3.0]])]
    experts = [random_tensors(i + 1) | {"projection.weight": p} for i, p in enumerate(projections)]
    merged = merge(base, experts, [0.5, 0.25])["projection.weight"]
    assert torch.equal(merged, torch.tensor([[1.5, 0.5], [1.0, 1.5]]))
    assert torch.equal(merge(base, experts, [0.0, 0.0])["projection.weight"], torch.eye(2))


@pytest.mark.parametrize("with_projection", [0, 1])
def test_an_expert_without_a_projection_counts_as_one_at_the_identity(with_projection: int) -> None:
    experts = [random_tensors(1), random_tensors(2)]
    experts[with_projection]["projection.weight"] = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    merged = merge(random_tensors(0), experts, [0.5, 0.5])["projection.weight"]
    assert torch.equal(merged, torch.tensor([[2.0, 0.0], [0.0, 1.0]]))


def test_experts_with_the_bases_keys_fit() -> None:
    check_same_keys(random_tensors(0), random_tensors(1), "expert")
    check_same_keys(random_tensors(0), random_tensors(1) | {"mid_block.projection.weight": torch.eye(2)}, "expert")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv.bias": None}, "missing: conv.bias"),
        ({"extra.weight": torch.zeros(1)}, "unknown: extra.weight"),
        ({"conv.bias": torch.zeros(4)}, "of another shape: conv.bias"),
        ({"text_projection.weight": torch.eye(2)}, "unknown: text_projection.weight"),
        (
            {"mid_block.attentions.0.projection.weight": torch.eye(2)},
            "unknown: mid_block.attentions.0.projection.weight",
        ),
        (
            {"conv.weight": None, "extra.weight": torch.zeros(1), "conv.bias": torch.zeros(4)},
            "missing: conv.weight; unknown: extra.weight; of another shape: conv.bias",
        ),
    ],
    ids=["missing", "unknown", "shape", "another projection", "a projection inside a block", "all"],
)
def test_keys_that_do_not_fit_are_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    expert = {k: v for k, v in (random_tensors(1) | change).items() if v is not None}
    with pytest.raises(ValueError, match=f"experts/3 doesn't fit the base: {message}; expected an expert"):
        check_same_keys(random_tensors(0), expert, "experts/3")


def test_task_vector_norm_is_the_euclidean_length_of_the_difference() -> None:
    base = {"a": torch.zeros(2), "b": torch.ones(1), "step": torch.tensor(5)}
    expert = {"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([7.0]), "step": torch.tensor(9)}
    assert task_vector_norms(base, [expert, base]) == [7.0, 0.0]
