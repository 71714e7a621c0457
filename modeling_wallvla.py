"""WallVLA: a Hugging Face VLM (the VL expert) and an action expert that attend together (Wall-OSS-0.5, section 2.1.1).

The prefix (images, text, proprioception, discrete action tokens) runs through the stock layers of the VLM. The action
expert reads the keys and values of each of them and turns a noisy action chunk into a velocity. The prefix never sees
an action chunk, so it is computed once, in training as in inference, and the two experts stay separate modules with
one thing between them: `PrefixContext`.

Shapes: B samples, S prefix tokens (left padded), H action steps, D action channels, C width of the VL expert,
E width of the action expert, N key-value heads, P width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.integrations import use_kernel_forward_from_hub
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.utils import ModelOutput

from .configuration_wallvla import WallVLAConfig
from .flow_matching_wallvla import (
    action_from_velocity,
    euler_step,
    flow_matching_loss,
    interpolate,
    sample_time,
    time_grid,
    velocity_from_action,
)
from .ops_wallvla import action_attention_mask, sinusoidal_embedding


@dataclass
class WallVLAOutput(ModelOutput):
    """What `forward` returns.

    loss: the weighted sum of the losses that the batch has (equation 1), scalar.
    flow_loss, action_token_loss, text_loss: each the mean over its own elements or tokens, scalars. `None` when the
        batch has no such input at all, 0 when it has the input but no element of the kind.
    loss_counts: how many elements each mean was taken over, (3,) float32 in the order above. A trainer needs them to
        average over ranks and accumulated batches.
    action_prediction: the recovered clean action chunk (B, H, D) float32, normalised.
    logits: next-token logits (B, S, vocabulary), only without `labels` and `actions`.
    """

    loss: Tensor | None = None
    flow_loss: Tensor | None = None
    action_token_loss: Tensor | None = None
    text_loss: Tensor | None = None
    loss_counts: Tensor | None = None
    action_prediction: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class PrefixContext:
    """All that an action expert may read of the prefix.

    keys, values: of every VL layer, after rope, (B, N, S, P) each. With room for a chunk: (B, N, S + H, P).
    last_hidden_state: (B, S, C), after the final norm.
    visible: tokens that action queries may read, (B, S) bool: neither padding nor anything from the first discrete
        action token on.
    next_position: where the chunk starts, (B,) int64: the position of the first discrete action token, or the one
        after the last token. Training and inference agree on it.
    domain_ids: (B,) int64 or `None`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    last_hidden_state: Tensor
    visible: Tensor
    next_position: Tensor
    domain_ids: Tensor | None = None

    def detach(self) -> "PrefixContext":
        """The same numbers, through which no gradient flows."""
        return replace(
            self,
            keys=tuple(k.detach() for k in self.keys),
            values=tuple(v.detach() for v in self.values),
            last_hidden_state=self.last_hidden_state.detach(),
        )

    def with_room(self, num_steps: int) -> "PrefixContext":
        """Static buffers with `num_steps` free places after the prefix, for sampling without concatenation."""

        def grow(states: Tensor) -> Tensor:
            return torch.cat([states, states.new_zeros(*states.shape[:2], num_steps, states.shape[3])], dim=2)

        return replace(self, keys=tuple(map(grow, self.keys)), values=tuple(map(grow, self.values)))


class KeyValueTap:
    """Takes the place of a cache in one attention call and keeps the keys and values (B, N, S, P) that went by."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class PrefixReader:
    """Takes the place of a cache in one attention call and puts the prefix before the chunk's own keys and values.

    With room behind the prefix the chunk is written in place, otherwise the two are concatenated.
    """

    def __init__(self, keys: Tensor, values: Tensor, prefix_length: int):
        self.keys, self.values, self.prefix_length = keys, values, prefix_length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if self.keys.shape[2] == self.prefix_length:
            return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys[:, :, self.prefix_length :] = keys
        self.values[:, :, self.prefix_length :] = values
        return self.keys, self.values


@use_kernel_forward_from_hub("WallVLARMSNorm")
class WallVLARMSNorm(nn.Module):
    """RMS norm in float32 that multiplies by its weight before it casts back; Qwen casts first (Wall-OSS)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            states = hidden.float()
            states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps)
            return (self.weight.float() * states).to(hidden.dtype)


def norm_in_float32(decoder: nn.Module, width: int, eps: float) -> None:
    """Puts `WallVLARMSNorm` in the place of the norms of a decoder (`layers`, `norm`); names stay as they are."""
    for layer in decoder.layers:
        layer.input_layernorm = WallVLARMSNorm(width, eps)
        layer.post_attention_layernorm = WallVLARMSNorm(width, eps)
    decoder.norm = WallVLARMSNorm(width, eps)


class MoTActionExpert(nn.Module):
    """The action expert of Wall-OSS-0.5: a narrow transformer as deep as the VL expert, sharing its attention."""

    def __init__(self, config: WallVLAConfig):
        super().__init__()
        expert = config.action_expert
        if expert._attn_implementation is None:
            expert._attn_implementation = config._attn_implementation
        self.config = expert
        # Heads, fp32 always: a velocity in bf16 has three digits
        self.action_in_proj = nn.Linear(2 * config.action_dim, expert.hidden_size, bias=False)
        self.action_time_mlp_in = nn.Linear(2 * expert.hidden_size, expert.hidden_size, bias=False)
        self.action_time_mlp_out = nn.Linear(expert.hidden_size, expert.hidden_size, bias=False)
        self.layers = nn.ModuleList(Qwen2DecoderLayer(expert, i) for i in range(expert.num_hidden_layers))
        self.norm = Qwen2RMSNorm(expert.hidden_size, eps=expert.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(expert)
        self.action_out_proj = nn.Linear(expert.hidden_size, config.action_dim, bias=False)

    def embed(self, noisy_actions: Tensor, time: Tensor, channel_mask: Tensor) -> Tensor:
        """Noisy chunk (B, H, D), time (B,) and used channels (B, 1, D) -> action tokens (B, H, E) float32."""
        with torch.autocast(noisy_actions.device.type, enabled=False):
            mask = channel_mask.expand_as(noisy_actions).to(noisy_actions.dtype)
            hidden = self.action_in_proj(torch.cat([noisy_actions, mask], dim=-1))  # (B, H, E)
            time_embedding = sinusoidal_embedding(time, self.config.hidden_size)  # (B, E)
            hidden = torch.cat([hidden, time_embedding[:, None].expand_as(hidden)], dim=-1)  # (B, H, 2E)
            return self.action_time_mlp_out(F.silu(self.action_time_mlp_in(hidden)))

    def forward(
        self,
        noisy_actions: Tensor,
        time: Tensor,
        context: PrefixContext,
        channel_mask: Tensor,
        step_mask: Tensor,
    ) -> Tensor:
        """Predicts the velocity (or the clean action) of a noisy chunk.

        Args:
            noisy_actions: (B, H, D) float32.
            time: flow times, (B,) float32.
            context: the prefix.
            channel_mask: channels that the robot has, (B, 1, D) bool.
            step_mask: steps that are not padding, (B, H) bool.

        Returns:
            (B, H, D) float32.
        """
        horizon, prefix_length = noisy_actions.shape[1], context.visible.shape[1]
        hidden = self.embed(noisy_actions, time, channel_mask).to(context.last_hidden_state.dtype)
        positions = context.next_position[:, None] + torch.arange(horizon, device=hidden.device)  # (B, H)
        rope = self.rotary_emb(hidden, positions)
        mask = action_attention_mask(context.visible, step_mask, self.config.action_attention == "causal")
        if self.config._attn_implementation == "eager":  # which adds its mask, where sdpa takes a boolean
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        for layer, keys, values in zip(self.layers, context.keys, context.values, strict=True):
            # Positional, because the checkpointing wrapper drops a keyword `past_key_values`
            hidden = layer(hidden, mask, None, PrefixReader(keys, values, prefix_length), position_embeddings=rope)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.action_out_proj(self.norm(hidden).float())


class ActionTokenConstraint(LogitsProcessor):
    """Leaves only the ids of the level whose turn it is: levels divide both the tokens of a chunk and the ids evenly.

    prompt_length: tokens before the first action token; the other arguments are fields of `WallVLAConfig`.
    """

    def __init__(self, prompt_length: int, start_id: int, num_tokens: int, levels: int, tokens_per_chunk: int):
        self.prompt_length, self.start_id = prompt_length, start_id
        self.ids_per_level, self.tokens_per_level = num_tokens // levels, tokens_per_chunk // levels

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        level = (input_ids.shape[1] - self.prompt_length) // self.tokens_per_level
        first = self.start_id + level * self.ids_per_level
        legal = torch.zeros_like(scores, dtype=torch.bool)
        legal[:, first : first + self.ids_per_level] = True
        return scores.masked_fill(~legal, float("-inf"))


class WallVLAPreTrainedModel(PreTrainedModel):
    """Loading, initialisation and the capabilities that the framework asks about."""

    config: WallVLAConfig
    base_model_prefix = "vlm"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # The chunk's mask is not a padding mask, which is all that flash attention would get
    _supports_flash_attn = False
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock", "Qwen2DecoderLayer"]
    _keep_in_fp32_modules_strict = [
        "action_in_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
        "action_out_proj",
        "state_proj",
    ]
    # The trainer averages the losses itself, over ranks and accumulated batches
    accepts_loss_kwargs = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **options) -> None:
        """As `PreTrainedModel.gradient_checkpointing_enable`; refuses `use_reentrant=True`."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "Reentrant activation checkpointing cuts the gradient of the shared keys and values: use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs) -> None:
        """As `PreTrainedModel.save_pretrained`, but under the names that the parameters have in this model.

        The framework's default are the names of Qwen's first release, which `Trainer` cannot resume from.
        """
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        """Refuses a checkpoint that does not match: nothing is ever silently random."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        problems = {
            "missing": sorted(loading_info.missing_keys),
            "unexpected": sorted(loading_info.unexpected_keys),
            "of another shape (name, checkpoint, model)": sorted(loading_info.mismatched_keys),
        }
        lines = [f"  {len(keys)} {kind}: {keys[:8]}" for kind, keys in problems.items() if keys]
        if lines:
            raise ValueError(
                "The checkpoint does not match this model:\n" + "\n".join(lines) + "\nEvery parameter must come from "
                "the checkpoint. Published weights of another layout need `wallvla convert` first."
            )


class WallVLAForConditionalGeneration(WallVLAPreTrainedModel):
    """A vision-language-action model: `forward` for training, `sample_actions` for robots, `generate` for text."""

    _tied_weights_keys = {"vlm.lm_head.weight": "vlm.model.language_model.embed_tokens.weight"}

    def __init__(self, config: WallVLAConfig):
        super().__init__(config)
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        self.action_expert = MoTActionExpert(config)
        if config.proprioception == "projected":
            self.state_proj = nn.Linear(2 * config.state_dim, config.vlm_config.text_config.hidden_size, bias=False)
        if config.norm_in_float32:
            for decoder, sizes in (
                (self.vlm.model.language_model, config.vlm_config.text_config),
                (self.action_expert, config.action_expert),
            ):
                norm_in_float32(decoder, sizes.hidden_size, sizes.rms_norm_eps)
            norms = ["input_layernorm", "post_attention_layernorm", "language_model.norm", "action_expert.norm"]
            self._keep_in_fp32_modules_strict = [*self._keep_in_fp32_modules_strict, *norms]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.lm_head

    def encode_prefix(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        domain_ids: Tensor | None = None,
        states: Tensor | None = None,
        state_mask: Tensor | None = None,
    ) -> PrefixContext:
        """Runs the prefix through the VL expert and keeps what an action expert reads.

        Args:
            input_ids: (B, S) int64.
            attention_mask: 0 on padding, (B, S).
            mm_token_type_ids: 1 on image tokens, (B, S). Found from `input_ids` when absent: without them the stock
                model silently falls back to positions of text.
            pixel_values: patches of all images, (patches, patch size).
            image_grid_thw: patch grid of each image, (images, 3).
            domain_ids: (B,) int64.
            states: normalised proprioception, (B, state_dim) float32; only with `proprioception` "projected".
            state_mask: channels that the robot's state has, (B, state_dim) bool.
        """
        model, text = self.vlm.model, self.vlm.model.language_model
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if mm_token_type_ids is None:
            mm_token_type_ids = (input_ids == self.vlm.config.image_token_id).int()

        hidden = self.get_input_embeddings()(input_ids)  # (B, S, C)
        if pixel_values is not None:
            images = torch.cat(model.get_image_features(pixel_values, image_grid_thw).pooler_output).to(hidden.dtype)
            image_mask, _ = model.get_placeholder_mask(input_ids, hidden, images)
            hidden = hidden.masked_scatter(image_mask, images)
        if self.config.proprioception == "projected":
            hidden = self._with_states(hidden, input_ids, states, state_mask)

        positions, _ = model.get_rope_index(
            input_ids, mm_token_type_ids, image_grid_thw=image_grid_thw, attention_mask=attention_mask
        )  # (3, B, S)
        rope = text.rotary_emb(hidden, positions)
        mask = create_causal_mask(
            config=text.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=None
        )
        taps = []
        for layer in text.layers:
            tap = KeyValueTap()
            # Positional, because the checkpointing wrapper drops a keyword `past_key_values`
            hidden = layer(hidden, mask, None, tap, position_embeddings=rope)
            taps.append(tap)

        # Nothing from the first discrete action token on, which includes the end of its turn
        visible = attention_mask.bool() & ~(self.is_action_token(input_ids).cumsum(dim=-1) > 0)
        next_position = torch.where(visible, positions.amax(dim=0), -1).amax(dim=-1) + 1
        return PrefixContext(
            keys=tuple(tap.keys for tap in taps),
            values=tuple(tap.values for tap in taps),
            last_hidden_state=text.norm(hidden),
            visible=visible,
            next_position=next_position,
            domain_ids=domain_ids,
        )

    def _with_states(
        self, hidden: Tensor, input_ids: Tensor, states: Tensor | None, state_mask: Tensor | None
    ) -> Tensor:
        """Puts the projected state on the token that stands for it. (B, S, C), the other arguments as above."""
        here = (input_ids == self.config.state_token_id)[..., None]  # (B, S, 1)
        if states is None:
            if here.any():
                raise ValueError(
                    'The prompt has a token for the state but there are no `states`: with proprioception "projected" '
                    "pass `states` (B, state_dim) and `state_mask`, as the processor makes them."
                )
            return hidden
        if state_mask is None:
            state_mask = torch.ones_like(states, dtype=torch.bool)
        with torch.autocast(hidden.device.type, enabled=False):
            embedded = self.state_proj(torch.cat([states.float(), state_mask.float()], dim=-1))  # (B, C)
        return torch.where(here, embedded[:, None].to(hidden.dtype), hidden)

    def is_action_token(self, token_ids: Tensor) -> Tensor:
        """True where an id is a discrete action token. Any shape, bool."""
        start, count = self.config.action_token_start_id, self.config.num_action_tokens
        if count == 0:
            return torch.zeros_like(token_ids, dtype=torch.bool)
        return (token_ids >= start) & (token_ids < start + count)

    def predict_velocity(
        self, noisy_actions: Tensor, time: Tensor, context: PrefixContext, channel_mask: Tensor, step_mask: Tensor
    ) -> Tensor:
        """The velocity of the flow at `noisy_actions` (B, H, D) and `time` (B,). (B, H, D) float32."""
        prediction = self.action_expert(noisy_actions, time, context, channel_mask, step_mask)
        if self.config.prediction == "action":
            return velocity_from_action(noisy_actions, prediction, time)
        return prediction

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        action_mask: Tensor | None = None,
        domain_ids: Tensor | None = None,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        action_padding: Tensor | None = None,
        states: Tensor | None = None,
        state_mask: Tensor | None = None,
        stop_gradient: bool = False,
    ) -> WallVLAOutput:
        """One training pass over action samples, multimodal samples or both in a batch.

        Args:
            input_ids, attention_mask, mm_token_type_ids, pixel_values, image_grid_thw, domain_ids, states, state_mask:
                see `encode_prefix`.
            labels: next-token targets, -100 on context, (B, S) int64.
            actions: normalised action chunks, (B, H, D) float32.
            action_mask: True on used channels of steps that are not padding, (B, H, D) bool; all False for a
                multimodal sample.
            noise: the noise of the path, (B, H, D) float32; drawn when absent.
            time: flow times, (B,) float32; drawn when absent.
            action_padding: clean value of channels that the robot lacks, (B, D) float32; 0 when absent.
            stop_gradient: keep the flow loss from reaching the VL expert (section 5.1); changes no value.
        """
        context = self.encode_prefix(
            input_ids,
            attention_mask,
            mm_token_type_ids,
            pixel_values,
            image_grid_thw,
            domain_ids,
            states,
            state_mask,
        )
        if labels is None and actions is None:
            return WallVLAOutput(logits=self.vlm.lm_head(context.last_hidden_state))

        output = WallVLAOutput(loss_counts=torch.zeros(3, device=input_ids.device))
        loss = torch.zeros((), device=input_ids.device)
        if labels is not None:
            loss = loss + self._token_losses(context.last_hidden_state, labels, output)
        else:
            # Keeps the output of the last VL layer in the graph: there a sharded layer gathers its weights for the
            # backward pass, which its keys and values alone would not make it do
            loss = loss + 0.0 * context.last_hidden_state.sum()
        if actions is not None:
            seen = context.detach() if stop_gradient else context
            loss = loss + self._flow_loss(seen, actions, action_mask, noise, time, action_padding, output)
        output.loss = loss
        return output

    def _token_losses(self, hidden: Tensor, labels: Tensor, output: WallVLAOutput) -> Tensor:
        """Fills the two cross-entropies of `output` and returns their weighted sum."""
        labelled = labels[:, 1:] != -100  # (B, S - 1)
        targets = labels[:, 1:][labelled]  # (tokens,)
        # Only labelled positions meet the vocabulary: at full size a batch of logits is larger than the model
        logits = self.vlm.lm_head(hidden[:, :-1][labelled]).float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        of_action = self.is_action_token(targets)
        counts = torch.stack([of_action.sum(), (~of_action).sum()])
        output.loss_counts[1:] = counts
        output.action_token_loss = torch.where(of_action, losses, 0.0).sum() / counts[0].clamp(min=1)
        output.text_loss = torch.where(of_action, 0.0, losses).sum() / counts[1].clamp(min=1)
        return (
            self.config.action_token_loss_weight * output.action_token_loss
            + self.config.text_loss_weight * output.text_loss
        )

    def _flow_loss(
        self,
        context: PrefixContext,
        actions: Tensor,
        action_mask: Tensor | None,
        noise: Tensor | None,
        time: Tensor | None,
        action_padding: Tensor | None,
        output: WallVLAOutput,
    ) -> Tensor:
        """Fills the flow loss and the recovered action of `output` and returns the loss."""
        config = self.config
        if action_mask is None:
            action_mask = torch.ones_like(actions, dtype=torch.bool)
        if noise is None:
            noise = torch.randn_like(actions)
        if time is None:
            time = sample_time(
                len(actions), config.time_sampler, config.time_alpha, config.time_scale, device=actions.device
            )
        channel_mask, step_mask = action_mask.any(dim=1, keepdim=True), action_mask.any(dim=2)
        # Whatever a dataset left in channels that the robot lacks, the network sees their padding there
        padding = torch.zeros_like(actions[:, 0]) if action_padding is None else action_padding  # (B, D)
        actions = torch.where(channel_mask, actions, padding[:, None])
        noisy_actions = interpolate(actions, noise, time)
        velocity = self.predict_velocity(noisy_actions, time, context, channel_mask, step_mask)
        output.action_prediction = action_from_velocity(noisy_actions, velocity, time)
        output.flow_loss = flow_matching_loss(
            velocity, actions, noise, time, action_mask, config.loss_space, config.loss_reduction
        )
        output.loss_counts[0] = action_mask.sum()
        return output.flow_loss

    @torch.no_grad()
    def sample_actions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        action_mask: Tensor | None = None,
        domain_ids: Tensor | None = None,
        noise: Tensor | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        action_padding: Tensor | None = None,
        states: Tensor | None = None,
        state_mask: Tensor | None = None,
        guidance: Callable[[Callable, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Samples an action chunk by Euler steps from noise. The prefix is computed once.

        Args:
            input_ids, attention_mask, mm_token_type_ids, pixel_values, image_grid_thw, domain_ids, states, state_mask:
                see `encode_prefix`.
            action_mask: True on the channels and steps that the robot has, (B, H, D) bool.
            noise: start of the flow, (B, H, D) float32; drawn when absent.
            num_inference_steps: Euler steps, `config.num_inference_steps` when absent.
            generator: source of the noise.
            action_padding: clean value of channels that the robot lacks, (B, D) float32; 0 when absent.
            guidance: bends the flow towards earlier actions, see "Real-time chunking" in `flow_matching_wallvla`.

        Returns:
            Normalised actions (B, H, D) float32, 0 where `action_mask` is False.
        """
        config, device = self.config, input_ids.device
        shape = (len(input_ids), config.action_horizon, config.action_dim)
        if noise is None:
            noise = torch.randn(shape, generator=generator, device=device)
        if noise.shape != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, but this model samples chunks of shape {shape}.")
        if action_mask is None:
            action_mask = torch.ones(shape, dtype=torch.bool, device=device)
        channel_mask, step_mask = action_mask.any(dim=1, keepdim=True), action_mask.any(dim=2)
        padding = torch.zeros_like(noise[:, 0]) if action_padding is None else action_padding  # (B, D)
        context = self.encode_prefix(
            input_ids,
            attention_mask,
            mm_token_type_ids,
            pixel_values,
            image_grid_thw,
            domain_ids,
            states,
            state_mask,
        )
        if guidance is None:  # which may differentiate, and static buffers are overwritten at every step
            context = context.with_room(config.action_horizon)

        def field(actions: Tensor, time: Tensor) -> Tensor:
            velocity = self.predict_velocity(actions, time.expand(shape[0]), context, channel_mask, step_mask)
            # Channels that the robot lacks go straight from noise to their padding, as they did in training
            return torch.where(channel_mask, velocity, padding[:, None] - noise)

        times = time_grid(num_inference_steps or config.num_inference_steps, config.time_scale, device)
        actions = noise
        for time, next_time in zip(times[:-1], times[1:], strict=True):
            velocity = field(actions, time) if guidance is None else guidance(field, actions, time)
            actions = euler_step(actions, velocity, time, next_time)
        return torch.where(action_mask, actions, 0.0)

    def generate(self, *args, **kwargs) -> Tensor:
        """Generates text with the VL expert; takes what `GenerationMixin.generate` takes."""
        return self.vlm.generate(*args, **kwargs)

    def generate_action_tokens(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        do_sample: bool = False,
    ) -> Tensor:
        """Generates one chunk of discrete action tokens: only legal ids of each level, exactly as many as a chunk has.

        Args:
            input_ids, attention_mask, mm_token_type_ids, pixel_values, image_grid_thw: see `encode_prefix`; what the
                processor makes of an observation.
            do_sample: draw from the distribution instead of taking the likeliest token.

        Returns:
            Token ids of the vocabulary, (B, action_tokens_per_chunk) int64, for `processor.decode_action_tokens`.

        Raises:
            ValueError: the model has no action tokens, or a codec whose chunks differ in length.
        """
        config = self.config
        if not config.num_action_tokens or config.action_tokens_per_chunk is None:
            raise ValueError(
                f"Found num_action_tokens {config.num_action_tokens} and action_tokens_per_chunk "
                f"{config.action_tokens_per_chunk}. Constrained decoding needs a codec with a fixed number of tokens."
            )
        constraint = ActionTokenConstraint(
            input_ids.shape[1],
            config.action_token_start_id,
            config.num_action_tokens,
            config.action_token_levels,
            config.action_tokens_per_chunk,
        )
        inputs = {
            "attention_mask": attention_mask,
            "mm_token_type_ids": mm_token_type_ids,
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
        }
        ids = self.vlm.generate(
            input_ids=input_ids,
            **{name: value for name, value in inputs.items() if value is not None},
            logits_processor=LogitsProcessorList([constraint]),
            max_new_tokens=config.action_tokens_per_chunk,
            do_sample=do_sample,
        )
        return ids[:, input_ids.shape[1] :]


# Names the code that `save_pretrained` copies beside the weights; registers nothing
WallVLAConfig.register_for_auto_class()
WallVLAForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["WallVLAForConditionalGeneration", "WallVLAOutput", "WallVLAPreTrainedModel"]
