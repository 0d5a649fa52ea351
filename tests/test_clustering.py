"""Interval clustering against brute force and known cuts, and factors of gradients against their definitions."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decouple_merge.config import Config, Finetune
from decouple_merge.diffusion.clustering import cluster_ranges, interval_edges, log_snr
from decouple_merge.diffusion.multitask import CAP, nash_weights, pcgrad_weights
from decouple_merge.diffusion.process import VP, Flow, Process
from decouple_merge.diffusion.timesteps import TimestepRange, check_ranges
from decouple_merge.models.ranges import clusters_of, read_similarity

DDPM = DDPMScheduler(num_train_timesteps=1000)
STABLE = DDPMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ZERO = DDPMScheduler(num_train_timesteps=1000, rescale_betas_zero_snr=True)


def vp(scheduler: DDPMScheduler, stride: int = 1) -> VP:
    return VP(scheduler.alphas_cumprod[::stride], "epsilon")


def cuts(process: Process, cost: str, num: int) -> list[float]:
    return [r.low for r in cluster_ranges(process, process.split(1)[0], cost, num)][1:]


# -- clusters
def cost_of(distance: Tensor, edges: list[int]) -> float:
    return sum(float(distance[(low + high) // 2, low:high].sum()) for low, high in pairwise(edges))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(4, 9), st.integers(0, 2**31), st.sampled_from(["any", "places", "whole"]))
def test_the_cut_costs_as_little_as_the_best_of_all(num: int, size: int, seed: int, kind: str) -> None:
    draws = torch.Generator().manual_seed(seed)
    distance = torch.randn(size, size, generator=draws, dtype=torch.float64)
    if kind != "any":
        places = torch.randn(size, generator=draws, dtype=torch.float64)
        places = places if kind == "places" else (3 * places).round()
        distance = (places - places[:, None]).abs()
    found = interval_edges(distance, num)
    assert [found[0], found[-1]] == [0, size]
    assert len(found) == num + 1
    assert found == sorted(set(found))
    every = [cost_of(distance, [0, *inner, size]) for inner in combinations(range(1, size), num - 1)]
    assert cost_of(distance, found) == pytest.approx(min(every), abs=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "num", "expected"),
    [
        (DDPM, 4, [220, 520, 780]),
        (DDPM, 5, [148, 392, 620, 820]),
        (STABLE, 4, [212, 504, 772]),
        (STABLE, 5, [148, 368, 604, 816]),
    ],
)
def test_known_cuts_by_log_snr(scheduler: DDPMScheduler, num: int, expected: list[int]) -> None:
    # They were found on every fourth timestep.
    assert [4 * low for low in cuts(vp(scheduler, stride=4), "log_snr", num)] == expected
    assert cuts(vp(scheduler), "log_snr", num) == pytest.approx(expected, abs=6)


def test_clusters_by_timestep_are_equal_and_those_of_a_flow_symmetric() -> None:
    assert cuts(vp(DDPM), "timestep", 4) == [250, 500, 750]
    assert cuts(Flow(), "timestep", 5) == [200, 400, 600, 800]
    found = cuts(Flow(), "log_snr", 4)
    assert found == pytest.approx([190, 500, 810], abs=2)
    assert found[0] + found[2] == pytest.approx(1000, abs=1)


def test_zero_terminal_snr_moves_the_cuts_by_little() -> None:
    assert log_snr(vp(ZERO), torch.tensor([999])).item() == log_snr(vp(ZERO), torch.tensor([998])).item()
    found = cuts(vp(ZERO), "log_snr", 4)
    assert found == pytest.approx(cuts(vp(DDPM), "log_snr", 4), abs=40)


@pytest.mark.parametrize("own", [TimestepRange(250, 500), TimestepRange(0, 7)])
@pytest.mark.parametrize("process", [vp(DDPM), Flow(shift=3.0)])
def test_a_range_is_cut_into_clusters_that_follow_each_other(own: TimestepRange, process: Process) -> None:
    found = cluster_ranges(process, own, "log_snr", 5)
    check_ranges([TimestepRange(r.low - own.low, r.high - own.low) for r in found], int(own.high - own.low))
    if isinstance(process, VP):
        assert all(isinstance(edge, int) for r in found for edge in (r.low, r.high))


def test_more_clusters_than_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="found 8 clusters of 7 timesteps"):
        cluster_ranges(vp(DDPM), TimestepRange(0, 7), "timestep", 8)


def write_similarity(path: Path, edge: int) -> Path:
    """Write a map of gradients that agree below an edge and above it, and not across, at every 25th timestep."""
    t = np.arange(0, 1000, 25)
    same = (t[:, None] < edge) == (t < edge)
    np.savez(path, timesteps=t, **{"halves-base": np.where(same, 0.9, -0.1)})
    return path


def test_gradients_that_agree_are_one_cluster(tmp_path: Path) -> None:
    path = write_similarity(tmp_path / "gradient-similarity.npz", 300)
    chosen = Finetune.model_validate({"num_ranges": 2, "ranges": {"clusters": "gradient", "similarity": str(path)}})
    assert chosen.num_experts == 2
    found = clusters_of(vp(DDPM), TimestepRange(0, 1000), chosen.ranges, 2)  # type: ignore[arg-type]
    # The nearest timestep with a gradient decides: the edge lies between 275 and 300.
    assert found[0].high == pytest.approx(288, abs=1)


def test_a_file_without_a_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "halves.npz", **{"halves-base": np.ones((2, 2))})
    np.savez(tmp_path / "words.npz", timesteps=np.array(["a"]), **{"halves-base": np.ones((1, 1))})
    np.savez(tmp_path / "nan.npz", timesteps=np.arange(1), **{"halves-base": np.full((1, 1), np.nan)})
    np.savez(tmp_path / "other.npz", timesteps=np.arange(3), **{"halves-base": np.ones((2, 2))})
    for name, match in [
        ("text", "can't be read as plain arrays"),
        ("halves", "no array timesteps"),
        ("words", "found timesteps of <U1"),
        ("nan", "aren't finite"),
        ("other", r"a map \(2, 2\)"),
        ("none", "No such file"),
    ]:
        with pytest.raises(ValueError, match=match):
            read_similarity(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="the cost gradient needs that file"):
        Config.model_validate({"finetune": {"ranges": {"clusters": "gradient"}}})


# -- factors of gradients
def gram(gradients: Tensor) -> Tensor:
    found = gradients @ gradients.T
    return found / found.norm()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 4, 5, 8]), st.integers(0, 3), st.integers(0, 2**31))
def test_a_nash_bargain_is_a_solution(k: int, more: int, seed: int) -> None:
    gradients = torch.randn(k, k + more, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Most pairs conflict.
    g = gram(gradients - 0.9 * gradients.mean(0))
    alpha = nash_weights(g)
    assert bool((alpha > 0).all())
    assert alpha.max() <= CAP
    # |α|² λ_min <= αᵀGα = k: only where the least eigenvalue is so small may the solution lie above the cap.
    held = g + k / CAP**2 * torch.eye(k)
    solved = [g] if torch.linalg.eigvalsh(g)[0] > k / CAP**2 else [g, held]
    assert min(float((alpha * (each @ alpha) - 1).abs().max()) for each in solved) < 1e-6


def test_nash_factors_of_orthogonal_gradients_are_one_over_their_lengths() -> None:
    lengths = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    g = torch.diag(lengths**2)
    torch.testing.assert_close(nash_weights(g), 1 / lengths)


@pytest.mark.parametrize("rows", [[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]], [[0.0], [0.0]]])
def test_gradients_that_cancel_have_capped_factors(rows: list[list[float]]) -> None:
    gradients = torch.tensor(rows, dtype=torch.float64)
    found = gradients @ gradients.T
    alpha = nash_weights(found / found.norm().clamp(min=1e-300))
    assert bool((alpha > 0).all())
    assert alpha.max() <= CAP


def projected(gradients: Tensor, orders: list[list[int]]) -> Tensor:
    """PCGrad as Yu et al. 2020 write it, algorithm 1: on the gradients themselves."""
    total = torch.zeros_like(gradients[0])
    for i, order in enumerate(orders):
        g = gradients[i].clone()
        for j in order:
            if j != i and g @ gradients[j] < 0:
                g -= (g @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        total += g
    return total


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.integers(0, 2**31))
def test_pcgrad_by_inner_products_is_pcgrad_on_gradients(k: int, seed: int) -> None:
    gradients = torch.randn(k, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients -= gradients.mean(0)
    draws, again = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    orders = [torch.randperm(k, generator=again).tolist() for _ in range(k)]
    found = pcgrad_weights(gram(gradients), draws) @ gradients
    torch.testing.assert_close(found, projected(gradients, orders), rtol=1e-9, atol=1e-9)


def test_pcgrad_sums_gradients_that_agree() -> None:
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert torch.equal(pcgrad_weights(gram(gradients), torch.Generator()), torch.ones(3, dtype=torch.float64))
