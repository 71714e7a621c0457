"""Action experts: what turns a noisy action chunk and a prefix into a prediction. One contract, three kinds.

    expert(noisy_actions (B, H, D), time (B,), context, channel_mask (B, 1, D), step_mask (B, H)) -> (B, H, D) float32

`mot` shares the attention of every VL layer (Wall-OSS-0.5, the MoT testbed), `soft_prompt` reads the states of an
encoder beside prompts and projections of each domain (X-VLA), `dit` joins the last hidden states and the chunk in one
AdaLN sequence (Qwen-VLA). Nothing outside this file and the configuration knows which one a model has.

Shapes: B samples, S prefix tokens, A auxiliary tokens, H action steps, D action channels, C width of the VL expert,
E width of the action expert, N heads, P width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from .configuration_wallvla import WallVLAConfig
from .ops_wallvla import action_attention_mask, multimodal_rope, rope, sinusoidal_embedding
from .vl_experts_wallvla import PrefixContext


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


# --------------------------------------------------------------------------------------------------------------------
# Parameters of domains
# --------------------------------------------------------------------------------------------------------------------


class PerDomain(nn.Module):
    """Parameters with one row for each domain, or one row that all domains share.

    Args:
        domains: number of rows; `None` for the shared one.
        shapes: of one row of each parameter, by name.
    """

    def __init__(self, domains: int | None, **shapes: tuple[int, ...]):
        super().__init__()
        self.is_shared = domains is None
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(domains or 1, *shape)))

    def rows(self, table: Tensor, domain_ids: Tensor | None, batch: int) -> Tensor:
        """The row of each sample: (B, ...)."""
        if self.is_shared:
            return table.expand(batch, *table.shape[1:])
        if domain_ids is None:
            raise ValueError(
                "Found no `domain_ids`, and the action expert has parameters for each domain. Pass the batch as the "
                "processor makes it: each embodiment has a `domain`."
            )
        return table[domain_ids]

    def add_row(self, source: int | None, std: float, generator: torch.Generator | None) -> None:
        """Appends a domain: a copy of row `source`, the mean of all rows, or, with `std` above 0, random numbers."""
        for name, table in self.named_parameters(recurse=False):
            row = table.detach().mean(dim=0) if source is None else table.detach()[source]
            if std:
                noise = torch.empty(row.shape).normal_(std=0.0 if name == "bias" else std, generator=generator)
                row = noise.to(table)
            setattr(self, name, nn.Parameter(torch.cat([table.detach(), row[None]]), table.requires_grad))


class DomainLinear(PerDomain):
    """A linear layer for each domain (X-VLA, section 3.3): `x @ weight[domain] + bias[domain]`."""

    def __init__(self, domains: int | None, inputs: int, outputs: int):
        super().__init__(domains, weight=(inputs, outputs), bias=(outputs,))

    def forward(self, states: Tensor, domain_ids: Tensor | None) -> Tensor:
        """(B, T, inputs), (B,) -> (B, T, outputs)."""
        if self.is_shared:
            return states @ self.weight[0] + self.bias[0]
        weight, bias = (self.rows(each, domain_ids, len(states)) for each in (self.weight, self.bias))
        return torch.baddbmm(bias[:, None], states, weight)


class DomainTokens(PerDomain):
    """Learned tokens for each domain: soft prompts, and the queries of a resampler."""

    def __init__(self, domains: int | None, tokens: int, width: int):
        super().__init__(domains, tokens=(tokens, width))

    def forward(self, domain_ids: Tensor | None, batch: int) -> Tensor:
        """(B,) -> (B, tokens, E)."""
        return self.rows(self.tokens, domain_ids, batch)


class ActionExpert(nn.Module):
    """What the three kinds have in common beside the contract at the top of this file."""

    def for_sampling(self, context: PrefixContext, horizon: int) -> PrefixContext:
        """The context with whatever every step of sampling shares. Nothing, unless a kind says otherwise."""
        return context


# --------------------------------------------------------------------------------------------------------------------
# MoT
# --------------------------------------------------------------------------------------------------------------------


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


# The layers that can share attention with those of a VLM, by the `model_type` of its text model
MOT_LAYERS = {
    "qwen2_5_vl_text": Qwen2DecoderLayer,
    "qwen2": Qwen2DecoderLayer,
    "qwen3": Qwen3DecoderLayer,
    "qwen3_vl_text": Qwen3DecoderLayer,
}


class MoTActionExpert(ActionExpert):
    """The action expert of Wall-OSS-0.5: a narrow transformer as deep as the VL expert, sharing its attention.

    With proprioception "expert" the chunk is led by one token of [state ; which channels exist] (the MoT testbed,
    section III-A: state and action are tokens of the action expert).
    """

    fp32_modules = ("action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj", "state_in_proj")

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
        self.state_in_proj = None
        if config.proprioception == "expert":
            self.state_in_proj = nn.Linear(2 * config.state_dim, expert.hidden_size, bias=False)
        layer = MOT_LAYERS[type(config.vlm_config.text_config).model_type]
        self.layers = nn.ModuleList(layer(expert, i) for i in range(expert.num_hidden_layers))
        self.norm = Qwen2RMSNorm(expert.hidden_size, eps=expert.rms_norm_eps)
        if config.norm_in_float32:
            norm_in_float32(self, expert.hidden_size, expert.rms_norm_eps)
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
        hidden = self.embed(noisy_actions, time, channel_mask)
        if self.state_in_proj is not None:
            hidden = torch.cat([embed_state(self.state_in_proj, context), hidden], dim=1)
            step_mask = F.pad(step_mask, (1, 0), value=True)
        hidden = hidden.to(context.last_hidden_state.dtype)  # (B, T, E), T is H or H + 1
        positions = context.next_position[:, None] + torch.arange(hidden.shape[1], device=hidden.device)  # (B, T)
        rope = self.rotary_emb(hidden, positions)
        mask = action_attention_mask(context.visible, step_mask, self.config.action_attention == "causal")
        if self.config._attn_implementation == "eager":  # which adds its mask, where sdpa takes a boolean
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        for layer, keys, values in zip(self.layers, context.keys, context.values, strict=True):
            # Positional, because the checkpointing wrapper drops a keyword `past_key_values`
            hidden = layer(hidden, mask, None, PrefixReader(keys, values, prefix_length), position_embeddings=rope)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.action_out_proj(self.norm(hidden[:, -horizon:]).float())

    def for_sampling(self, context: PrefixContext, horizon: int) -> PrefixContext:
        """Room for the keys and values of a chunk, which every step of sampling overwrites."""
        return context.with_room(self.sequence_length(0, horizon))

    def sequence_length(self, prefix: int, horizon: int) -> int:
        """How many tokens of a row go through the layers, for prefixes of so many tokens (auxiliary ones among
        them)."""
        return horizon + (self.state_in_proj is not None)


def embed_state(layer: nn.Linear, context: PrefixContext) -> Tensor:
    """The state token (B, 1, E) float32 of a layer that reads [state ; which channels exist]."""
    if context.states is None:
        raise ValueError(
            'Found no `states`: with proprioception "expert" pass `states` (B, state_dim) and `state_mask`, as the '
            "processor makes them."
        )
    mask = torch.ones_like(context.states) if context.state_mask is None else context.state_mask
    with torch.autocast(context.states.device.type, enabled=False):
        return layer(torch.cat([context.states.float(), mask.float()], dim=-1))[:, None]


# --------------------------------------------------------------------------------------------------------------------
# Soft prompts
# --------------------------------------------------------------------------------------------------------------------


class SoftPromptLayer(GradientCheckpointingLayer):
    """A pre-norm encoder layer: full attention and a GELU network, with dropout on both."""

    def __init__(self, width: int, intermediate: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, intermediate)
        self.fc2 = nn.Linear(intermediate, width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, T, E), keys that may be read (B, 1, 1, T) bool -> (B, T, E)."""
        dropout = self.dropout if self.training else 0.0
        queries, keys, values = self.qkv(self.norm1(hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(queries, keys, values, mask, dropout_p=dropout)  # (B, N, T, P)
        hidden = hidden + F.dropout(self.proj(read.transpose(1, 2).flatten(2)), dropout)
        inner = F.dropout(F.gelu(self.fc1(self.norm2(hidden)), approximate="tanh"), dropout)
        return hidden + F.dropout(self.fc2(inner), dropout)


class DomainResampler(nn.Module):
    """Observations of any domain in one space: learned queries of the domain read them through its own projections
    (X-VLA, appendix I, "HPT-style methods")."""

    def __init__(self, domains: int, tokens: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.queries = DomainTokens(domains, tokens, width)
        self.keys_values = DomainLinear(domains, width, 2 * width)
        self.output = DomainLinear(domains, width, width)

    def forward(self, observation: Tensor, visible: Tensor, domain_ids: Tensor | None) -> Tensor:
        """(B, S + A, E), tokens that may be read (B, S + A) bool, (B,) -> (B, tokens, E)."""
        queries = self.queries(domain_ids, len(observation)).to(observation.dtype)
        pairs = self.keys_values(observation.float(), domain_ids).to(observation.dtype)
        heads = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (queries, *pairs.chunk(2, dim=-1)))
        read = F.scaled_dot_product_attention(*heads, visible[:, None, None]).transpose(1, 2).flatten(2)
        return self.output(read.float(), domain_ids).to(observation.dtype)


class SoftPromptActionExpert(ActionExpert):
    """X-VLA's transformer (section 3.3, figure 10): [action tokens ; VLM states ; auxiliary views ; soft prompts].

    An action token is a projection of [noisy action ; state ; noise level], one projection for each domain, and so is
    the output. Attention goes both ways and, as published, also to the features of a view that is missing.
    """

    fp32_modules = ("action_encoder", "action_decoder", "soft_prompts", "resampler")

    def __init__(self, config: WallVLAConfig):
        super().__init__()
        expert, width, domains = config.action_expert, config.action_expert.hidden_size, max(1, len(config.domains))
        self.config = expert
        self.state_dim, self.binary_channels = config.state_dim, list(config.binary_channels)
        # 0 on channels that hold a decision; filled by `init_expert_weights`, since it is in no checkpoint
        self.register_buffer("continuous", torch.ones(config.action_dim), persistent=False)
        self.action_encoder = DomainLinear(domains, config.action_dim + config.state_dim + expert.time_dim, width)
        self.action_decoder = DomainLinear(domains, width, config.action_dim)
        seen = config.vlm_config.text_config.hidden_size
        self.vlm_proj = nn.Linear(seen, width)
        # Rows of one layout are those with auxiliary views
        self.auxiliary_proj = None if config.language_tokens is None else nn.Linear(seen, width)
        self.position_embedding = nn.Embedding(expert.max_position_embeddings, width)
        self.soft_prompts = self.resampler = None
        if expert.conditioning == "soft_prompt":
            self.soft_prompts = DomainTokens(domains, expert.num_soft_prompts, width)
        elif expert.conditioning == "hpt":
            self.resampler = DomainResampler(domains, expert.num_soft_prompts, width, expert.num_attention_heads)
        self.layers = nn.ModuleList(
            SoftPromptLayer(width, expert.intermediate_size, expert.num_attention_heads, expert.dropout)
            for _ in range(expert.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width)

    def embed(self, noisy_actions: Tensor, time: Tensor, context: PrefixContext) -> Tensor:
        """Noisy chunk (B, H, D) and time (B,) -> action tokens (B, H, E) float32."""
        with torch.autocast(noisy_actions.device.type, enabled=False):
            noisy_actions = noisy_actions * self.continuous
            states = noisy_actions.new_zeros(len(noisy_actions), self.state_dim)
            if context.states is not None:
                states = context.states.float()
            if self.binary_channels:  # then state and action have the same channels
                states = states * self.continuous
            level = fourier_embedding(1 - time, self.config.time_dim, self.config.max_time_period)  # (B, time_dim)
            rows = [each[:, None].expand(-1, noisy_actions.shape[1], -1) for each in (states, level)]
            return self.action_encoder(torch.cat([noisy_actions, *rows], dim=-1), context.domain_ids)

    def forward(
        self, noisy_actions: Tensor, time: Tensor, context: PrefixContext, channel_mask: Tensor, step_mask: Tensor
    ) -> Tensor:
        """Predicts the clean chunk, as `MoTActionExpert.forward`; channels that hold a decision are logits."""
        horizon, dtype = noisy_actions.shape[1], context.last_hidden_state.dtype
        hidden = self.embed(noisy_actions, time, context).to(dtype)
        seen = self.vlm_proj(context.last_hidden_state)
        if self.auxiliary_proj is not None:
            seen = torch.cat([seen, self.auxiliary_proj(context.auxiliary)], dim=1)
        visible = F.pad(context.visible, (0, seen.shape[1] - context.visible.shape[1]), value=True)
        if self.resampler is not None:
            seen = self.resampler(seen, visible, context.domain_ids)
            visible = context.visible.new_ones(seen.shape[:2])
        readable = torch.cat([step_mask, visible], dim=1)
        hidden = torch.cat([hidden, seen], dim=1)
        # Padding on the left must not move the prefix
        places = torch.cat([torch.ones_like(step_mask), visible], dim=1).cumsum(dim=1) - 1
        room = self.config.max_position_embeddings
        if places.shape[1] > room and places.max() >= room:
            raise ValueError(
                f"{horizon} steps and what the model sees are {places.max() + 1} tokens, and the action expert has "
                f"positions for {room}: show fewer or smaller images, or build it with max_position_embeddings."
            )
        hidden = hidden + self.position_embedding(places.clamp(min=0)).to(dtype)
        if self.soft_prompts is not None:
            prompts = self.soft_prompts(context.domain_ids, len(hidden)).to(dtype)
            hidden = torch.cat([hidden, prompts], dim=1)  # without positions
        mask = F.pad(readable, (0, hidden.shape[1] - readable.shape[1]), value=True)[:, None, None]  # (B, 1, 1, T)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        hidden = self.norm(hidden[:, :horizon])
        with torch.autocast(hidden.device.type, enabled=False):
            return self.action_decoder(hidden.float(), context.domain_ids)

    def sequence_length(self, prefix: int, horizon: int) -> int:
        """See `MoTActionExpert.sequence_length`."""
        seen = prefix if self.resampler is None else self.config.num_soft_prompts
        return horizon + seen + (0 if self.soft_prompts is None else self.config.num_soft_prompts)


def fourier_embedding(values: Tensor, dim: int, max_period: float) -> Tensor:
    """`[cos(t w_i), sin(t w_i)]` with `w_i = max_period ** (-i / (dim / 2))` (DiT). (B,) -> (B, dim) float32."""
    exponent = torch.arange(dim // 2, device=values.device, dtype=torch.float32) / (dim // 2)
    angles = values.float()[:, None] * max_period**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# DiT
# --------------------------------------------------------------------------------------------------------------------


def modulate(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then `x (1 + scale) + shift`: (B, T, E), (B, E), (B, E)."""
    normed = F.layer_norm(hidden, hidden.shape[-1:])
    return normed * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Linear):
    """Shifts, scales and gates of a layer from the time. Zero at first: a block is the identity (adaLN-Zero)."""

    def __init__(self, width: int, outputs: int):
        super().__init__(width, outputs * width)
        self.outputs = outputs

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, E) -> as many of (B, E)."""
        return super().forward(condition).chunk(self.outputs, dim=-1)


class DiTLayer(GradientCheckpointingLayer):
    """A single-stream DiT block: full attention with rope and a SwiGLU, each shifted, scaled and gated by the time."""

    def __init__(self, width: int, intermediate: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(width, 6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, hidden: Tensor, condition: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, E), condition (B, E), keys that may be read (B, 1, 1, T) bool, cos, sin (B, T, P) -> (B, T, E)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        pieces = self.qkv(modulate(hidden, shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = pieces.permute(2, 0, 3, 1, 4)  # (B, N, T, P)
        read = F.scaled_dot_product_attention(rope(queries, cos, sin), rope(keys, cos, sin), values, mask)
        hidden = hidden + gate1[:, None] * self.proj(read.transpose(1, 2).flatten(2))
        inner = modulate(hidden, shift2, scale2)
        return hidden + gate2[:, None] * self.down_proj(F.silu(self.gate_proj(inner)) * self.up_proj(inner))


class DiTActionExpert(ActionExpert):
    """Qwen-VLA's decoder (section 2.2): [VLM states ; chunk] in one sequence, its rope going on where the VLM's ended.

    What the paper leaves open is in `DiTExpertConfig`. With proprioception "expert" a token of the state comes first
    in the chunk.
    """

    fp32_modules = ("action_in", "action_out", "time_mlp", "state_in_proj")

    def __init__(self, config: WallVLAConfig):
        super().__init__()
        expert, width = config.action_expert, config.action_expert.hidden_size
        self.config = expert
        domains = max(1, len(config.domains))
        outer = None if expert.action_projection == "shared" else domains
        inner = domains if expert.action_projection == "per_domain" else None
        self.action_in = nn.ModuleList(
            [DomainLinear(outer, config.action_dim, width), DomainLinear(inner, width, width)]
        )
        self.action_out = nn.ModuleList(
            [DomainLinear(inner, width, width), DomainLinear(outer, width, config.action_dim)]
        )
        self.time_mlp = nn.Sequential(nn.Linear(expert.time_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.vlm_proj = nn.Linear(config.vlm_config.text_config.hidden_size, width, bias=False)
        self.state_in_proj = None
        if config.proprioception == "expert":
            self.state_in_proj = nn.Linear(2 * config.state_dim, width, bias=False)
        self.layers = nn.ModuleList(
            DiTLayer(width, expert.intermediate_size, expert.num_attention_heads)
            for _ in range(expert.num_hidden_layers)
        )
        self.out_modulation = Modulation(width, 2)

    def forward(
        self, noisy_actions: Tensor, time: Tensor, context: PrefixContext, channel_mask: Tensor, step_mask: Tensor
    ) -> Tensor:
        """Predicts the velocity (or the clean action), as `MoTActionExpert.forward`."""
        horizon, dtype, domains = noisy_actions.shape[1], context.last_hidden_state.dtype, context.domain_ids
        with torch.autocast(noisy_actions.device.type, enabled=False):
            chunk = self.action_in[1](F.silu(self.action_in[0](noisy_actions, domains)), domains)  # (B, H, E)
            condition = F.silu(self.time_mlp(sinusoidal_embedding(1000 * time, self.config.time_dim)))  # (B, E)
        if self.state_in_proj is not None:
            chunk = torch.cat([embed_state(self.state_in_proj, context), chunk], dim=1)
        hidden = torch.cat([self.vlm_proj(context.last_hidden_state), chunk.to(dtype)], dim=1)  # (B, T, E)
        condition = condition.to(dtype)
        places = context.next_position[:, None] + torch.arange(chunk.shape[1], device=chunk.device)
        positions = torch.cat([context.positions, places.expand(3, -1, -1)], dim=-1)  # (3, B, T)
        cos, sin = multimodal_rope(positions, self.config.mrope_section, self.config.rope_theta)
        readable = F.pad(step_mask, (chunk.shape[1] - horizon, 0), value=True)
        mask = torch.cat([context.visible, readable], dim=1)[:, None, None]  # (B, 1, 1, T)
        for layer in self.layers:
            hidden = layer(hidden, condition, mask, cos, sin)
        shift, scale = self.out_modulation(condition)
        hidden = modulate(hidden[:, -horizon:], shift, scale)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.action_out[1](F.silu(self.action_out[0](hidden.float(), domains)), domains)

    def sequence_length(self, prefix: int, horizon: int) -> int:
        """See `MoTActionExpert.sequence_length`."""
        return prefix + horizon + (self.state_in_proj is not None)


ACTION_EXPERTS = {"mot": MoTActionExpert, "soft_prompt": SoftPromptActionExpert, "dit": DiTActionExpert}


def init_expert_weights(module: nn.Module, std: float) -> None:
    """Of the modules above that the framework does not know.

    It asks for modules with parameters or buffers of their own only, since this is custom code.
    """
    if isinstance(module, PerDomain):
        for name, parameter in module.named_parameters(recurse=False):
            init.zeros_(parameter) if name == "bias" else init.normal_(parameter, std=std)
    elif isinstance(module, Modulation):
        init.zeros_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, SoftPromptActionExpert):
        channels = torch.ones_like(module.continuous)
        channels[module.binary_channels] = 0
        init.copy_(module.continuous, channels)
