"""Noise, targets and the loss of Eq. 5 against closed forms and diffusers' scheduler."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decouple_merge.diffusion.losses import finetune_losses, per_sample_mse
from decouple_merge.diffusion.process import PREDICTION_TYPES, VP

SCHEDULER = DDPMScheduler(num_train_timesteps=1000)
ALPHAS = SCHEDULER.alphas_cumprod
EPSILON = VP(ALPHAS, "epsilon")
VELOCITY = VP(ALPHAS, "v_prediction")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X0, NOISE, TIMESTEPS = draw(6, 1, 4, 4), draw(6, 1, 4, 4, seed=1), torch.tensor([0, 1, 250, 500, 750, 999])
SIGNAL = ALPHAS[TIMESTEPS].sqrt().reshape(-1, 1, 1, 1)
SPREAD = (1 - ALPHAS[TIMESTEPS]).sqrt().reshape(-1, 1, 1, 1)


def test_noisy_images_are_those_of_diffusers() -> None:
    ours = EPSILON.mix(X0, NOISE, TIMESTEPS)
    torch.testing.assert_close(ours, SCHEDULER.add_noise(X0, NOISE, TIMESTEPS), rtol=0, atol=1e-6)


def test_velocity_target_is_that_of_diffusers() -> None:
    ours = VELOCITY.target(X0, NOISE, TIMESTEPS)
    torch.testing.assert_close(ours, SCHEDULER.get_velocity(X0, NOISE, TIMESTEPS), rtol=0, atol=1e-6)


def test_clean_image_is_recovered_from_each_kind_of_target() -> None:
    x = EPSILON.mix(X0, NOISE, TIMESTEPS)
    target = {kind: VP(ALPHAS, kind).target(X0, NOISE, TIMESTEPS) for kind in PREDICTION_TYPES}
    # At t = 999 the signal is 0.006 of x_t, so division by it magnifies rounding.
    torch.testing.assert_close((x - SPREAD * target["epsilon"]) / SIGNAL, X0, rtol=0, atol=1e-3)
    torch.testing.assert_close(SIGNAL * x - SPREAD * target["v_prediction"], X0, rtol=0, atol=1e-5)
    assert torch.equal(target["sample"], X0)


def test_noise_is_recovered_from_the_velocity() -> None:
    x = EPSILON.mix(X0, NOISE, TIMESTEPS)
    v = VELOCITY.target(X0, NOISE, TIMESTEPS)
    torch.testing.assert_close(SPREAD * x + SIGNAL * v, NOISE, rtol=0, atol=1e-5)


def test_each_image_gets_the_noise_of_its_own_timestep() -> None:
    whole = EPSILON.mix(X0, NOISE, TIMESTEPS)
    for i in range(len(X0)):
        assert torch.equal(whole[i : i + 1], EPSILON.mix(X0[i : i + 1], NOISE[i : i + 1], TIMESTEPS[i : i + 1]))


def test_squared_error_is_a_mean_over_elements_for_each_sample_in_float32() -> None:
    a, b = torch.tensor([[[[0.0, 2.0]]], [[[300.0, 0.0]]]]).half(), torch.zeros(2, 1, 1, 2).half()
    # 300² overflows fp16.
    assert torch.equal(per_sample_mse(a, b), torch.tensor([2.0, 45000.0]))


def test_errors_of_float64_are_float64() -> None:
    # In float32 both would be 1.
    a, b = torch.tensor([[1.0 + 1e-9, 0.0]], dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert per_sample_mse(a, b).item() == pytest.approx(5e-19, rel=1e-6)


def test_gradient_is_zero_at_the_midpoint_of_noise_and_teacher_and_only_there() -> None:
    noise, teacher = draw(4, 1, 3, 3), draw(4, 1, 3, 3, seed=1)
    output = ((noise + teacher) / 2).requires_grad_()
    (gradient,) = torch.autograd.grad(finetune_losses(output, noise, teacher)[0].mean(), output)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)
    for elsewhere in (noise, teacher):
        output = elsewhere.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(finetune_losses(output, noise, teacher)[0].mean(), output)
        assert gradient.abs().max() > 1e-2


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 10), st.integers(0, 2**31))
def test_loss_is_a_parabola_around_the_weighted_mean_of_target_and_teacher(weight: float, seed: int) -> None:
    output, target, teacher = (draw(3, 1, 2, 2, seed=seed + i) for i in range(3))
    optimum = (target + weight * teacher) / (1 + weight)
    total, denoising, consistency = (part.mean() for part in finetune_losses(output, target, teacher, weight))
    # (f - a)² + λ(f - b)² = (1 + λ)(f - m)² + λ/(1 + λ)·(a - b)²
    expected = (1 + weight) * (output - optimum).square().mean()
    expected = expected + weight / (1 + weight) * (target - teacher).square().mean()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(denoising, (output - target).square().mean())
    torch.testing.assert_close(consistency, (output - teacher).square().mean())


def test_without_a_teacher_the_loss_is_the_denoising_term() -> None:
    total, denoising, consistency = finetune_losses(X0, NOISE, None, 1.0)
    assert torch.equal(total, denoising)
    assert bool((consistency == 0).all())


def test_weight_zero_trains_as_without_a_teacher() -> None:
    assert torch.equal(finetune_losses(X0, NOISE, X0 + 1, 0.0)[0], finetune_losses(X0, NOISE, None)[0])


def test_weights_of_the_samples_are_on_both_terms() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 0.1])
    found = finetune_losses(X0, NOISE, X0 + 1, 0.5, weights)
    denoising = weights * (X0 - NOISE).square().mean((1, 2, 3))
    torch.testing.assert_close(found[1], denoising)
    torch.testing.assert_close(found[2], weights)
    torch.testing.assert_close(found[0], denoising + 0.5 * weights)
