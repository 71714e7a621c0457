"""WallVLA: a Hugging Face VLM (the VL expert) and an action expert that reads what the VLM made of a prefix.

The prefix (images, text, proprioception, discrete action tokens) runs through the stock layers of the VLM
(`vl_experts_wallvla`). The action expert (`action_experts_wallvla`) turns a noisy action chunk into a prediction. The
prefix never sees an action chunk, so it is computed once, in training as in inference, and the two experts stay
separate modules with one thing between them: `PrefixContext`.

Shapes: B samples, S prefix tokens (left padded), H action steps, D action channels, C width of the VL expert.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.utils import ModelOutput

from .action_experts_wallvla import ACTION_EXPERTS, DomainTokens, PerDomain, init_expert_weights, norm_in_float32
from .configuration_wallvla import WallVLAConfig
from .flow_matching_wallvla import (
    action_from_velocity,
    action_loss,
    euler_step,
    flow_matching_loss,
    interpolate,
    loss_count,
    number_of_steps,
    sample_time,
    time_grid,
    velocity_from_action,
)
from .vl_experts_wallvla import VL_EXPERTS, PrefixContext


@dataclass
class WallVLAOutput(ModelOutput):
    """What `forward` returns.

    loss: the weighted sum of the losses that the batch has (equation 1), scalar.
    flow_loss, action_token_loss, text_loss: each the mean over its own elements or tokens, scalars. `None` when the
        batch has no such input at all, 0 when it has the input but no element of the kind.
    loss_counts: how many elements (samples, with a mean per channel) each mean was taken over, (3,) float32 in the
        order above. A trainer needs them to average over ranks and accumulated batches.
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
    # The trainer averages the losses itself, over ranks and accumulated batches
    accepts_loss_kwargs = False

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_expert_weights(module, self.config.initializer_range)

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

    def __init__(self, config: WallVLAConfig):
        super().__init__(config)
        self.vl_expert = VL_EXPERTS[config.vlm_config.model_type](config.vlm_config, config.language_tokens)
        self.vlm = self.vl_expert.build()
        self.action_expert = ACTION_EXPERTS[config.action_expert.kind](config)
        self._keep_in_fp32_modules_strict = [*self.action_expert.fp32_modules, "state_proj"]
        if config.proprioception == "projected":
            self.state_proj = nn.Linear(2 * config.state_dim, config.vlm_config.text_config.hidden_size, bias=False)
        if config.norm_in_float32:
            text = config.vlm_config.text_config
            norm_in_float32(self.vl_expert.decoder(self.vlm), text.hidden_size, text.rms_norm_eps)
            norms = ["input_layernorm", "post_attention_layernorm", "language_model.norm", "action_expert.norm"]
            self._keep_in_fp32_modules_strict += norms
        self._no_split_modules = [type(self.action_expert.layers[0]).__name__]  # the VLM adds its own
        self.post_init()
        # FSDP refuses names that are not there, such as those of a decoder that is left out
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_output_embeddings(value)

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
            mm_token_type_ids: 1 on image tokens, (B, S). Found from `input_ids` when absent.
            pixel_values: all images of the batch, as the VLM's processor makes them: (patches, patch size), or
                (images, 3, height, width) where all have one size.
            image_grid_thw: patch grid of each image, (images, 3), for VLMs that take images of any size.
            domain_ids: (B,) int64.
            states: normalised proprioception, (B, state_dim) float32; with `proprioception` "projected" or "expert".
            state_mask: channels that the robot's state has, (B, state_dim) bool.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        is_image = input_ids == self.vlm.config.image_token_id
        if mm_token_type_ids is not None:
            is_image = mm_token_type_ids == 1
        # An image token need not be in the vocabulary (Florence-2): its row is overwritten
        hidden = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # (B, S, C)
        if self.config.proprioception == "projected":
            hidden = self._with_states(hidden, input_ids, states, state_mask)
        prefix = self.vl_expert.encode(
            self.vlm, hidden, input_ids, attention_mask, is_image, pixel_values, image_grid_thw
        )
        # Nothing from the first discrete action token on, which includes the end of its turn
        visible = attention_mask.bool() & ~(self.is_action_token(input_ids).cumsum(dim=-1) > 0)
        visible = visible[:, : prefix.last_hidden_state.shape[1]]
        return PrefixContext(
            keys=prefix.keys,
            values=prefix.values,
            last_hidden_state=prefix.last_hidden_state,
            visible=visible,
            positions=prefix.positions,
            next_position=torch.where(visible, prefix.positions.amax(dim=0), -1).amax(dim=-1) + 1,
            auxiliary=prefix.auxiliary,
            domain_ids=domain_ids,
            states=states,
            state_mask=state_mask,
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

    def predict_action(
        self, noisy_actions: Tensor, time: Tensor, context: PrefixContext, channel_mask: Tensor, step_mask: Tensor
    ) -> Tensor:
        """The clean action that the expert sees in `noisy_actions` (B, H, D) at `time` (B,). (B, H, D) float32."""
        prediction = self.action_expert(noisy_actions, time, context, channel_mask, step_mask)
        return self._clean_action(prediction, noisy_actions, time)

    def _clean_action(self, prediction: Tensor, noisy_actions: Tensor, time: Tensor) -> Tensor:
        """What a prediction of the expert says of the clean action. (B, H, D)."""
        if self.config.prediction == "velocity":
            return action_from_velocity(noisy_actions, prediction, time)
        if not self.config.binary_channels:
            return prediction
        channels = torch.arange(prediction.shape[-1], device=prediction.device)
        is_binary = sum(channels == each for each in self.config.binary_channels).bool()
        return torch.where(is_binary, prediction.sigmoid(), prediction)

    def predict_velocity(
        self, noisy_actions: Tensor, time: Tensor, context: PrefixContext, channel_mask: Tensor, step_mask: Tensor
    ) -> Tensor:
        """The velocity of the flow at `noisy_actions` (B, H, D) and `time` (B,) < 1. (B, H, D) float32."""
        prediction = self.action_expert(noisy_actions, time, context, channel_mask, step_mask)
        if self.config.prediction == "velocity":
            return prediction
        return velocity_from_action(noisy_actions, self._clean_action(prediction, noisy_actions, time), time)

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
            return WallVLAOutput(logits=self.vl_expert.lm_head(self.vlm)(context.last_hidden_state))

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
        logits = self.vl_expert.lm_head(self.vlm)(hidden[:, :-1][labelled]).float()
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
        prediction = self.action_expert(noisy_actions, time, context, channel_mask, step_mask)
        output.action_prediction = self._clean_action(prediction, noisy_actions, time)
        reduction, weights = config.loss_reduction, config.loss_channel_weights
        if config.prediction == "velocity":
            output.flow_loss = flow_matching_loss(
                prediction, actions, noise, time, action_mask, config.loss_space, reduction, weights
            )
        else:
            output.flow_loss = action_loss(
                prediction, actions, action_mask, reduction, weights, config.binary_channels
            )
        output.loss_counts[0] = loss_count(action_mask, reduction)
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
        """Samples an action chunk from noise, by the steps of `config.sampler`. The prefix is computed once.

        Args:
            input_ids, attention_mask, mm_token_type_ids, pixel_values, image_grid_thw, domain_ids, states, state_mask:
                see `encode_prefix`.
            action_mask: True on the channels and steps that the robot has, (B, H, D) bool.
            noise: start of the flow, (B, H, D) float32; drawn when absent.
            num_inference_steps: steps, `config.num_inference_steps` when absent.
            generator: source of the noise.
            action_padding: clean value of channels that the robot lacks, (B, D) float32; 0 when absent.
            guidance: bends the flow towards earlier actions, see "Real-time chunking" in `flow_matching_wallvla`.

        Returns:
            Normalised actions (B, H, D) float32, 0 where `action_mask` is False.

        Raises:
            ValueError: noise of another shape, or fewer than one step.
        """
        config, device = self.config, input_ids.device
        times = time_grid(number_of_steps(num_inference_steps, config.num_inference_steps), config.time_scale, device)
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
            context = self.action_expert.for_sampling(context, config.action_horizon)

        def field(actions: Tensor, time: Tensor) -> Tensor:
            velocity = self.predict_velocity(actions, time.expand(shape[0]), context, channel_mask, step_mask)
            # Channels that the robot lacks go straight from noise to their padding, as they did in training
            return torch.where(channel_mask, velocity, padding[:, None] - noise)

        actions = noise
        for time, next_time in zip(times[:-1], times[1:], strict=True):
            velocity = field(actions, time) if guidance is None else guidance(field, actions, time)
            if config.sampler == "euler":
                actions = euler_step(actions, velocity, time, next_time)
            else:  # the predicted action, back on the path from the same noise
                actions = interpolate(action_from_velocity(actions, velocity, time), noise, next_time)
        return torch.where(action_mask, actions, 0.0)

    def add_domain(self, name: str, init: str = "mean", generator: torch.Generator | None = None) -> int:
        """Gives a trained model the parameters of one more domain (X-VLA, section 4.2.2).

        Args:
            name: of the domain.
            init: `"mean"` of all domains, `"copy:<name>"` of one of them, or `"random"`.
            generator: source of the random numbers.

        Returns:
            Its id, for `Embodiment.domain`.

        Raises:
            ValueError: a name that is there already, an unknown `init`, or a model without parameters of domains.
        """
        domains, kind, source = list(self.config.domains), *init.partition(":")[::2]
        tables = [each for each in self.modules() if isinstance(each, PerDomain) and not each.is_shared]
        if not tables or not domains:
            raise ValueError("Found no parameters of domains in this model: its action expert has one set for all.")
        if name in domains:
            raise ValueError(f"There is a domain {name!r} already; the model has {domains}. Use another name.")
        if kind not in ("mean", "copy", "random") or (kind == "copy") != (source in domains):
            raise ValueError(f'Found init {init!r}: use "mean", "random" or "copy:" and one of {domains}.')
        for table in tables:
            row = domains.index(source) if kind == "copy" else None
            table.add_row(row, self.config.initializer_range if kind == "random" else 0.0, generator)
        self.config.domains = [*domains, name]
        return len(domains)

    def domain_tokens(self) -> dict[str, np.ndarray]:
        """The learned tokens of each domain by its name, (tokens, width) float32.

        Raises:
            ValueError: domains of this model have no tokens.
        """
        tables = [each.tokens for each in self.modules() if isinstance(each, DomainTokens) and not each.is_shared]
        if not tables or not self.config.domains:
            raise ValueError("Found no learned tokens of domains in this model: its action expert has none.")
        rows = torch.cat([table.detach().float() for table in tables], dim=1).cpu().numpy()
        return dict(zip(self.config.domains, rows, strict=True))

    def generate(self, *args, **kwargs) -> Tensor:
        """Generates text with the VL expert; takes what `GenerationMixin.generate` takes."""
        self.vl_expert.lm_head(self.vlm)
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
