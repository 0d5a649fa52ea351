"""Weightings of the loss against the closed forms of each network output."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from decouple_merge.diffusion.process import VP, Flow, Process
from decouple_merge.diffusion.weightings import WEIGHTINGS, check_weighting, weight_of

T = torch.arange(1000)
SCHEDULE = DDPMScheduler(num_train_timesteps=1000).alphas_cumprod
ZERO_SNR = DDPMScheduler(num_train_timesteps=1000, rescale_betas_zero_snr=True).alphas_cumprod
SNR = (SCHEDULE.double() / (1 - SCHEDULE.double())).float()
SIGMA = (T[1:] / 1000).float()

# The columns ε, v and velocity of the table in the supplement of DeMe, section 1, and of its flow counterpart.
EPSILON = {
    "standard": lambda s: torch.ones_like(s),
    "snr_plus_one": lambda s: 1 + 1 / s,
    "truncated_snr": lambda s: (1 / s).clamp(min=1),
    "min_snr": lambda s: (5 / s).clamp(max=1),
    "soft_min_snr": lambda s: 5 / (s + 5),
    "p2": lambda s: 1 / (1 + s),
    "debiased": lambda s: 1 / s.sqrt(),
}
VELOCITY = {
    "standard": lambda s: s / (s + 1),
    "snr_plus_one": lambda s: torch.ones_like(s),
    "truncated_snr": lambda s: s.clamp(min=1) / (s + 1),
    "min_snr": lambda s: s.clamp(max=5) / (s + 1),
    "soft_min_snr": lambda s: 5 * s / ((s + 5) * (s + 1)),
    "p2": lambda s: s / (s + 1) ** 2,
    "debiased": lambda s: s.sqrt() / (s + 1),
}
FLOW = {
    "standard": lambda s: (1 - s) ** 2,
    "snr_plus_one": lambda s: (1 - s) ** 2 + s**2,
    "truncated_snr": lambda s: torch.maximum((1 - s) ** 2, s**2),
    "min_snr": lambda s: torch.minimum((1 - s) ** 2, 5 * s**2),
    "soft_min_snr": lambda s: 5 * (1 - s) ** 2 / (((1 - s) / s) ** 2 + 5),
    "p2": lambda s: (1 - s) ** 2 / (1 + ((1 - s) / s) ** 2),
    "debiased": lambda s: (1 - s) * s,
}


def weights(name: str, process: Process, t: Tensor, **options: float) -> Tensor:
    found = weight_of(name, **options)(process, t)
    assert found is not None
    return found


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_of_each_output_are_the_closed_forms(name: str) -> None:
    torch.testing.assert_close(weights(name, VP(SCHEDULE, "epsilon"), T), EPSILON[name](SNR), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        weights(name, VP(SCHEDULE, "v_prediction"), T), VELOCITY[name](SNR), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(weights(name, VP(SCHEDULE, "sample"), T), WEIGHTINGS[name](SNR), rtol=1e-3, atol=1e-6)
    flow = weights(name, Flow(), 1000 * SIGMA)
    torch.testing.assert_close(flow, FLOW[name](SIGMA), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_weighted_error_is_that_of_x0(name: str) -> None:
    """An output that is off by d in x0's units has the same loss whatever the network predicts."""
    t = torch.arange(10, 990, 70)
    x0, noise, off = (torch.randn(len(t), 8, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    found = []
    for kind in ("epsilon", "sample", "v_prediction"):
        process = VP(SCHEDULE.double(), kind)
        x_t = process.mix(x0, noise, t)
        wrong = process.target(
            x0 + off, (x_t - process.mix(x0 + off, 0 * noise, t)) / process.mix(0 * x0, 1 + 0 * noise, t), t
        )
        error = (wrong - process.target(x0, noise, t)).square().mean(1)
        found.append(weights(name, process, t).double() * error)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[2], found[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("name", "last"), [("standard", 1.0), ("min_snr", 1.0), ("soft_min_snr", 1.0), ("p2", 1.0)])
def test_weights_at_zero_terminal_snr_are_the_limits(name: str, last: float) -> None:
    found = weights(name, VP(ZERO_SNR, "epsilon"), T)
    assert found[-1].item() == pytest.approx(last, rel=1e-4)
    assert bool(weights(name, VP(ZERO_SNR, "v_prediction"), T).isfinite().all())
    check_weighting(name, {}, VP(ZERO_SNR, "epsilon"))


@pytest.mark.parametrize("name", ["snr_plus_one", "truncated_snr", "debiased"])
def test_a_weighting_without_a_limit_at_zero_terminal_snr_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"weighting {name} .* no finite weight at timestep 999"):
        check_weighting(name, {}, VP(ZERO_SNR, "epsilon"))
    check_weighting(name, {}, VP(ZERO_SNR, "v_prediction"))


def test_weights_below_zero_are_refused_as_such() -> None:
    message = (
        r"weighting min_snr with .*-5.* has the weight -5.* at timestep 0, expected 0 or more: change weighting_op"
    )
    with pytest.raises(ValueError, match=message):
        check_weighting("min_snr", {"gamma": -5.0}, VP(SCHEDULE, "sample"))
    with pytest.raises(ValueError, match=r"weighting p2 .* has the weight .* expected 0 or more"):
        check_weighting("p2", {"k": -1.0}, VP(SCHEDULE, "epsilon"))


def test_options_change_a_weighting() -> None:
    process = VP(SCHEDULE, "epsilon")
    assert weights("min_snr", process, T, gamma=1.0).min() < weights("min_snr", process, T).min()
    assert torch.equal(weights("p2", process, T, gamma=0.0), weights("standard", process, T))


def test_no_weighting_weighs_nothing() -> None:
    assert weight_of(None)(Flow(), torch.tensor([1.0])) is None


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("min_snr5", {}, "weighting is 'min_snr5', expected one of standard, snr_plus_one"),
        ("min_snr", {"k": 1.0}, "weighting min_snr has no option 'k', expected gamma"),
        ("standard", {"k": 1.0}, "has no option 'k', expected none"),
        (None, {"gamma": 1.0}, "no weighting has a name"),
        ("uncertainty", {}, "which is learned: set balancing to it"),
    ],
)
def test_unknown_names_and_options_are_refused(name: str | None, options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        weight_of(name, **options)


# -- tables
@pytest.mark.parametrize(
    "process", [VP(SCHEDULE, "epsilon"), VP(SCHEDULE, "v_prediction"), VP(ZERO_SNR, "sample"), Flow()]
)
def test_a_table_weighs_the_outputs_error_by_equal_parts_of_the_schedule(process: Process) -> None:
    found = weight_of([0.5, 2.0, 0.0, 1.0])(process, torch.tensor([0, 249, 250, 499, 500, 749, 750, 999]))
    assert found is not None
    assert found.tolist() == [0.5, 0.5, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0]


def test_a_table_may_have_a_number_for_each_timestep_and_a_flow_ends_in_the_last() -> None:
    table = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    found = weight_of(table.tolist())(VP(SCHEDULE, "epsilon"), T)
    assert found is not None
    assert torch.equal(found, table)
    last = weight_of([1.0, 3.0])(Flow(), torch.tensor([499.99, 500.0, 1000.0]))
    assert last is not None
    assert last.tolist() == [1.0, 3.0, 3.0]


def test_a_table_of_zeros_trains_nothing_and_is_refused() -> None:
    check_weighting([0.0, 1.0], {}, Flow())
    with pytest.raises(ValueError, match="zeros alone"):
        check_weighting([0.0, 0.0], {}, Flow())


def test_the_table_of_a_weightings_own_values_is_that_weighting() -> None:
    process = VP(SCHEDULE, "epsilon")
    expected = weights("min_snr", process, T)
    assert torch.equal(weights(expected.tolist(), process, T), expected)  # type: ignore[arg-type]
