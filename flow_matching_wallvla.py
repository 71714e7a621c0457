"""Flow matching in one orientation: tau = 0 is noise, tau = 1 is the clean action (Wall-OSS-0.5, section 2.2.2).

Shapes: B samples, H steps, D channels; `time` is (B,) and broadcasts over a chunk.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def expand_time(time: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1), so that it broadcasts over `like` (B, H, D)."""
    return time.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """The linear Gaussian path `tau * a + (1 - tau) * eps` (equation 2). (B, H, D), (B, H, D), (B,) -> (B, H, D)."""
    tau = expand_time(time, actions)
    return tau * actions + (1 - tau) * noise


def velocity_of(actions: Tensor, noise: Tensor) -> Tensor:
    """The velocity of the path, `a - eps`: its derivative with respect to tau."""
    return actions - noise


def action_from_velocity(noisy_actions: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """The recovered action `x + (1 - tau) * v` (equation 4)."""
    return noisy_actions + (1 - expand_time(time, noisy_actions)) * velocity


def velocity_from_action(noisy_actions: Tensor, action: Tensor, time: Tensor) -> Tensor:
    """Inverse of `action_from_velocity`: `(a - x) / (1 - tau)`. Defined for tau < 1."""
    return (action - noisy_actions) / (1 - expand_time(time, noisy_actions))


def sample_time(
    batch_size: int,
    sampler: str = "beta",
    alpha: float = 1.5,
    scale: float = 0.999,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws flow times in [0, scale]. (B,) float32.

    - `"beta"`: `tau = s * (1 - u)`, `u ~ Beta(alpha, 1)` (equation 3): mass at the noisy end for alpha > 1. `u` is
      drawn by inverting its distribution function `u ** alpha`.
    - `"uniform"`: `tau = s * u`.
    - `"stratified"`: `tau = s * ((u + i / B) mod 1)` with one `u` for the batch and i in random order: uniform, one
      draw in each of B equal intervals (X-VLA's code).
    - `"logit_normal"`: `tau = s * sigmoid(z)`, `z ~ N(0, 1)`.

    Raises:
        ValueError: for another sampler.
    """
    options = {"generator": generator, "device": device, "dtype": torch.float32}
    if sampler == "logit_normal":
        return scale * torch.sigmoid(torch.randn(batch_size, **options))
    uniform = torch.rand(batch_size, **options)
    if sampler == "beta":
        return scale * (1 - uniform ** (1 / alpha))
    if sampler == "uniform":
        return scale * uniform
    if sampler == "stratified":
        order = torch.randperm(batch_size, generator=generator, device=device)
        return scale * ((uniform[:1] + order / batch_size) % 1)
    raise ValueError(f"Unknown time sampler {sampler!r}: use beta, uniform, stratified or logit_normal.")


def masked_mean(
    values: Tensor, mask: Tensor, reduction: str = "per_element", channel_weights: Sequence[float] = ()
) -> Tensor:
    """Mean of `values` (B, H, D) where `mask` (B, H, D) is True; 0 where nothing is. Scalar.

    `"per_element"` divides the sum by the number of valid elements. `"per_channel"` is Qwen-VLA's two-level mean
    (equations 1 and 2): for each sample, each channel over its own valid steps, then over the channels that have any;
    at last over the samples that have any. So a channel weighs the same however many of them a robot has. With
    `channel_weights` (D,) the channels of a sample are summed with these weights in the place of their mean (X-VLA).

    Values outside the mask get exactly zero gradient, also where they are not finite.
    """
    values = torch.where(mask, values, 0.0)
    if reduction == "per_element":
        return values.sum() / mask.sum().clamp(min=1)
    if reduction == "per_channel":
        count = mask.sum(dim=1)  # (B, D)
        means = values.sum(dim=1) / count.clamp(min=1)
        if channel_weights:
            samples = (means * means.new_tensor(channel_weights)).sum(dim=1)
        else:
            samples = means.sum(dim=1) / (count > 0).sum(dim=1).clamp(min=1)
        return samples.sum() / loss_count(mask, reduction).clamp(min=1)
    raise ValueError(f"Unknown reduction {reduction!r}: use per_element or per_channel.")


def loss_count(mask: Tensor, reduction: str) -> Tensor:
    """What `masked_mean` averages over at last: valid elements of `mask` (B, H, D), or samples that have any."""
    return mask.sum() if reduction == "per_element" else mask.flatten(1).any(dim=1).sum()


def action_loss(
    prediction: Tensor,
    actions: Tensor,
    mask: Tensor,
    reduction: str = "per_element",
    channel_weights: Sequence[float] = (),
    binary_channels: Sequence[int] = (),
) -> Tensor:
    """The error of a predicted clean action. Scalar float32.

    Args:
        prediction: (B, H, D); logits in the binary channels.
        actions: clean normalised actions (B, H, D); 0 or 1 in the binary channels.
        mask: True where an element counts (B, H, D) bool.
        reduction, channel_weights: see `masked_mean`.
        binary_channels: whose error is the binary cross-entropy in the place of the square.
    """
    # Masked before the square: a gradient of inf * 0 would be NaN
    prediction, actions = (torch.where(mask, each.float(), 0.0) for each in (prediction, actions))
    errors = (prediction - actions).square()
    if binary_channels:
        logits, decisions = (each[..., list(binary_channels)] for each in (prediction, actions))
        losses = F.binary_cross_entropy_with_logits(logits, decisions, reduction="none")
        errors = errors.index_copy(-1, torch.tensor(list(binary_channels), device=errors.device), losses)
    return masked_mean(errors, mask, reduction, channel_weights)


def flow_matching_loss(
    velocity: Tensor,
    actions: Tensor,
    noise: Tensor,
    time: Tensor,
    mask: Tensor,
    loss_space: str = "action",
    reduction: str = "per_element",
    channel_weights: Sequence[float] = (),
) -> Tensor:
    """The flow matching loss of a predicted velocity. Scalar float32.

    In action space (equation 5) the error of the recovered action, `a_hat - a = (1 - tau) * (v - (a - eps))`, so the
    loss is `(1 - tau)^2` times the velocity loss (equation 6).

    Args:
        velocity: predicted velocity (B, H, D).
        actions: clean normalised actions (B, H, D).
        noise: the noise of the path (B, H, D).
        time: flow times (B,).
        mask: True where an element counts (B, H, D) bool.
        loss_space: `"action"` or `"velocity"`.
        reduction, channel_weights: see `masked_mean`.
    """
    error = velocity.float() - velocity_of(actions, noise).float()
    if loss_space == "action":
        error = (1 - expand_time(time, error)) * error
    elif loss_space != "velocity":
        raise ValueError(f"Unknown loss space {loss_space!r}: use action or velocity.")
    # Masked before the square: a gradient of inf * 0 would be NaN
    return masked_mean(torch.where(mask, error, 0.0).square(), mask, reduction, channel_weights)


def number_of_steps(given: int | None, default: int) -> int:
    """Steps of sampling: those that are given, else `default`.

    Raises:
        ValueError: fewer than one.
    """
    number = default if given is None else given
    if number < 1:
        raise ValueError(f"Found num_inference_steps {number}: sampling takes at least 1. Leave it out for {default}.")
    return number


def time_grid(num_steps: int, scale: float = 0.999, device: torch.device | str | None = None) -> Tensor:
    """The times at which sampling evaluates the field and where it ends: `linspace(0, 1, T + 1) * scale`. (T + 1,)."""
    return torch.linspace(0, 1, num_steps + 1, device=device, dtype=torch.float32) * scale


def euler_step(noisy_actions: Tensor, velocity: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
    """One explicit Euler step of `dx / dtau = v` from `time` to `next_time` (scalars)."""
    return noisy_actions + (next_time - time) * velocity


# --------------------------------------------------------------------------------------------------------------------
# Flow-SDE: the same flow with fresh noise in its steps. A step then has a density, which reinforcement learning needs
# (Qwen-VLA, section 4.2, "Log-probability estimation under flow matching").
#
# Given a velocity field v, the path tau * a + (1 - tau) * eps has the posterior means
#     a_hat = E[a | x_tau] = x + (1 - tau) v,      eps_hat = E[eps | x_tau] = x - tau v,
# and an Euler step to any later time t lands at t a_hat + (1 - t) eps_hat. Go from tau to some t >= tau' > tau and
# come back to tau': scale by tau' / t, so that the action has the coefficient tau', and add fresh Gaussian noise of
# the variance s^2 = (1 - tau')^2 - (tau' / t)^2 (1 - t)^2 that the noise of the path then lacks. If x_t has the
# marginal of time t, the result has the marginal of tau', whatever the distribution of the actions. With
# s = eta (1 - tau') both moves together are the Gaussian transition
#     mean = tau' a_hat + (1 - tau') sqrt(1 - eta^2) eps_hat,      std = eta (1 - tau'),
# where t = tau' / (tau' + (1 - tau') sqrt(1 - eta^2)). eta = 0 is Euler's step, eta = 1 (t = 1) redraws all noise that
# is left. No time is singular, and after a step of any size the marginal is off by no more than Euler's own error.
#
# In the limit of small steps, with sigma^2 = s^2 / (tau' - tau), this is the Euler-Maruyama step of
#     dx = (v - sigma^2 / 2 * eps_hat / (1 - tau)) dtau + sigma dW,
# whose marginals are those of dx = v dtau by the Fokker-Planck equation, as the score of the path is
# grad log p_tau(x) = -eps_hat / (1 - tau). At the few large steps of an action policy that one adds too much variance.
# --------------------------------------------------------------------------------------------------------------------


def sde_step(
    noisy_actions: Tensor,
    velocity: Tensor,
    time: Tensor,
    next_time: Tensor,
    noise_level: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The Gaussian transition of one stochastic step: its mean (B, H, D) and standard deviation (B, 1, 1).

    Schedule of the noise: `std = temperature * noise_level * (1 - next_time)`, a share of the noise that is left. It
    ends at 0 where the path does, so the step that arrives at tau = 1 has no density and no use.

    The temperature scales all noise of a sample: draw the start as `temperature * eps`, and the path stays
    `tau * a + (1 - tau) * temperature * eps` through every step. 1 is the policy that was trained, 0 has no noise.

    Args:
        noisy_actions: the state (B, H, D).
        velocity: of the flow there, (B, H, D).
        time, next_time: flow times (B,), `time < next_time`.
        noise_level: eta in [0, 1]; at 0 the mean is `euler_step` to the bit.
        temperature: see above.
    """
    tau, following = expand_time(time, noisy_actions), expand_time(next_time, noisy_actions)
    noise = noisy_actions - tau * velocity  # E[eps | x]
    lost = 1 - math.sqrt(1 - noise_level**2)
    mean = euler_step(noisy_actions, velocity, tau, following) - (1 - following) * lost * noise
    return mean, temperature * noise_level * (1 - following)


def gaussian_log_prob(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of each element of `values` under N(mean, std^2), in float32. Positive where std is small."""
    std = std.float()
    distance = (values.float() - mean.float()) / std
    return -0.5 * distance.square() - torch.log(std) - 0.5 * math.log(2 * math.pi)


# --------------------------------------------------------------------------------------------------------------------
# Real-time chunking: while a chunk is computed, the robot goes on with the one before. A guidance bends the flow so
# that the new chunk continues the old one. It is a function (velocity field, noisy actions (B, H, D), time ()) ->
# velocity (B, H, D), where the field is a function (noisy actions, time) -> velocity; bind the other arguments below
# with functools.partial. `target` (B, H, D) holds the old chunk's remaining actions, step 0 at the new observation;
# `weights` (B, H) says how much each step must agree with it, and `limit` bounds `guidance_weight`.
# --------------------------------------------------------------------------------------------------------------------


def prefix_weights(delay: Tensor, end: Tensor, horizon: int) -> Tensor:
    """Weights of the overlap: 1 below `delay`, falling to 0 at `end` ("Real-Time Execution of Action Chunking Flow
    Policies", equation 5: `c (exp(c) - 1) / (e - 1)` with c linear in the step).

    Args:
        delay: steps that will have been executed when the chunk arrives, (B,) int64.
        end: steps that the old chunk still covers, (B,) int64.
        horizon: H.

    Returns:
        (B, H) float32.
    """
    delay = torch.minimum(delay, end)
    steps = torch.arange(horizon, device=delay.device)
    linear = ((end[:, None] - steps) / (end - delay + 1)[:, None]).clamp(0, 1).float()
    return linear * torch.expm1(linear) / (math.e - 1)


def guidance_weight(time: Tensor, limit: float) -> Tensor:
    """`min(limit, (1 - tau) / (tau r^2))` with `r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2)`. Shape of `time`."""
    weight = (time**2 + (1 - time) ** 2) / (time * (1 - time))
    return torch.nan_to_num(weight, nan=limit, posinf=limit).clamp(max=limit)


def identity_guidance(field, noisy_actions: Tensor, time: Tensor, target: Tensor, weights: Tensor, limit: float):
    """Adds the weighted error of the recovered action to the velocity, as LeRobot does: no backward pass."""
    velocity = field(noisy_actions, time)
    error = weights[..., None] * (target - (noisy_actions + (1 - time) * velocity))
    return velocity + guidance_weight(time, limit) * error


def vjp_guidance(field, noisy_actions: Tensor, time: Tensor, target: Tensor, weights: Tensor, limit: float):
    """The paper's form (equation 2): the error goes back through the field, `error^T d a_hat / d x`."""
    with torch.enable_grad():
        noisy_actions = noisy_actions.detach().requires_grad_(True)
        velocity = field(noisy_actions, time)
        recovered = noisy_actions + (1 - time) * velocity
        error = weights[..., None] * (target - recovered)
        (correction,) = torch.autograd.grad(recovered, noisy_actions, error.detach())
    return velocity.detach() + guidance_weight(time, limit) * correction


def prefix_guidance(field, noisy_actions: Tensor, time: Tensor, target: Tensor, weights: Tensor):
    """Keeps the steps of weight 1 on the straight path from their noise to `target`, where the others see them."""
    velocity = field(noisy_actions, time)
    held = (target - noisy_actions) / (1 - time)
    return torch.where(weights[..., None] >= 1, held, velocity)
