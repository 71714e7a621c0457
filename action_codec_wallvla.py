"""The vision-aligned RVQ action tokenizer (Wall-OSS-0.5, section 2.1.2): action chunks to discrete tokens and back.

    encoder     latents are a linear image of the chunk, plus what their learned queries find by cross-attention to all
                steps, the robot's state and its embodiment
    quantiser   each latent becomes a sum of codes, one per level: coarse motion first, corrections after it
    decoder     the linear image back, plus what one query per step, for any number of steps, finds by
                cross-attention to the quantised latents and the state

The corrections start at zero: an untrained codec is a product quantiser of the motion, and training improves on it.

Chunks are the processor's normalised actions: displacements in the robot's reference frame, within [-1, 1]. The
quantiser is our own, because code that the Hub ships beside weights must load without further packages.

Shapes: B samples, H action steps, D action channels, S state channels, T latent steps, R grid steps per latent,
M = T * R * D numbers of a chunk on the grid, L levels, K codes of a level, C width of a code, W width of the networks,
F width of the vision features.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import ModelOutput


# Normalised actions and states lie within 1; what lies far beyond is a damaged value that must not overflow
LARGEST_INPUT = 10.0


@strict
class WallVLAActionCodecConfig(PreTrainedConfig):
    r"""
    action_dim, state_dim (`int`, *optional*, default to 26):
        Channels D of an action and S of a state: the canonical layout, or as many as a `native` robot has.
    num_domains (`int`, *optional*, defaults to 32):
        Embodiments that can be told apart: `domain_ids` lie below it.
    hidden_size, num_layers, num_heads (`int`, *optional*, default to 256, 2, 4):
        Width W and depth of the encoder and of the decoder, and their attention heads.
    latent_steps, num_levels, codebook_size, code_dim (`int`, *optional*, default to 8, 4, 1024, 128):
        T, L, K and C: a chunk is T * L tokens out of L * K. With C of at least R times the channels that a robot
        uses, the linear path loses nothing but what the codes round off.
    steps_per_latent (`int`, *optional*, defaults to 4):
        R: the linear path sees a chunk on a grid of T * R steps, exactly so when it has that many.
    feature_dim (`int`, *optional*, defaults to 2048):
        Width F of the pooled vision features. 0 leaves the two visual objectives out.
    alignment (`str`, *optional*, defaults to `"contrastive"`):
        `"contrastive"`: a chunk finds its frame among those of the batch and the other way round.
        `"regression"`: cosine distance between the projected latents and the features.
    temperature (`float`, *optional*, defaults to 0.1):
        Of the contrastive objective.
    reconstruction_weight, alignment_weight, next_frame_weight, dct_weight, commitment_weight (`float`, *optional*):
        Weights of the losses. An alignment or next-frame weight needs `feature_dim`.
    dct_slope (`float`, *optional*, defaults to 4.0):
        The weight of DCT coefficient k of H is 1 + dct_slope * k / (H - 1): errors at high frequencies are jitter.
    ema_decay (`float`, *optional*, defaults to 0.95):
        Of the codebooks.
    dead_code_share (`float`, *optional*, defaults to 0.1):
        A code that is used less than this share of the mean use is replaced by a residual of the batch.
    level_dropout (`float`, *optional*, defaults to 0.5):
        Share of training samples that are decoded from a random prefix of the levels, so that prefixes decode.
    """

    model_type = "wallvla_action_codec"

    action_dim: int = 26
    state_dim: int = 26
    num_domains: int = 32
    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    latent_steps: int = 8
    num_levels: int = 4
    codebook_size: int = 1024
    code_dim: int = 128
    steps_per_latent: int = 4
    feature_dim: int = 2048
    alignment: Literal["contrastive", "regression"] = "contrastive"
    temperature: float = 0.1
    reconstruction_weight: float = 1.0
    alignment_weight: float = 0.005
    next_frame_weight: float = 0.01
    dct_weight: float = 0.2
    commitment_weight: float = 0.1
    dct_slope: float = 4.0
    ema_decay: float = 0.95
    dead_code_share: float = 0.1
    level_dropout: float = 0.5
    initializer_range: float = 0.02

    @property
    def grid_width(self) -> int:
        """M: numbers of a chunk on the grid of the linear path."""
        return self.latent_steps * self.steps_per_latent * self.action_dim

    def __post_init__(self, **kwargs):
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "action_codec_wallvla.WallVLAActionCodecConfig",
                "AutoModel": "action_codec_wallvla.WallVLAActionCodec",
            },
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation."""
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size} with {self.num_heads} heads; it must be a multiple of twice the "
                "heads: sines and cosines, and whole heads."
            )
        if not self.feature_dim and (self.alignment_weight or self.next_frame_weight):
            raise ValueError(
                f"feature_dim is 0, but alignment_weight is {self.alignment_weight} and next_frame_weight "
                f"{self.next_frame_weight}. Both need vision features: give feature_dim, or set both weights to 0."
            )


@dataclass
class ActionCodecOutput(ModelOutput):
    """What `forward` returns.

    loss: weighted sum of the others, scalar. reconstruction_loss (mean squared error of the valid elements),
    alignment_loss, next_frame_loss, dct_loss, commitment_loss: scalars; the visual ones are `None` without features.
    ids: (B, L * T) int64. reconstruction: (B, H, D) float32.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    alignment_loss: Tensor | None = None
    next_frame_loss: Tensor | None = None
    dct_loss: Tensor | None = None
    commitment_loss: Tensor | None = None
    ids: Tensor | None = None
    reconstruction: Tensor | None = None


def dct_matrix(steps: int, device: torch.device | None = None) -> Tensor:
    """Orthonormal DCT-II, (H, H) float32: row k holds sqrt(2 / H) cos(pi (n + 1/2) k / H), row 0 over sqrt(2).

    `matrix @ x` is the transform of the columns of x, `matrix.T @ y` its inverse.
    """
    k, n = torch.arange(steps, dtype=torch.float64)[:, None], torch.arange(steps, dtype=torch.float64)
    matrix = math.sqrt(2 / steps) * torch.cos(math.pi / steps * (n + 0.5) * k)
    matrix[0] /= math.sqrt(2)
    return matrix.float().to(device)


def phase_embedding(steps: int, width: int, device: torch.device) -> Tensor:
    """Where each of `steps` lies within its chunk, (steps, width): sines and cosines of its fraction of the whole.

    Latents, steps of a short and steps of a long chunk share it: the middle of a chunk is the middle of any other.
    """
    fraction = (torch.arange(steps, device=device) + 0.5) / steps
    frequencies = math.pi * 2 ** torch.linspace(0, 7, width // 2, device=device)
    angles = fraction[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def resample(values: Tensor, steps: int) -> Tensor:
    """Values (B, N, ...) at `steps` moments of the same time span, linearly interpolated, both ends kept."""
    if values.shape[1] == steps:
        return values
    resampled = F.interpolate(values.flatten(2).transpose(1, 2), size=steps, mode="linear", align_corners=True)
    return resampled.transpose(1, 2).unflatten(2, values.shape[2:])


def hold_padding(actions: Tensor, step_mask: Tensor) -> Tensor:
    """Actions (B, H, D) whose padded steps (`step_mask` (B, H) False) repeat the valid one before them."""
    index = torch.arange(actions.shape[1], device=actions.device)
    held = torch.where(step_mask, index, 0).cummax(dim=1).values  # (B, H)
    return actions.gather(1, held[..., None].expand_as(actions))


def principal_map(motions: Tensor, config: WallVLAActionCodecConfig) -> Tensor:
    """Principal components of motions (N, M) as rows of a linear path (T * C, M), C of them for each latent.

    They are dealt to the latents so that the products of their variances are alike, because codes that are equally
    many then round equally well everywhere (Ge et al., "Optimized product quantization", section 3.2).
    """
    # Not centred: the linear path has no bias, so the mean motion is a component like others
    variances, components = torch.linalg.eigh(motions.double().T @ motions.double() / len(motions))  # ascending
    kept = variances[-config.latent_steps * config.code_dim :]
    kept = kept[kept > 1e-9 * kept[-1]]
    # Of the smallest kept variance, so that each component makes a volume larger
    sizes = (kept / kept[0]).log().tolist()
    latents, volumes = [[] for _ in range(config.latent_steps)], [0.0] * config.latent_steps
    for rank in range(len(kept)):
        free = [at for at in range(config.latent_steps) if len(latents[at]) < config.code_dim]
        at = min(free, key=lambda at: (volumes[at], len(latents[at])))
        latents[at].append(len(variances) - 1 - rank)
        volumes[at] += sizes[len(kept) - 1 - rank]
    linear = motions.new_zeros(config.latent_steps, config.code_dim, config.grid_width)
    for at, indices in enumerate(latents):
        linear[at, : len(indices)] = components[:, indices].T.to(linear.dtype)
    return linear.flatten(0, 1)


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, N, W) to a context (B, M, W), which may be x itself."""

    def __init__(self, config: WallVLAActionCodecConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, W / heads)

        q, (k, v) = heads(self.q_proj(x)), map(heads, self.kv_proj(context).chunk(2, dim=-1))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class CodecLayer(nn.Module):
    """Self-attention among x, cross-attention to the context, feed-forward; each after a norm, each added."""

    def __init__(self, config: WallVLAActionCodecConfig):
        super().__init__()
        width = config.hidden_size
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention, self.cross_attention = CrossAttention(config), CrossAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        states = self.self_norm(x)
        x = x + self.self_attention(states, states)
        x = x + self.cross_attention(self.cross_norm(x), context, mask)
        return x + self.mlp(self.mlp_norm(x))


class ResidualQuantizer(nn.Module):
    """Residual vector quantisation: level l quantises what the levels before it left over.

    Codebooks are moving averages of the vectors assigned to them. All buffers are persistent: they are the vocabulary.
    In distributed training they follow rank 0, whose buffers DDP broadcasts before each forward.
    """

    def __init__(self, config: WallVLAActionCodecConfig):
        super().__init__()
        self.config = config
        levels, codes, width = config.num_levels, config.codebook_size, config.code_dim
        self.register_buffer("codebooks", torch.zeros(levels, codes, width))
        self.register_buffer("code_sums", torch.zeros(levels, codes, width))
        self.register_buffer("code_counts", torch.zeros(levels, codes))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def nearest(self, vectors: Tensor, level: int) -> Tensor:
        """The nearest code of each vector (N, C) at a level. (N,) int64; the first of equals."""
        codebook = self.codebooks[level]
        return (codebook.square().sum(-1) - 2 * vectors @ codebook.T).argmin(dim=-1)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, T, C) -> codes (B, L, T) int64, each within [0, K).

        Raises:
            ValueError: codebooks that were never initialised.
        """
        if not self.initialised:
            raise ValueError(
                "The codebooks were never initialised, so tokens would mean nothing: call `initialise_codebooks`, as "
                "`CodecTrainer` does, or load a trained codec."
            )
        residual, codes = latents.flatten(0, 1), []
        for level in range(len(self.codebooks)):
            codes.append(self.nearest(residual, level))
            residual = residual - self.codebooks[level][codes[-1]]
        return torch.stack(codes, dim=1).view(*latents.shape[:2], -1).transpose(1, 2)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes of the first levels (B, l, T) -> the prefix sums (l, B, T, C) of their vectors."""
        vectors = [self.codebooks[level][codes[:, level]] for level in range(codes.shape[1])]
        return torch.stack(vectors).cumsum(dim=0)

    @torch.no_grad()
    def initialise(self, latents: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        """k-means of the residuals at every level, from at least K latents (N, C).

        Raises:
            ValueError: fewer latents than codes.
        """
        if len(latents) < self.config.codebook_size:
            raise ValueError(
                f"Found {len(latents)} latents to start {self.config.codebook_size} codes from. Give more chunks, or "
                "lower codebook_size."
            )
        residual = latents.float()
        for level in range(len(self.codebooks)):
            start = torch.randperm(len(residual), generator=generator)[: self.config.codebook_size]
            self.codebooks[level] = residual[start.to(residual.device)]
            for _ in range(iterations):
                codes = self.nearest(residual, level)
                counts, sums = self._totals(codes, residual)
                used = counts > 0
                self.codebooks[level][used] = sums[used] / counts[used, None]
            self.code_counts[level] = counts.clamp(min=1)
            self.code_sums[level] = self.codebooks[level] * self.code_counts[level][:, None]
            residual = residual - self.codebooks[level][self.nearest(residual, level)]
        self.initialised.fill_(True)

    def _totals(self, codes: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """How often each code is used (K,) and the sum of its vectors (K, C)."""
        counts = vectors.new_zeros(self.config.codebook_size).index_add_(0, codes, vectors.new_ones(len(codes)))
        sums = vectors.new_zeros(self.config.codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)
        return counts, sums

    @torch.no_grad()
    def update(self, latents: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """One step of the moving averages with latents (B, T, C) and their codes (B, L, T); revives dead codes."""
        config, residual = self.config, latents.flatten(0, 1)
        for level in range(config.num_levels):
            chosen = codes[:, level].flatten()
            counts, sums = self._totals(chosen, residual)
            residual_before, residual = residual, residual - self.codebooks[level][chosen]
            self.code_counts[level].lerp_(counts, 1 - config.ema_decay)
            self.code_sums[level].lerp_(sums, 1 - config.ema_decay)
            mean_count = self.code_counts[level].mean()
            dead = self.code_counts[level] < config.dead_code_share * mean_count
            picks = torch.randint(len(residual), (int(dead.sum()),), generator=generator).to(residual.device)
            self.code_counts[level][dead] = mean_count
            self.code_sums[level][dead] = residual_before[picks] * mean_count
            self.codebooks[level] = self.code_sums[level] / self.code_counts[level][:, None].clamp(min=1e-6)


class WallVLAActionCodec(PreTrainedModel):
    """Action chunks to tokens and back: `encode`, `decode`; `forward` returns the training losses.

    Token ids are level-major: T ids of level 0, then T of level 1, ...; those of level l lie in [l K, (l + 1) K). So
    the first l * T ids are a chunk in coarser form, and `decode` takes them.
    """

    config: WallVLAActionCodecConfig
    config_class = WallVLAActionCodecConfig
    base_model_prefix = "codec"
    main_input_name = "actions"
    # A code is chosen by comparing distances: in half precision ids would depend on the machine
    _keep_in_fp32_modules_strict = ["encoder", "decoder", "quantizer", "_in", "_out", "norm", "_head", "feature_"]
    _supports_sdpa = True

    def __init__(self, config: WallVLAActionCodecConfig):
        super().__init__(config)
        width, features = config.hidden_size, config.feature_dim
        self.step_in = nn.Linear(2 * config.action_dim, width)
        self.state_in = nn.Linear(config.state_dim, width)
        self.domain_in = nn.Embedding(config.num_domains, width)
        self.channel_in = nn.Linear(config.action_dim, width)
        self.horizon_in = nn.Linear(1, width)
        self.queries_in = nn.Embedding(config.latent_steps, width)
        self.encoder = nn.ModuleList(CodecLayer(config) for _ in range(config.num_layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.motion_in = nn.Linear(config.grid_width, config.latent_steps * config.code_dim, bias=False)
        self.code_out = nn.Linear(width, config.code_dim)
        self.quantizer = ResidualQuantizer(config)
        self.code_in = nn.Linear(config.code_dim, width)
        self.decoder = nn.ModuleList(CodecLayer(config) for _ in range(config.num_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.motion_out = nn.Linear(config.latent_steps * config.code_dim, config.grid_width, bias=False)
        self.action_out = nn.Linear(width, config.action_dim)
        if features:
            latents = config.latent_steps * config.code_dim
            self.motion_head = nn.Sequential(nn.Linear(latents, width), nn.GELU(), nn.Linear(width, width))
            self.vision_head = nn.Linear(features, width)
            self.next_frame_head = nn.Sequential(
                nn.Linear(latents + features, width), nn.GELU(), nn.Linear(width, features)
            )
            self.register_buffer("feature_mean", torch.zeros(features))
            self.register_buffer("feature_std", torch.ones(features))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As the framework's, but the signal keeps its size, and the corrections of the linear path start at zero."""
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):  # as large as the phases that they are added to
            init.normal_(module.weight, std=0.5)
        if module is self.code_out or module is self.action_out:
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):  # 0.02 is right for widths of thousands; here it would shrink the signal
            init.xavier_uniform_(module.weight)
        if module is self:
            config = self.config
            block = init.orthogonal_(torch.empty(config.code_dim, config.grid_width // config.latent_steps))
            init.copy_(self.motion_in.weight, torch.block_diag(*[block] * config.latent_steps))
            init.copy_(self.motion_out.weight, self.motion_in.weight.T)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        """Refuses a checkpoint that does not match: nothing is ever silently random."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        wrong = [*loading_info.missing_keys, *loading_info.unexpected_keys, *loading_info.mismatched_keys]
        if wrong:
            raise ValueError(
                f"The checkpoint does not match this codec: {len(wrong)} missing, unexpected or mis-shaped "
                f"{sorted(map(str, wrong))[:8]}. Load it with the config that it was saved with."
            )

    # ---- what tokens look like ----------------------------------------------------------------------------------

    @property
    def vocabulary_size(self) -> int:
        """L * K."""
        return self.config.num_levels * self.config.codebook_size

    @property
    def num_levels(self) -> int:
        """L."""
        return self.config.num_levels

    def tokens_per_chunk(self, horizon: int, num_channels: int) -> int:
        """L * T, whatever the horizon and the channels."""
        return self.config.num_levels * self.config.latent_steps

    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the meaning of the tokens: every tensor and size of this codec."""
        digest = hashlib.sha256()
        sizes = ("latent_steps", "num_levels", "num_heads", "steps_per_latent")  # the tensors' shapes say the rest
        fields = self.config.to_dict()
        digest.update(json.dumps({name: fields[name] for name in sizes}).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    # ---- encode and decode --------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        actions: Tensor,
        state: Tensor | None = None,
        action_mask: Tensor | None = None,
        domain_ids: Tensor | None = None,
    ) -> Tensor:
        """Token ids of action chunks; the same ones every time, alone or in a batch.

        Args:
            actions: normalised chunks (B, H, D) float; values beyond 10 count as 10.
            state: normalised states (B, S) float, 0 in channels that the robot lacks; `None` for no proprioception.
            action_mask: True on valid channels of valid steps, (B, H, D) bool. Default: all.
            domain_ids: embodiments, (B,) int64. Default: 0.
        Returns:
            (B, L * T) int64 in [0, L * K), level-major.
        Raises:
            ValueError: a wrong shape, NaN or infinity, a chunk without a valid element, codebooks never trained.
        """
        inputs = self._checked(actions, state, action_mask, domain_ids)
        with torch.autocast(actions.device.type, enabled=False):
            return self._to_ids(self.quantizer.encode(self._latents(*inputs)))

    @torch.no_grad()
    def decode(
        self,
        ids: Tensor,
        state: Tensor | None = None,
        horizon: int = 32,
        channel_mask: Tensor | None = None,
        domain_ids: Tensor | None = None,
    ) -> Tensor:
        """Action chunks of token ids, or of the ids of the first levels.

        Args:
            ids: (B, l * T) int64 with 1 <= l <= L, as `encode` returns them.
            state, domain_ids: as in `encode`.
            horizon: steps H of the chunks.
            channel_mask: channels that the robot has, (D,) or (B, D) bool; the others are 0. Default: all.
        Returns:
            (B, H, D) float32, normalised.
        Raises:
            ValueError: a wrong number of ids, or an id that is not of its level.
        """
        config = self.config
        size, count = ids.shape
        levels, rest = divmod(count, config.latent_steps)
        if rest or not 1 <= levels <= config.num_levels:
            raise ValueError(
                f"Found {count} ids per chunk. A chunk has {config.latent_steps} ids for each of 1 to "
                f"{config.num_levels} levels; pass whole levels."
            )
        level = torch.arange(levels, device=ids.device)[:, None]
        codes = ids.view(size, levels, config.latent_steps) - level * config.codebook_size  # (B, l, T)
        wrong = (codes < 0) | (codes >= config.codebook_size)
        if wrong.any():
            row, at, step = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"Found id {int(ids[row, at * config.latent_steps + step])} in chunk {row} at level {at}, whose ids "
                f"lie in [{at * config.codebook_size}, {(at + 1) * config.codebook_size}). Ids are level-major."
            )
        if channel_mask is None:
            channel_mask = torch.ones(config.action_dim, dtype=torch.bool, device=ids.device)
        channel_mask = channel_mask.expand(size, config.action_dim)
        blank = channel_mask.new_zeros(size, horizon, config.action_dim, dtype=torch.float32)
        _, _, state, domain_ids = self._checked(blank, state, channel_mask[:, None].expand_as(blank), domain_ids)
        with torch.autocast(ids.device.type, enabled=False):
            return self._reconstruct(self.quantizer.decode(codes)[-1], state, domain_ids, channel_mask, horizon)

    def _to_ids(self, codes: Tensor) -> Tensor:
        """Codes (B, L, T) -> level-major ids (B, L * T)."""
        levels = torch.arange(codes.shape[1], device=codes.device)[:, None]
        return (codes + levels * self.config.codebook_size).flatten(1)

    def _checked(
        self, actions: Tensor, state: Tensor | None, action_mask: Tensor | None, domain_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(actions, mask, state, domain_ids) in full, zero where masked, bounded. Raises ValueError as `encode`."""
        config = self.config
        if actions.dim() != 3 or actions.shape[2] != config.action_dim or 0 in actions.shape:
            raise ValueError(
                f"Found actions of shape {tuple(actions.shape)}. They are (B, H, {config.action_dim}) with at least "
                "one chunk of one step."
            )
        if action_mask is None:
            action_mask = torch.ones_like(actions, dtype=torch.bool)
        if state is None:
            state = actions.new_zeros(len(actions), config.state_dim)
        if domain_ids is None:
            domain_ids = torch.zeros(len(actions), dtype=torch.int64, device=actions.device)
        for name, value, shape in (
            ("action_mask", action_mask, actions.shape),
            ("state", state, (len(actions), config.state_dim)),
            ("domain_ids", domain_ids, (len(actions),)),
        ):
            if value.shape != shape:
                raise ValueError(f"Found {name} of shape {tuple(value.shape)}; these actions need {tuple(shape)}.")
        if not (domain_ids < config.num_domains).all() or not (domain_ids >= 0).all():
            raise ValueError(
                f"Found domain_ids {domain_ids.unique().tolist()}; this codec knows {config.num_domains} embodiments, "
                "from 0. Train one with a larger num_domains."
            )
        if not action_mask.flatten(1).any(dim=1).all():
            row = int((~action_mask.flatten(1).any(dim=1)).nonzero()[0])
            raise ValueError(f"Found no valid element in chunk {row}. A chunk has at least one valid step; drop it.")
        actions = torch.where(action_mask, actions.float(), 0.0)
        for name, value in (("actions", actions), ("state", state)):
            if not torch.isfinite(value).all():
                where = (~torch.isfinite(value)).nonzero()[0].tolist()
                raise ValueError(
                    f"Found a non-finite number in {name} at {where}. It has no token. Drop this frame from the "
                    "dataset, or repair the sensor reading."
                )
        bounded = (value.clamp(-LARGEST_INPUT, LARGEST_INPUT) for value in (actions, state.float()))
        actions, state = bounded
        return actions, action_mask, state, domain_ids

    def _condition(self, state: Tensor, domain_ids: Tensor, channels: Tensor, horizon: int) -> Tensor:
        """One token (B, 1, W) of what is known beside the motion; channels (B, D) bool."""
        length = self.horizon_in(state.new_tensor([[math.log2(horizon) / 6]]))  # 64 steps are 1
        known = self.state_in(state) + self.domain_in(domain_ids) + self.channel_in(channels.float()) + length
        return known[:, None]

    def _latents(self, actions: Tensor, mask: Tensor, state: Tensor, domain_ids: Tensor) -> Tensor:
        """Checked inputs -> latents (B, T, C)."""
        config, horizon = self.config, actions.shape[1]
        condition = self._condition(state, domain_ids, mask.any(dim=1), horizon)
        steps = self.step_in(torch.cat([actions, mask.float()], dim=-1))
        steps = steps + phase_embedding(horizon, config.hidden_size, actions.device)
        context = torch.cat([condition, steps], dim=1)  # (B, 1 + H, W)
        readable = F.pad(mask.any(dim=2), (1, 0), value=True)[:, None, None]  # padded steps are not read
        queries = self.queries_in.weight + phase_embedding(config.latent_steps, config.hidden_size, actions.device)
        latents = queries + condition
        for layer in self.encoder:
            latents = layer(latents, context, readable)
        linear = self.motion_in(self._grid(actions, mask)).unflatten(1, (config.latent_steps, -1))
        return linear + self.code_out(self.encoder_norm(latents))

    def _grid(self, actions: Tensor, mask: Tensor) -> Tensor:
        """Checked actions on the grid of the linear path, (B, M)."""
        steps = self.config.latent_steps * self.config.steps_per_latent
        return resample(hold_padding(actions, mask.any(dim=2)), steps).flatten(1)

    def _reconstruct(
        self, quantised: Tensor, state: Tensor, domain_ids: Tensor, channels: Tensor, horizon: int
    ) -> Tensor:
        """Quantised latents (B, T, C) -> actions (B, H, D), 0 in the channels that the robot lacks (B, D)."""
        config = self.config
        condition = self._condition(state, domain_ids, channels, horizon)
        memory = self.code_in(quantised)
        memory = memory + phase_embedding(config.latent_steps, config.hidden_size, memory.device)
        context = torch.cat([condition, memory], dim=1)  # (B, 1 + T, W)
        steps = condition + phase_embedding(horizon, config.hidden_size, memory.device)
        for layer in self.decoder:
            steps = layer(steps, context)
        linear = self.motion_out(quantised.flatten(1)).unflatten(1, (-1, config.action_dim))
        actions = resample(linear, horizon) + self.action_out(self.decoder_norm(steps))
        return torch.where(channels[:, None], actions, 0.0)

    # ---- training -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise_codebooks(
        self,
        actions: Tensor,
        state: Tensor | None = None,
        action_mask: Tensor | None = None,
        domain_ids: Tensor | None = None,
        *,
        generator: torch.Generator,
    ) -> None:
        """Chooses the linear path and sets the codebooks from many chunks (inputs of `encode`), once before training.

        Two isometries are tried, and the one after whose k-means codes less is lost stays: a latent for each segment
        of time, which suits commands that jump, and principal components dealt out evenly, which suits smooth motion.

        Raises:
            ValueError: as `encode`; B * T, the number of latents, is less than K.
        """
        inputs = self._checked(actions, state, action_mask, domain_ids)
        maps = self.motion_in.weight.clone(), principal_map(self._grid(*inputs[:2]), self.config)
        lost = self._start(maps[0], inputs, generator)
        first = {name: values.clone() for name, values in self.state_dict().items()}
        if lost <= self._start(maps[1], inputs, generator):
            self.load_state_dict(first)

    def _start(self, linear: Tensor, inputs: tuple, generator: torch.Generator) -> float:
        """Sets the linear path (T * C, M) and its codebooks; returns the reconstruction loss of the checked inputs."""
        self.motion_in.weight.copy_(linear)
        self.motion_out.weight.copy_(linear.T)
        self.quantizer.initialise(self._latents(*inputs).flatten(0, 1), generator)
        actions, mask, state, domain_ids = inputs
        quantised = self.quantizer.decode(self.quantizer.encode(self._latents(*inputs)))[-1]
        decoded = self._reconstruct(quantised, state, domain_ids, mask.any(dim=1), actions.shape[1])
        return (decoded - actions)[mask].square().mean().item()

    def set_feature_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation (F,) of the vision features, by which `forward` standardises them."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp(min=1e-3))

    def forward(
        self,
        actions: Tensor,
        state: Tensor | None = None,
        action_mask: Tensor | None = None,
        domain_ids: Tensor | None = None,
        features: Tensor | None = None,
        next_features: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ActionCodecOutput:
        """The losses of a batch. In training mode the codebooks follow it; `initialise_codebooks` comes first.

        Args:
            actions, state, action_mask, domain_ids: see `encode`.
            features: pooled vision features of the frame that each chunk starts from, (B, F) float.
            next_features: those of the frame after the chunk, (B, F) float.
            generator: CPU generator of the dropped levels and the revived codes; needed in training mode.
        """
        config = self.config
        actions, mask, state, domain_ids = self._checked(actions, state, action_mask, domain_ids)
        with torch.autocast(actions.device.type, enabled=False):
            latents = self._latents(actions, mask, state, domain_ids)
            output = ActionCodecOutput()
            quantised = self._quantise(latents, output, generator)
            output.reconstruction = self._reconstruct(quantised, state, domain_ids, mask.any(dim=1), actions.shape[1])
            self._action_losses(output, actions, mask)
            if features is not None and config.feature_dim:
                self._visual_losses(output, quantised.flatten(1), features, next_features)
        terms = (
            (config.reconstruction_weight, output.reconstruction_loss),
            (config.alignment_weight, output.alignment_loss),
            (config.next_frame_weight, output.next_frame_loss),
            (config.dct_weight, output.dct_loss),
            (config.commitment_weight, output.commitment_loss),
        )
        output.loss = sum(weight * loss for weight, loss in terms if loss is not None)
        return output

    def _quantise(self, latents: Tensor, output: ActionCodecOutput, generator: torch.Generator | None) -> Tensor:
        """Quantised latents (B, T, C) with the gradient of the latents; fills `ids` and `commitment_loss`."""
        config, size = self.config, len(latents)
        codes = self.quantizer.encode(latents.detach())
        sums = self.quantizer.decode(codes)  # (L, B, T, C)
        output.ids = self._to_ids(codes)
        output.commitment_loss = (latents - sums).square().mean()
        last = torch.full((size,), config.num_levels - 1)
        if self.training:
            self.quantizer.update(latents.detach(), codes, generator)
            drawn = torch.randint(config.num_levels, (size,), generator=generator)
            last = torch.where(torch.rand(size, generator=generator) < config.level_dropout, drawn, last)
        chosen = sums[last.to(sums.device), torch.arange(size, device=sums.device)]
        return latents + (chosen - latents).detach()  # gradients pass straight through

    def _action_losses(self, output: ActionCodecOutput, actions: Tensor, mask: Tensor) -> None:
        """Fills the two losses of the reconstruction: of its elements and of its frequencies."""
        error = torch.where(mask, output.reconstruction - actions, 0.0)  # (B, H, D)
        output.reconstruction_loss = error.square().sum() / mask.sum()
        horizon = actions.shape[1]
        rank = torch.arange(horizon, device=actions.device) / max(1, horizon - 1)
        spectrum = dct_matrix(horizon, actions.device) @ error
        weights = 1 + self.config.dct_slope * rank[:, None]
        output.dct_loss = (weights * spectrum.square()).sum() / mask.sum()

    def _visual_losses(
        self, output: ActionCodecOutput, motion: Tensor, features: Tensor, next_features: Tensor | None
    ) -> None:
        """Fills the losses that tie the latents (B, T * C) to what is seen and to what will be."""
        now = (features.float() - self.feature_mean) / self.feature_std
        ours = F.normalize(self.motion_head(motion), dim=-1)
        theirs = F.normalize(self.vision_head(now), dim=-1)
        if self.config.alignment == "contrastive":
            similarity = ours @ theirs.T / self.config.temperature  # (B, B)
            own = torch.arange(len(ours), device=ours.device)
            losses = F.cross_entropy(similarity, own), F.cross_entropy(similarity.T, own)
            output.alignment_loss = (losses[0] + losses[1]) / 2
        else:
            # Without negatives a trained projection of the features would collapse: the fixed one cannot
            output.alignment_loss = 1 - (ours * theirs.detach()).sum(dim=-1).mean()
        if next_features is not None:
            change = (next_features.float() - features.float()) / self.feature_std
            predicted = self.next_frame_head(torch.cat([motion, now], dim=-1))
            output.next_frame_loss = F.mse_loss(predicted, change)


WallVLAActionCodecConfig.register_for_auto_class()
WallVLAActionCodec.register_for_auto_class("AutoModel")

__all__ = ["ActionCodecOutput", "WallVLAActionCodec", "WallVLAActionCodecConfig", "dct_matrix", "phase_embedding"]
