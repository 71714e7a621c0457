"""The stochastic step of the flow: marginals against closed forms and Monte Carlo, densities against other code."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from wallvla.flow_matching_wallvla import euler_step, gaussian_log_prob, sde_step


def turning_point(next_time: float, noise_level: float) -> float:
    """The time t to which the transition goes before it comes back to `next_time`, from the derivation."""
    kept = math.sqrt(1 - noise_level**2)
    return next_time / (next_time + (1 - next_time) * kept)


class Mixture:
    """Actions from a few random atoms in D dimensions: marginals, exact velocity and score in float64."""

    def __init__(self, seed: int, atoms: int = 4, dimensions: int = 3):
        rng = torch.Generator().manual_seed(seed)
        self.atoms = torch.randn(atoms, dimensions, generator=rng, dtype=torch.float64) * 1.5
        self.weights = torch.rand(atoms, generator=rng, dtype=torch.float64).softmax(0)

    def draw(self, count: int, time: float, rng: torch.Generator) -> torch.Tensor:
        actions = self.atoms[torch.multinomial(self.weights, count, replacement=True, generator=rng)]
        return time * actions + (1 - time) * torch.randn(actions.shape, generator=rng, dtype=torch.float64)

    def log_density(self, x: torch.Tensor, time: float) -> torch.Tensor:
        parts = Normal(time * self.atoms, 1 - time).log_prob(x[:, None]).sum(-1) + self.weights.log()
        return parts.logsumexp(-1)

    def velocity(self, x: torch.Tensor, time: float) -> torch.Tensor:
        parts = Normal(time * self.atoms, 1 - time).log_prob(x[:, None]).sum(-1) + self.weights.log()
        action = parts.softmax(-1) @ self.atoms
        return (action - x) / (1 - time)


def times(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def one_step(x, velocity, time, next_time, noise_level, temperature=1.0):
    """`sde_step` for points (N, D), as one chunk of N steps."""
    mean, std = sde_step(x[None], velocity[None], *times(time, next_time), noise_level, temperature)
    return mean[0], std.item()


@pytest.mark.parametrize("time,next_time", [(0.0, 0.2), (0.2, 0.6), (0.6, 0.8), (0.4, 0.999)])
@pytest.mark.parametrize("noise_level", [0.2, 0.7, 1.0])
def test_gaussian_marginals_are_exact_after_a_step_of_any_size(time, next_time, noise_level):
    """The velocity of a step whose Euler move is exact; everything is affine, so no sampling is needed."""
    rng = torch.Generator().manual_seed(0)
    center, spread = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    spread = spread.abs() + 0.1

    def marginal(tau):
        return tau * center, (tau**2 * spread**2 + (1 - tau) ** 2).sqrt()

    turn = turning_point(next_time, noise_level)
    (m0, s0), (m1, s1) = marginal(time), marginal(turn)

    def moved(x):
        velocity = (m1 + s1 / s0 * (x - m0) - x) / (turn - time)  # of the exact flow from `time` to the turning point
        return one_step(x, velocity, time, next_time, noise_level)

    (at_mean, std), (at_other, _) = moved(m0[None]), moved((m0 + 1)[None])
    slope = (at_other - at_mean)[0]
    expected_mean, expected_std = marginal(next_time)
    torch.testing.assert_close(at_mean[0], expected_mean)
    torch.testing.assert_close((slope**2 * s0**2 + std**2).sqrt(), expected_std)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("time", [0.0, 0.3, 0.7])
def test_random_fields_keep_mean_and_variance_to_sampling_error(seed, time):
    """A small step in the field of a random mixture, against the ODE's step from the same points."""
    mixture, rng, count = Mixture(seed), torch.Generator().manual_seed(100 + seed), 200_000
    next_time, noise_level = time + 0.01, 0.3
    x = mixture.draw(count, time, rng)
    velocity = mixture.velocity(x, time)
    mean, std = one_step(x, velocity, time, next_time, noise_level)
    stochastic = mean + std * torch.randn(x.shape, generator=rng, dtype=torch.float64)
    ode = euler_step(x, velocity, time, next_time)
    truth = mixture.draw(count, next_time, rng)
    assert (stochastic - ode).std() > 0.05, "the step is stochastic"
    for other in (ode, truth):
        error = ((stochastic.var(0) + other.var(0)) / count).sqrt()
        assert ((stochastic.mean(0) - other.mean(0)).abs() < 4.5 * error).all()
        # The variance of a variance, by fourth moments
        fourth = [((z - z.mean(0)) ** 4).mean(0) - z.var(0) ** 2 for z in (stochastic, other)]
        error = ((fourth[0] + fourth[1]) / count).sqrt()
        assert ((stochastic.var(0) - other.var(0)).abs() < 4.5 * error).all()


def test_a_chain_of_stochastic_steps_ends_at_the_data():
    """As many steps as the marginals need, all stochastic, from noise to almost the end."""
    mixture, rng, count = Mixture(1), torch.Generator().manual_seed(0), 40_000
    grid = torch.linspace(0, 0.99, 101, dtype=torch.float64).tolist()
    x = mixture.draw(count, 0.0, rng)
    for time, next_time in zip(grid[:-1], grid[1:], strict=True):
        mean, std = one_step(x, mixture.velocity(x, time), time, next_time, 0.3)
        x = mean + std * torch.randn(x.shape, generator=rng, dtype=torch.float64)
    truth = mixture.draw(count, 0.99, rng)
    torch.testing.assert_close(x.mean(0), truth.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(x.T.cov(), truth.T.cov(), atol=0.06, rtol=0)


def test_small_steps_are_euler_maruyama_with_the_score():
    """(mean - x) / dt tends to v + sigma^2 / 2 grad log p; the score comes from autograd of the log density."""
    mixture, rng = Mixture(2), torch.Generator().manual_seed(0)
    for time in (0.05, 0.4, 0.9):
        x = mixture.draw(50, time, rng).requires_grad_(True)
        (score,) = torch.autograd.grad(mixture.log_density(x, time).sum(), x)
        x = x.detach()
        velocity = mixture.velocity(x, time)
        sigma, step = 0.7, 1e-7
        noise_level = sigma * math.sqrt(step) / (1 - time - step)
        mean, std = one_step(x, velocity, time, time + step, noise_level)
        assert std == pytest.approx(sigma * math.sqrt(step))
        torch.testing.assert_close((mean - x) / step, velocity + sigma**2 / 2 * score, rtol=1e-5, atol=1e-5)


def test_euler_maruyama_would_add_variance_at_large_steps():
    """Why the transition is not the first-order one: one action, five steps, the variance it should and would have."""
    action, rng = torch.zeros(400_000, 1, dtype=torch.float64), torch.Generator().manual_seed(0)
    excess = []
    for time, next_time in ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8)):
        x = (1 - time) * torch.randn(action.shape, generator=rng, dtype=torch.float64)
        velocity = (action - x) / (1 - time)
        mean, std = one_step(x, velocity, time, next_time, 0.5)
        z = torch.randn(x.shape, generator=rng, dtype=torch.float64)
        first_order = euler_step(x, velocity, time, next_time) - std**2 / 2 * (x - time * velocity) / (1 - time)
        expected = (1 - next_time) ** 2
        assert (mean + std * z).var().item() == pytest.approx(expected, rel=0.01)
        excess.append((first_order + std * z).var().item() / expected - 1)
    assert excess == pytest.approx([0.0713, 0.0903, 0.1289], abs=0.02)


def test_without_noise_the_step_is_eulers_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    x, velocity = torch.randn(2, 4, 8, 3, generator=generator)
    time, next_time = torch.tensor([0.0, 0.2, 0.6, 0.8]), torch.tensor([0.2, 0.4, 0.8, 0.999])
    mean, std = sde_step(x, velocity, time, next_time, noise_level=0.0)
    assert (std == 0).all()
    for row in range(4):
        assert torch.equal(mean[row], euler_step(x[row], velocity[row], time[row], next_time[row]))
    # and in the limit
    for noise_level in (1e-2, 1e-3):
        closer, _ = sde_step(x, velocity, time, next_time, noise_level)
        assert (closer - mean).abs().max() < 3 * noise_level**2


def test_full_noise_redraws_what_is_left_and_the_end_has_none():
    x, velocity = torch.ones(1, 2, 2), torch.full((1, 2, 2), 0.5)
    mean, std = sde_step(x, velocity, torch.tensor([0.4]), torch.tensor([0.8]), noise_level=1.0)
    torch.testing.assert_close(mean, torch.full((1, 2, 2), 0.8 * (1 + 0.6 * 0.5)))  # tau' a_hat
    assert std.item() == pytest.approx(0.2)
    mean, std = sde_step(x, velocity, torch.tensor([0.8]), torch.tensor([1.0]), noise_level=0.7)
    torch.testing.assert_close(mean, x + 0.2 * velocity)  # nothing is lost to noise at the clean end
    assert std.item() == 0


def test_temperature_scales_all_noise_of_the_path():
    """One action: the path at temperature c has the mean tau a and the deviation c (1 - tau), through any steps."""
    action, rng, temperature = (
        torch.full((200_000, 1), 0.7, dtype=torch.float64),
        torch.Generator().manual_seed(0),
        0.6,
    )
    x = temperature * torch.randn(action.shape, generator=rng, dtype=torch.float64)
    for time, next_time in ((0.0, 0.2), (0.2, 0.4), (0.4, 0.8)):
        velocity = (action - x) / (1 - time)
        mean, std = one_step(x, velocity, time, next_time, 0.5, temperature)
        x = mean + std * torch.randn(x.shape, generator=rng, dtype=torch.float64)
        assert x.mean().item() == pytest.approx(next_time * 0.7, abs=0.005)
        assert x.std().item() == pytest.approx(temperature * (1 - next_time), rel=0.01)


def test_log_density_equals_two_independent_computations():
    generator = torch.Generator().manual_seed(0)
    values, mean = torch.randn(2, 6, 8, 4, generator=generator)
    std = torch.rand(6, 1, 1, generator=generator) + 0.01
    found = gaussian_log_prob(values, mean, std)
    assert found.dtype == torch.float32
    expected = Normal(mean.double(), std.double()).log_prob(values.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    x, m, s = (tensor.double().numpy() for tensor in (values, mean, std))
    by_density = np.log(np.exp(-((x - m) ** 2) / (2 * s**2)) / np.sqrt(2 * np.pi * s**2) + 0.0)
    finite = np.isfinite(by_density)
    np.testing.assert_allclose(found.numpy()[finite], by_density[finite], rtol=1e-4, atol=1e-4)
    assert finite.mean() > 0.5 and (found > 0).any(), "a density, which may exceed 1"
    # bf16 values are scored in float32
    assert gaussian_log_prob(values.bfloat16(), mean.bfloat16(), std).dtype == torch.float32
