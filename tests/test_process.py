"""Noise processes against closed forms, their samplers in diffusers, and each other."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from decouple_merge.diffusion.process import VP, Flow, Process
from decouple_merge.diffusion.timesteps import TimestepRange, check_ranges
from decouple_merge.seeds import generator

SHAPE = (64, 3, 4, 4)
SHIFTS = (1.0, 3.0, 5.0, 12.0)
EVERYTHING = TimestepRange(0, 1000)


def schedule(**changes: object) -> Tensor:
    return DDPMScheduler(num_train_timesteps=1000, **changes).alphas_cumprod


PROCESSES = {
    **{kind: VP(schedule(), kind) for kind in ("epsilon", "sample", "v_prediction")},
    "v_prediction of zero terminal SNR": VP(schedule(rescale_betas_zero_snr=True), "v_prediction"),
    "v_prediction of a cosine": VP(schedule(beta_schedule="squaredcos_cap_v2"), "v_prediction"),
    **{f"flow of shift {shift:g}": Flow(shift) for shift in SHIFTS},
}


def pair(process: Process) -> tuple[Tensor, Tensor, Tensor]:
    draws = generator("a pair")
    x0, noise = torch.randn(SHAPE, generator=draws).double(), torch.randn(SHAPE, generator=draws).double()
    return x0, noise, process.draw(len(x0), EVERYTHING, 0.0, generator("timesteps"))


@pytest.mark.parametrize("name", PROCESSES)
def test_the_target_of_an_oracle_gives_the_image_back(name: str) -> None:
    process = PROCESSES[name]
    x0, noise, t = pair(process)
    x_t, output = process.mix(x0, noise, t), process.target(x0, noise, t)
    torch.testing.assert_close(process.x0_of(x_t, output, t), x0, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_signal_to_noise_ratio_is_that_of_the_mixture(name: str) -> None:
    process = PROCESSES[name]
    t = process.spread(EVERYTHING, 50)
    ones, zeros = torch.ones(50, 1).double(), torch.zeros(50, 1).double()
    signal, sigma = process.mix(ones, zeros, t), process.mix(zeros, ones, t)
    torch.testing.assert_close(process.snr(t).double(), (signal / sigma).square()[:, 0], rtol=1e-4, atol=1e-12)
    assert bool((process.snr(t).diff() <= 0).all())


def test_vp_mixes_as_the_scheduler_of_diffusers_does() -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    process = VP(scheduler.alphas_cumprod, "v_prediction")
    x0, noise, t = (v.float() if v.is_floating_point() else v for v in pair(process))
    torch.testing.assert_close(process.mix(x0, noise, t), scheduler.add_noise(x0, noise, t))
    torch.testing.assert_close(process.target(x0, noise, t), scheduler.get_velocity(x0, noise, t))


def test_flow_mixes_as_the_scheduler_of_diffusers_does() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = scheduler.timesteps[::10]
    x0, noise = torch.randn(len(t), 3, 4, 4, generator=generator("x0")), torch.randn(len(t), 3, 4, 4)
    torch.testing.assert_close(Flow(3.0).mix(x0, noise, t), scheduler.scale_noise(x0, t, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", SHIFTS)
def test_shifted_noise_levels_are_those_of_the_scheduler_of_diffusers(shift: float) -> None:
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    expected = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas[:1000].flip(0).double()
    torch.testing.assert_close(Flow(shift).shifted(u), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(Flow(shift).unshifted(Flow(shift).shifted(u)), u)


def test_vp_and_flow_agree_where_their_signal_to_noise_ratios_do() -> None:
    """A flow is a VP process scaled by 1/√(a² + s²): the x0 that the same image and noise amount to is the same."""
    vp, flow = PROCESSES["v_prediction"], Flow()
    x0, noise, t = pair(vp)
    ratio = vp.snr(t).double().sqrt()
    other = 1000 / (1 + ratio)
    scale = (ratio.square() + 1).sqrt() / (ratio + 1)
    x_t = scale[:, None, None, None] * vp.mix(x0, noise, t)
    torch.testing.assert_close(flow.mix(x0, noise, other), x_t, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow.snr(other), vp.snr(t), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_flow_draws_its_own_density_restricted_to_the_range(shift: float, density: str) -> None:
    process = Flow(shift, density)  # type: ignore[arg-type]
    own = TimestepRange(500.0, 875.0)
    everything = process.draw(200_000, EVERYTHING, 0.0, generator("all"))
    inside = everything[(everything >= own.low) & (everything < own.high)]
    restricted = process.draw(200_000, own, 0.0, generator("own"), antithetic=True)
    assert bool(((restricted >= own.low) & (restricted < own.high)).all())
    assert len(inside) / 200_000 == pytest.approx(process.share(own), abs=0.005)
    edges = torch.linspace(own.low, own.high, 11)
    expected, found = torch.histogram(inside, edges).hist / len(inside), torch.histogram(restricted, edges).hist / 2e5
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_global_probability_mixes_with_the_unrestricted_density(shift: float) -> None:
    process, own, p = Flow(shift), TimestepRange(0.0, 400.0), 0.3
    t = process.draw(200_000, own, p, generator("mixed"), antithetic=True)
    is_own = float(((t >= own.low) & (t < own.high)).float().mean())
    assert is_own == pytest.approx(1 - p + p * process.share(own), abs=0.005)
    assert float(t.min()) > 0
    assert float(t.max()) < 1000


def test_sd3_draws_a_logit_normal() -> None:
    t = Flow(1.0, "logit_normal", 0.5, 2.0).draw(200_000, EVERYTHING, 0.0, generator("sd3"))
    logit = torch.logit(t.double() / 1000)
    assert float(logit.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(logit.std()) == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize(
    ("shift", "edges"), [(1.0, (250.0, 500.0, 750.0)), (3.0, (500.0, 750.0, 900.0)), (5.0, (625.0, 833.333, 937.5))]
)
def test_ranges_of_a_flow_hold_equal_shares_of_the_steps(shift: float, edges: tuple[float, ...]) -> None:
    ranges = Flow(shift).split(4)
    check_ranges(ranges, 1000)
    assert [r.high for r in ranges[:3]] == pytest.approx(edges, abs=1e-3)
    assert [Flow(shift).step_share(r) for r in ranges] == pytest.approx([0.25] * 4)


def test_equal_quarters_of_the_noise_level_are_no_equal_shares_of_the_steps() -> None:
    quarters = [TimestepRange(low, low + 250) for low in (0, 250, 500, 750)]
    assert [Flow(5.0).step_share(r) for r in quarters] == pytest.approx([0.0625, 0.104, 0.208, 0.625], abs=1e-3)


def test_a_share_of_vp_is_its_part_of_the_schedule() -> None:
    assert PROCESSES["epsilon"].share(TimestepRange(0, 250)) == 0.25


def test_timesteps_spread_over_a_range_lie_in_it() -> None:
    for process in (PROCESSES["epsilon"], Flow(3.0)):
        own = process.split(4)[1]
        t = process.spread(own, 40)
        assert bool(((t >= own.low) & (t < own.high)).all())
        assert float(t.double().mean()) == pytest.approx((own.low + own.high) / 2, rel=0.01)


def test_the_draw_of_a_flow_at_no_signal_is_finite() -> None:
    process = Flow()
    t = process.draw(10_000, TimestepRange(0.0, 1e-3), 0.0, generator("edge"))
    assert bool((t > 0).all())
    assert math.isfinite(float(process.snr(t).max()))


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction type is 'flow', not one of epsilon, sample, v_prediction"):
        VP(schedule(), "flow")
