"""A flow policy whose actions have a probability, and what it thinks of the situation: actor and critic of PPO."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flow_matching_wallvla import euler_step, gaussian_log_prob, number_of_steps, sde_step, time_grid
from ..modeling_wallvla import PrefixContext, WallVLAForConditionalGeneration
from .flow_ppo_config import FlowPPOConfig


# Keys of a batch that describe the chunk; the others go into the prefix
CHUNK_KEYS = ("action_mask", "action_padding")


@dataclass(frozen=True)
class Draws:
    """All randomness of a chunk, or of B chunks. K: stochastic steps of a chunk.

    noise: where the flow starts, before the temperature, (B, H, D) float32.
    fresh: standard normal noise of the stochastic steps, (B, K, H, D) float32.
    index: which Euler steps are stochastic, (B, K) int64.
    """

    noise: Tensor
    fresh: Tensor
    index: Tensor

    @classmethod
    def of_key(cls, shape: tuple[int, int], num_steps: int, stochastic_steps: str, seed: int) -> "Draws":
        """The draws of one chunk of `shape` (H, D), without the dimension B.

        `stochastic_steps` is `"one"`, at random, or `"all"`; the last Euler step never is (see `sde_step`).
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(shape, generator=generator)
        index = torch.arange(num_steps - 1)
        if stochastic_steps == "one":
            index = torch.randint(num_steps - 1, (1,), generator=generator)
        return cls(noise, torch.randn((len(index), *shape), generator=generator), index)

    @classmethod
    def stack(cls, draws: list["Draws"], device: torch.device) -> "Draws":
        """Draws of single chunks as those of a batch."""
        columns = zip(*[(each.noise, each.fresh, each.index) for each in draws], strict=True)
        return cls(*(torch.stack(column).to(device) for column in columns))


@dataclass(frozen=True)
class Transitions:
    """The stochastic steps that B chunks took: states before and after (B, K, H, D) float32, Euler step (B, K)."""

    before: Tensor
    after: Tensor
    index: Tensor


class FlowActorCritic(nn.Module):
    """The policy of a model, `T` Euler steps of which some are stochastic, and a value head beside it.

    It asks the model for two things only, `encode_prefix` and `predict_velocity`, so every kind of action expert has
    it, and so do experts that predict the clean action. The module stays in evaluation mode: the policy that is
    improved is the one that acted, without dropout.

    The value head is one linear map of the mean of the VLM's last hidden states over the visible prefix, through which
    no gradient reaches the VLM (Qwen-VLA, section 4.2). It starts at 0.
    """

    def __init__(self, model: WallVLAForConditionalGeneration, args: FlowPPOConfig):
        super().__init__()
        self.model, self.args = model, args
        self.num_steps = number_of_steps(args.num_inference_steps, model.config.num_inference_steps)
        if self.num_steps < 2:
            raise ValueError(
                f"num_inference_steps is {self.num_steps}: the last Euler step cannot be stochastic, so a policy with "
                "a probability needs at least 2."
            )
        width = model.config.vlm_config.get_text_config().hidden_size
        self.value_head = nn.Linear(width, 1, device=model.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eval()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.value_head.weight.device.type, torch.bfloat16, enabled=self.args.bf16)

    def encode(self, inputs: Mapping[str, Tensor]) -> PrefixContext:
        """The prefix of a batch of the processor."""
        with self._autocast():
            return self.model.encode_prefix(**{k: v for k, v in inputs.items() if k not in CHUNK_KEYS})

    def _velocity(self, actions: Tensor, time: Tensor, context: PrefixContext, action_mask: Tensor) -> Tensor:
        channel_mask, step_mask = action_mask.any(dim=1, keepdim=True), action_mask.any(dim=2)
        with self._autocast():
            return self.model.predict_velocity(actions, time, context, channel_mask, step_mask).float()

    @torch.no_grad()
    def sample(self, inputs: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, Transitions, Tensor]:
        """Samples chunks and keeps what their probability needs.

        Args:
            inputs: batch of the processor, without actions.
            draws: of the batch.

        Returns:
            normalised actions (B, H, D) float32, 0 where `action_mask` is False; the transitions; and their log
            density summed over the channels of each action step, (B, H) float32.
        """
        args, mask = self.args, inputs["action_mask"]
        channel_mask = mask.any(dim=1, keepdim=True)
        context = self.encode(inputs)
        actions = args.temperature * draws.noise
        to_padding = inputs["action_padding"][:, None] - actions  # as `sample_actions` treats channels without a robot
        before = torch.zeros_like(draws.fresh)
        after, log_prob = torch.zeros_like(before), torch.zeros_like(actions)
        times = time_grid(self.num_steps, self.model.config.time_scale, actions.device)
        for step in range(self.num_steps):
            time, next_time = times[step].expand(len(actions)), times[step + 1].expand(len(actions))
            velocity = torch.where(channel_mask, self._velocity(actions, time, context, mask), to_padding)
            moved = euler_step(actions, velocity, times[step], times[step + 1])
            here = (draws.index == step)[..., None, None]  # (B, K, 1, 1)
            stochastic = here.any(dim=1) & mask
            mean, std = sde_step(actions, velocity, time, next_time, args.noise_level, args.temperature)
            moved = torch.where(stochastic, mean + std * (draws.fresh * here).sum(dim=1), moved)
            before, after = torch.where(here, actions[:, None], before), torch.where(here, moved[:, None], after)
            if step < self.num_steps - 1:
                log_prob += torch.where(stochastic, gaussian_log_prob(moved, mean, std), 0.0)
            actions = moved
        return torch.where(mask, actions, 0.0), Transitions(before, after, draws.index), log_prob.sum(dim=2)

    def forward(
        self, inputs: Mapping[str, Tensor], transitions: Transitions, scored: Tensor, context: PrefixContext | None
    ) -> tuple[Tensor, Tensor]:
        """What the policy of now thinks of transitions that were taken.

        Args:
            inputs: batch of the processor.
            transitions: of `sample`.
            scored: elements of the chunk that count, (B, H, D) bool: channels that the robot has, steps that it took.
            context: of `encode`, where it is known; `None` encodes the prefix, with gradients where it is trained.

        Returns:
            log density of the transitions, (B,) float32, and value of the observation, (B,) float32.
        """
        args = self.args
        context = self.encode(inputs) if context is None else context
        times = time_grid(self.num_steps, self.model.config.time_scale, scored.device)
        log_prob = torch.zeros(len(scored), device=scored.device)
        for k in range(transitions.index.shape[1]):
            before, after, index = transitions.before[:, k], transitions.after[:, k], transitions.index[:, k]
            velocity = self._velocity(before, times[index], context, inputs["action_mask"])
            mean, std = sde_step(before, velocity, times[index], times[index + 1], args.noise_level, args.temperature)
            # Masked before the sum, so that what a missing channel holds reaches no gradient
            log_prob = log_prob + torch.where(scored, gaussian_log_prob(after, mean, std), 0.0).sum(dim=(1, 2))
        visible = context.visible[..., None]
        hidden = context.last_hidden_state.detach().float()
        pooled = (hidden * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)
        return log_prob, self.value_head(pooled)[:, 0]
