"""Timestep ranges are partitions, and draws follow Eq. 6 of DeMe."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decouple_merge.diffusion.process import VP
from decouple_merge.diffusion.ranges import cut_ranges, listed_ranges
from decouple_merge.diffusion.timesteps import TimestepRange, check_ranges, draw_timesteps, range_index, split_timesteps

T, OWN = 1000, TimestepRange(250, 500)


def draw(num: int, p: float, *, own: TimestepRange = OWN, antithetic: bool = False, seed: int = 0) -> torch.Tensor:
    return draw_timesteps(num, own, T, p, torch.Generator().manual_seed(seed), antithetic)


@settings(deadline=None)
@given(st.data(), st.integers(1, 2000))
def test_split_is_a_partition_in_nearly_equal_parts(data: st.DataObject, num_train_timesteps: int) -> None:
    num_ranges = data.draw(st.integers(1, num_train_timesteps))
    ranges = split_timesteps(num_train_timesteps, num_ranges)
    assert len(ranges) == num_ranges
    assert [t for r in ranges for t in range(r.low, r.high)] == list(range(num_train_timesteps))
    sizes = {r.high - r.low for r in ranges}
    assert max(sizes) - min(sizes) <= 1
    check_ranges(ranges, num_train_timesteps)


def test_split_of_a_divisible_schedule_is_the_papers() -> None:
    assert split_timesteps(1000, 4) == [TimestepRange(i, i + 250) for i in (0, 250, 500, 750)]


def test_split_not_divisible_floors_the_edges() -> None:
    assert split_timesteps(10, 4) == [
        TimestepRange(0, 2),
        TimestepRange(2, 5),
        TimestepRange(5, 7),
        TimestepRange(7, 10),
    ]


def test_split_into_as_many_ranges_as_timesteps_gives_single_timesteps() -> None:
    assert split_timesteps(7, 7) == [TimestepRange(t, t + 1) for t in range(7)]


@pytest.mark.parametrize("num_ranges", [0, -1, 11])
def test_split_refuses_a_number_of_ranges_outside_one_to_schedule_length(num_ranges: int) -> None:
    with pytest.raises(ValueError, match=f"num_ranges is {num_ranges}, expected 1 to 10"):
        split_timesteps(10, num_ranges)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([(0, 4), (5, 10)], "range 1 starts at 5, expected 4"),
        ([(0, 6), (5, 10)], "range 1 starts at 5, expected 6"),
        ([(1, 10)], "range 0 starts at 1, expected 0"),
        ([(0, 4), (4, 12)], r"range 1 is \[4, 12\), expected a non-empty part of \[0, 10\)"),
        ([(-1, 4), (4, 10)], r"range 0 is \[-1, 4\)"),
        ([(0, 4), (4, 4), (4, 10)], r"range 1 is \[4, 4\), expected a non-empty part"),
        ([(0, 4), (4, 9)], "the last range ends at 9, expected 10"),
        ([], "the last range ends at 0, expected 10"),
    ],
    ids=["gap", "overlap", "late start", "above", "below", "empty range", "early end", "none"],
)
def test_ranges_that_are_no_partition_are_refused(edges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ranges([TimestepRange(*e) for e in edges], 10)


def test_range_index_is_eq_7_on_equal_ranges() -> None:
    ranges = split_timesteps(T, 4)
    assert [range_index(ranges, t) for t in range(T)] == [t * 4 // T for t in range(T)]


def test_range_index_dispatches_on_t_for_unequal_ranges() -> None:
    ranges = [TimestepRange(0, 1), TimestepRange(1, 7), TimestepRange(7, 10)]
    assert [range_index(ranges, t) for t in range(10)] == [0] + [1] * 6 + [2] * 3


@pytest.mark.parametrize("t", [-1, 10])
def test_range_index_refuses_a_timestep_in_no_range(t: int) -> None:
    with pytest.raises(ValueError, match=f"timestep {t} is in none of the ranges"):
        range_index(split_timesteps(10, 2), t)


def chi_square(t: torch.Tensor, p: float, bin_size: int = 50) -> float:
    """Compare counts with Eq. 6: density (1 - p)/|own| on the own range, plus p/T everywhere."""
    density = torch.full((T,), p / T, dtype=torch.float64)
    density[OWN.low : OWN.high] += (1 - p) / (OWN.high - OWN.low)
    expected = density.reshape(-1, bin_size).sum(1) * len(t)
    counts = torch.bincount(t, minlength=T).reshape(-1, bin_size).sum(1).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    return float(((counts - expected).square() / expected.where(kept, torch.ones(())))[kept].sum())


@pytest.mark.parametrize("p", [0.0, 0.3, 0.4, 1.0])
def test_draws_have_the_mass_of_eq_6(p: float) -> None:
    num = 100_000
    t = draw(num, p)
    own_mass = ((t >= OWN.low) & (t < OWN.high)).double().mean()
    expected = (1 - p) + p / 4
    assert abs(own_mass - expected) <= 4 * (expected * (1 - expected) / num) ** 0.5
    # 20 bins: the 99.99 % quantile of chi-square at 19 degrees of freedom is 51.
    assert chi_square(t, p) < 51


@pytest.mark.parametrize("half", [slice(0, 50_000), slice(50_000, None)], ids=["first", "mirrored"])
def test_antithetic_draws_keep_the_mass_of_eq_6(half: slice) -> None:
    # Halves apart: within one, draws are independent, as the chi-square needs.
    assert chi_square(draw(100_000, 0.4, antithetic=True)[half], 0.4) < 51


def test_the_coin_is_tossed_for_every_sample_and_not_for_the_batch() -> None:
    num, q = 64, 0.5 * 0.75
    generator = torch.Generator().manual_seed(0)
    batches = torch.stack([draw_timesteps(num, OWN, T, 0.5, generator) for _ in range(2000)])
    outside = ((batches < OWN.low) | (batches >= OWN.high)).sum(1).double()
    # One coin a batch gives 0 half of the time and a variance of 580 instead of 15.
    assert outside.var() == pytest.approx(num * q * (1 - q), rel=0.2)
    assert outside.min() > 0


@pytest.mark.parametrize("num", [64, 65])
def test_antithetic_pairs_mirror_each_other_in_their_interval(num: int) -> None:
    own = TimestepRange(100, 300)
    half = (num + 1) // 2
    for p, sums in ((0.0, {399}), (1.0, {T - 1}), (0.5, {399, T - 1})):
        t = draw(num, p, own=own, antithetic=True)
        assert t.shape == (num,)
        assert set((t[: num - half] + t[half:]).tolist()) == sums


@pytest.mark.parametrize("antithetic", [False, True])
def test_draws_stay_inside_a_range_of_one_timestep(antithetic: bool) -> None:
    assert set(draw(100, 0.0, own=TimestepRange(999, 1000), antithetic=antithetic).tolist()) == {999}


def test_draws_reach_both_ends_of_the_schedule() -> None:
    t = draw(50_000, 1.0)
    assert (int(t.min()), int(t.max())) == (0, T - 1)
    assert t.dtype == torch.int64


def test_draws_depend_only_on_the_generator() -> None:
    torch.manual_seed(1)
    first = draw(100, 0.4)
    torch.manual_seed(2)
    assert torch.equal(first, draw(100, 0.4))
    assert not torch.equal(first, draw(100, 0.4, seed=1))


def test_whole_numbers_of_a_table_are_integers() -> None:
    """YAML may say 250.0, which is no index."""
    process = VP(torch.linspace(0.99, 0.01, 40), "epsilon")
    for ranges in (listed_ranges(process, [(0, 20.0), (20.0, 40)]), cut_ranges(process, "timestep", [2.0e1])):
        assert ranges == [TimestepRange(0, 20), TimestepRange(20, 40)]
        assert not any(isinstance(edge, float) for own in ranges for edge in (own.low, own.high))
        t = process.draw(4, ranges[1], 0.0, torch.Generator().manual_seed(0))
        assert process.mix(torch.ones(4), torch.ones(4), t).isfinite().all()
