"""Flow matching: every formula against another way to compute it."""

import math
from functools import partial

import pytest
import torch

from wallvla.flow_matching_wallvla import (
    action_from_velocity,
    euler_step,
    flow_matching_loss,
    guidance_weight,
    identity_guidance,
    interpolate,
    loss_count,
    masked_mean,
    prefix_guidance,
    prefix_weights,
    sample_time,
    time_grid,
    velocity_from_action,
    velocity_of,
    vjp_guidance,
)


@pytest.fixture
def path():
    """actions, noise, time in float64."""
    generator = torch.Generator().manual_seed(0)
    actions, noise = torch.randn(2, 5, 7, 3, generator=generator, dtype=torch.float64)
    time = torch.tensor([0.0, 0.1, 0.3, 0.9, 0.999], dtype=torch.float64)
    return actions, noise, time


def test_path_starts_at_noise_and_ends_at_the_action(path):
    actions, noise, _ = path
    torch.testing.assert_close(interpolate(actions, noise, torch.zeros(5)), noise)
    torch.testing.assert_close(interpolate(actions, noise, torch.ones(5)), actions)


def test_velocity_is_the_derivative_of_the_path(path):
    actions, noise, time = path
    time.requires_grad_(True)
    derivative = torch.autograd.functional.jvp(lambda t: interpolate(actions, noise, t), time, torch.ones_like(time))[
        1
    ]
    torch.testing.assert_close(derivative, velocity_of(actions, noise))


def test_recovered_action_and_its_inverse(path):
    actions, noise, time = path
    noisy, velocity = interpolate(actions, noise, time), velocity_of(actions, noise)
    torch.testing.assert_close(action_from_velocity(noisy, velocity, time), actions)
    other = torch.randn_like(actions)
    torch.testing.assert_close(action_from_velocity(noisy, velocity_from_action(noisy, other, time), time), other)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.9, 0.999])
def test_action_space_loss_is_the_velocity_loss_times_one_minus_tau_squared(path, tau):
    actions, noise, _ = (x.float() for x in path)
    time = torch.full((5,), tau)
    velocity, mask = torch.randn_like(actions), torch.rand_like(actions) > 0.3
    in_action_space = flow_matching_loss(velocity, actions, noise, time, mask, "action")
    in_velocity_space = flow_matching_loss(velocity, actions, noise, time, mask, "velocity")
    torch.testing.assert_close(in_action_space, (1 - tau) ** 2 * in_velocity_space, rtol=1e-6, atol=1e-6)
    # and it is the error of the recovered action, equation 5
    recovered = action_from_velocity(interpolate(actions, noise, time), velocity, time)
    torch.testing.assert_close(in_action_space, ((recovered - actions)[mask] ** 2).mean(), rtol=1e-5, atol=1e-6)


def test_masked_elements_get_no_gradient_even_when_not_finite(path):
    actions, noise, time = (x.float() for x in path)
    mask = torch.rand_like(actions) > 0.5
    velocity = torch.where(mask, torch.randn_like(actions), torch.inf).requires_grad_(True)
    for space in ("action", "velocity"):
        for reduction in ("per_element", "per_channel"):
            (gradient,) = torch.autograd.grad(
                flow_matching_loss(velocity, actions, noise, time, mask, space, reduction), velocity
            )
            assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
            assert gradient[mask].isfinite().all() and (gradient[mask] != 0).all()


def test_masked_means_against_loops():
    values, mask = torch.randn(4, 6, 3), torch.rand(4, 6, 3) > 0.4
    mask[..., 2] = False  # a channel that no sample has
    mask[:, 0, 0] = True  # no sample is left without any
    torch.testing.assert_close(masked_mean(values, mask), values[mask].mean())
    mask[3] = False  # a sample without actions
    mask[0, :, 1] = False  # a channel that this robot lacks
    means = [[values[b, mask[b, :, c], c].mean() for c in range(3) if mask[b, :, c].any()] for b in range(3)]
    per_channel = torch.stack([torch.stack(row).mean() for row in means]).mean()
    torch.testing.assert_close(masked_mean(values, mask, "per_channel"), per_channel)
    assert loss_count(mask, "per_channel") == 3 and loss_count(mask, "per_element") == mask.sum()
    weights = [2.0, 0.5, 7.0]
    sums = [
        sum(w * values[b, mask[b, :, c], c].mean() for c, w in enumerate(weights) if mask[b, :, c].any())
        for b in range(3)
    ]
    torch.testing.assert_close(masked_mean(values, mask, "per_channel", weights), torch.stack(sums).mean())
    assert masked_mean(values, torch.zeros_like(mask)) == 0
    assert masked_mean(values, torch.zeros_like(mask), "per_channel") == 0


@pytest.mark.parametrize(
    "sampler, distribution",
    [
        # P(tau <= t) = P(u >= 1 - t / s) for u ~ Beta(1.5, 1)
        ("beta", lambda t: 1 - (1 - t / 0.999) ** 1.5),
        ("uniform", lambda t: t / 0.999),
        ("stratified", lambda t: t / 0.999),
        ("logit_normal", lambda t: 0.5 * (1 + math.erf(math.log(t / (0.999 - t)) / math.sqrt(2)))),
    ],
)
def test_time_samplers_follow_their_distribution(sampler, distribution):
    draws = sample_time(40_000, sampler, generator=torch.Generator().manual_seed(1))
    assert draws.min() >= 0 and draws.max() <= 0.999
    for t in (0.1, 0.3, 0.5, 0.8):
        # four standard errors of a proportion
        assert abs((draws <= t).float().mean().item() - distribution(t)) < 4 * 0.5 / math.sqrt(40_000)


def test_beta_times_equal_torch_beta_distribution():
    ours = sample_time(20_000, "beta", alpha=1.5, scale=1.0, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    theirs = 1 - torch.distributions.Beta(1.5, 1.0).sample((20_000,))
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(ours.quantile(quantiles), theirs.quantile(quantiles), atol=0.015, rtol=0)


def test_stratified_times_fill_every_interval():
    draws = sample_time(16, "stratified", scale=1.0, generator=torch.Generator().manual_seed(4))
    assert sorted((draws * 16).long().tolist()) == list(range(16))


def test_times_repeat_with_the_generator():
    for sampler in ("beta", "uniform", "stratified", "logit_normal"):
        first = sample_time(8, sampler, generator=torch.Generator().manual_seed(5))
        assert torch.equal(first, sample_time(8, sampler, generator=torch.Generator().manual_seed(5)))


def test_euler_on_a_field_with_a_known_solution():
    """dx/dt = 3 t^2 has x(s) = x(0) + s^3; Euler is off by a term that shrinks with the step."""
    errors = []
    for steps in (10, 100):
        times, x = time_grid(steps), torch.zeros(1, 2, 2)
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            x = euler_step(x, torch.full_like(x, 3 * t.item() ** 2), t, t_next)
        errors.append((x - 0.999**3).abs().max().item())
    assert errors[1] < errors[0] / 9


def test_euler_is_exact_on_the_straight_path(path):
    actions, noise, _ = (x.float() for x in path)
    times, x = time_grid(7, scale=1.0), noise
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x = euler_step(x, velocity_of(actions, noise), t, t_next)
    torch.testing.assert_close(x, actions, atol=1e-5, rtol=0)


def test_time_grid_ends_at_the_scale():
    torch.testing.assert_close(time_grid(10), torch.arange(11) / 10 * 0.999)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="'gaussian'.*beta"):
        sample_time(2, "gaussian")
    with pytest.raises(ValueError, match="'pixel'.*velocity"):
        flow_matching_loss(*torch.zeros(3, 1, 1, 1), torch.zeros(1), torch.ones(1, 1, 1).bool(), "pixel")
    with pytest.raises(ValueError, match="'sum'.*per_channel"):
        masked_mean(torch.zeros(1, 1, 1), torch.ones(1, 1, 1).bool(), "sum")


# Real-time chunking


def lerobot_weights(delay: int, end: int, horizon: int) -> torch.Tensor:
    """LeRobot's `get_prefix_weights` with the EXP schedule, step by step. (H,)."""
    delay = min(delay, end)
    falling = torch.linspace(1, 0, max(0, end - delay) + 2)[1:-1]
    falling = falling * torch.expm1(falling) / (math.e - 1)
    return torch.cat([torch.ones(delay), falling, torch.zeros(max(0, horizon - end))])[:horizon]


def lerobot_guided_velocity(field, x, time, previous, weights, limit):
    """LeRobot's `RTCProcessor.denoise_step`: time runs from 1 (noise) to 0, the velocity is noise minus action."""
    tau = 1 - time
    velocity = field(x)
    x = x.clone().requires_grad_(True)  # only now, so the velocity is a constant of the derivative
    recovered = x - time * velocity
    error = (previous - recovered) * weights[..., None]
    correction = torch.autograd.grad(recovered, x, error.detach())[0]
    inverse_r2 = ((1 - tau) ** 2 + tau**2) / (1 - tau) ** 2
    ratio = torch.nan_to_num((1 - tau) / tau, posinf=limit)
    weight = torch.minimum(torch.nan_to_num(ratio * inverse_r2, posinf=limit), torch.tensor(limit))
    return velocity - weight * correction


@pytest.mark.parametrize("delay, end", [(0, 0), (0, 5), (2, 6), (3, 3), (7, 7), (6, 4)])
def test_prefix_weights_equal_lerobots(delay, end):
    weights = prefix_weights(torch.tensor([delay, 1]), torch.tensor([end, 3]), 7)
    torch.testing.assert_close(weights[0], lerobot_weights(delay, end, 7))
    torch.testing.assert_close(weights[1], lerobot_weights(1, 3, 7))


@pytest.mark.parametrize("tau", [0.0, 0.1998, 0.5, 0.7992])
def test_identity_guidance_equals_lerobots(path, tau):
    actions, noise, _ = path
    time = torch.tensor(tau, dtype=torch.float64)
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = prefix_weights(torch.full((5,), 2), torch.full((5,), 5), 7).double()
    target = actions.flip(0)

    ours = identity_guidance(lambda x, _: x @ matrix, noise, time, target, weights, 5.0)
    theirs = lerobot_guided_velocity(lambda x: -(x @ matrix), noise, 1 - time, target, weights, 5.0)
    torch.testing.assert_close(ours, -theirs)


def test_vjp_guidance_against_the_written_out_derivative(path):
    """For a linear field x M the recovered action is x (1 + (1 - tau) M); the error comes back by the transpose."""
    actions, noise, _ = path
    time = torch.tensor(0.4, dtype=torch.float64)
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = prefix_weights(torch.full((5,), 2), torch.full((5,), 5), 7).double()
    jacobian = torch.eye(3, dtype=torch.float64) + 0.6 * matrix
    error = weights[..., None] * (actions - noise @ jacobian)
    expected = noise @ matrix + guidance_weight(time, 5.0) * error @ jacobian.T

    with torch.no_grad():
        guided = vjp_guidance(lambda x, _: x @ matrix, noise, time, actions, weights, 5.0)
    torch.testing.assert_close(guided, expected)
    identity = identity_guidance(lambda x, _: x @ matrix, noise, time, actions, weights, 5.0)
    assert (guided - identity).abs().max() > 0.01


def test_prefix_guidance_ends_at_the_target(path):
    actions, noise, _ = path
    weights = prefix_weights(torch.full((5,), 3), torch.full((5,), 6), 7)
    field = partial(prefix_guidance, lambda x, time: torch.tanh(x), target=actions, weights=weights)
    x, times = noise, time_grid(5, scale=1.0)
    for time, next_time in zip(times[:-1], times[1:], strict=True):
        x = euler_step(x, field(x, time), time, next_time)
        torch.testing.assert_close(
            x[:, :3], interpolate(actions, noise, next_time.expand(5))[:, :3], rtol=1e-5, atol=1e-5
        )
    assert (x[:, 3:] - actions[:, 3:]).abs().max() > 0.1


@pytest.mark.parametrize("guide", [identity_guidance, vjp_guidance])
def test_guidance_without_weight_changes_nothing(path, guide):
    actions, noise, _ = path
    weights = prefix_weights(torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.long), 7)
    for tau in (0.0, 0.5, 0.999):
        guided = guide(lambda x, _: torch.sin(x), noise, torch.tensor(tau), actions, weights, 5.0)
        torch.testing.assert_close(guided, torch.sin(noise))
