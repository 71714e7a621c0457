"""The policy call as one function of static tensors: frames in, actions out, no branch that waits for the device.

It computes what `model.sample_actions` computes, less what nothing reads; `docs/inference.md` lists the savings.

Shapes: B samples, L places for prefix tokens (prompts are padded on the right), S tokens of one pass, H action steps,
D action channels, C width of the VL expert, E width of the action expert, N key-value heads, P width of a head,
T Euler steps.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import Qwen2_5_VLForConditionalGeneration

from ..action_experts_wallvla import MoTActionExpert
from ..flow_matching_wallvla import euler_step, time_grid, velocity_from_action
from ..modeling_wallvla import WallVLAForConditionalGeneration
from ..ops_wallvla import Ops, action_attention_mask, sinusoidal_embedding
from .plans import VisionPlan, VisionRun
from .preprocessing import FrameResizer, cut_patches
from .weights import Block, Fp8Linear, Linear, decoder_block, linear, quantize_rows, vision_block


# Only a description of the mask, without a tensor behind it; made once, as it cannot be made under a dispatch mode
causal_mask = lru_cache(maxsize=256)(causal_lower_right)


def obstacles(model: WallVLAForConditionalGeneration) -> list[str]:
    """What a model has that `PolicyForward` was not written for; nothing where it computes what the model computes."""
    config, vlm = model.config, model.config.vlm_config
    parts = ((model.vlm, Qwen2_5_VLForConditionalGeneration), (model.action_expert, MoTActionExpert))
    found = [f"{type(part).__name__} (not {known.__name__})" for part, known in parts if type(part) is not known]
    if found:  # what follows are fields of these
        return found
    activations = {vlm.text_config.hidden_act, vlm.vision_config.hidden_act, config.action_expert.hidden_act}
    found = [f"activation {name} (not silu)" for name in sorted(activations - {"silu"})]
    rope = vlm.text_config.rope_parameters["rope_type"]
    if rope != "default":
        found.append(f"{rope} rope (not default)")
    if config.sampler != "euler":
        found.append(f"sampler {config.sampler} (not euler)")
    if config.binary_channels:
        found.append("channels that hold a decision")
    if model.action_expert.state_in_proj is not None:
        found.append("a token of the state in the action expert")
    return found


class PolicyForward:
    """The weights of a model and the four passes over them: images, text, prefix, denoising.

    Args:
        model: one without `obstacles`. `ops`, `fp8`: see `WallVLAEngine`.
        pixel_table: of the processor, (3, 256) float32.
        steps: T.

    `inputs`, an argument of the passes, holds on the device: `ids` (B, L), `positions` (3, B, L), `counts` (B,) tokens
    of each prompt, `following` (B,) position after it, `image_places` (image tokens,) where they go among the tokens
    after the constant text of all rows, all int64; `frame_0`, ... (h, w, 3) uint8; `noise` (B, H, D), `action_mask`,
    `action_padding`, `states`, `state_mask` as in `sample_actions`; `target` and `weights` of a guidance.
    `caches` are the keys and values of every layer, (layers, 2, B, N, L + H, P).
    """

    def __init__(self, model: WallVLAForConditionalGeneration, pixel_table: Tensor, steps: int, ops: Ops, fp8: bool):
        self.model, self.config, self.ops = model, model.config, ops
        self.text, self.visual, self.expert = (
            model.vlm.model.language_model,
            model.vlm.model.visual,
            model.action_expert,
        )
        self.vision_config = model.config.vlm_config.vision_config
        self.device, self.dtype = model.device, self.text.embed_tokens.weight.dtype
        with torch.no_grad():
            self._read_weights(pixel_table, fp8)
            self._read_heads(steps)

    def _read_weights(self, pixel_table: Tensor, fp8: bool) -> None:
        def convert(layer: Linear) -> Linear | Fp8Linear:
            return Fp8Linear.of(layer, quantize) if fp8 else layer

        # Compiled it is one kernel instead of five; on a CPU compiling would only cost time
        quantize = torch.compile(quantize_rows) if self.device.type == "cuda" else quantize_rows
        self.text_blocks = [decoder_block(layer, convert) for layer in self.text.layers]
        # The action expert waits for its weights and its launches: quantising 32 rows would add more than it saves
        self.expert_blocks = [decoder_block(layer, lambda product: product) for layer in self.expert.layers]
        self.vision_blocks = [vision_block(block, convert) for block in self.visual.blocks]
        self.merger = [convert(linear(self.visual.merger.mlp[index])) for index in (0, 2)]
        convolution = self.visual.patch_embed.proj.weight.detach()  # (width, 3, temporal, patch, patch)
        # An image fills the temporal patches with copies of itself
        self.patch_weight = convolution.float().sum(dim=2).flatten(1).to(self.dtype)
        self.pixel_table = pixel_table.flatten().to(self.device)
        channels = torch.arange(3, device=self.device)
        self.table_rows = channels.repeat_interleave(self.vision_config.patch_size**2) * 256  # (3 patch^2,)
        sections = self.text.config.rope_parameters["mrope_section"]
        self.rope_axis = torch.arange(3).repeat_interleave(torch.tensor(sections)).to(self.device)  # (P / 2,)

    def _read_heads(self, steps: int) -> None:
        """Folds the first two matrices of the action embedding, and what of it depends on the time alone."""
        width = self.config.action_expert.hidden_size
        inner, outer = self.expert.action_in_proj.weight.double(), self.expert.action_time_mlp_in.weight.double()
        folded = (outer[:, :width] @ inner).float()  # (E, 2 D)
        self.action_weight, self.mask_weight = (half.contiguous() for half in folded.chunk(2, dim=1))
        self.times = time_grid(steps, self.config.time_scale, self.device)
        embedding = sinusoidal_embedding(self.times[:-1], width).double()
        self.time_rows = (embedding @ outer[:, width:].T).float()  # (T, E)

    def encode_images(
        self, inputs: dict[str, Tensor], resizers: list[FrameResizer], plan: VisionPlan
    ) -> tuple[Tensor, Tensor]:
        """Frames to image tokens (image tokens, C), and the place of each, of `image_places`."""
        config, ops = self.vision_config, self.ops
        unit = config.spatial_merge_size**2
        patches = [
            cut_patches(resizer(inputs[f"frame_{index}"][None]), config.patch_size, config.spatial_merge_size)
            for index, resizer in enumerate(resizers)
        ]
        patches = torch.cat(patches).unflatten(0, (-1, unit))[plan.order].flatten(0, 1)  # (patches, 3 patch^2) uint8
        pixels = self.pixel_table[patches + self.table_rows].to(self.dtype)
        residual = F.linear(pixels, self.patch_weight)  # (patches, width)
        hidden = ops.rms_norm(residual, self.vision_blocks[0].norm1, 1e-6, False)
        norms = [*(block.norm1 for block in self.vision_blocks[1:]), self.visual.merger.ln_q.weight]
        for index, (block, next_norm) in enumerate(zip(self.vision_blocks, norms, strict=True)):
            qkv = block.qkv(hidden).unflatten(-1, (3, config.num_heads, -1))  # (patches, 3, heads, P)
            ops.vision_rope_(qkv, plan.cos, plan.sin)
            attended = vision_attention(qkv, plan.runs, index in config.fullatt_block_indexes)
            hidden, residual = ops.add_rms_norm(block.output(attended), residual, block.norm2, 1e-6, False)
            update = block.down(ops.swiglu(block.gate_up(hidden)))
            hidden, residual = ops.add_rms_norm(update, residual, next_norm, 1e-6, False)
        first, second = self.merger
        features = second(F.gelu(first(hidden.view(-1, unit * config.hidden_size))))
        return features, inputs["image_places"][plan.order]

    def prefill(
        self,
        inputs: dict[str, Tensor],
        caches: Tensor,
        start: int,
        stop: int,
        images: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Puts keys and values of the tokens [start, stop) into the caches, which hold those before `start`.

        `images`: of `encode_images`; None where there are none.
        """
        ids = inputs["ids"][:, start:stop]
        hidden = self.text.embed_tokens(ids)  # (B, S, C)
        if images is not None:
            features, places = images
            hidden.view(-1, hidden.shape[-1]).index_copy_(0, places, features)
        if "states" in inputs:
            state = self.model.state_proj(
                torch.cat([inputs["states"], inputs["state_mask"].float()], dim=-1)
            )  # (B, C)
            here = (ids == self.config.state_token_id)[..., None]
            hidden = torch.where(here, state[:, None].to(hidden.dtype), hidden)
        positions = inputs["positions"][:, :, start:stop].permute(1, 2, 0)  # (B, S, 3)
        angles = positions[..., self.rope_axis].float() * self.text.rotary_emb.inv_freq.float()  # (B, S, P / 2)
        mask = causal_mask(stop - start, stop)

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys, values = keys[:, :, :stop], values[:, :, :stop]
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
            return out.transpose(1, 2).flatten(2)

        self._decode(self.text_blocks, hidden, angles, caches, start, attend, None)

    def denoise(
        self, inputs: dict[str, Tensor], caches: Tensor, guidance: Callable | None = None, limit: float = 0.0
    ) -> Tensor:
        """T Euler steps from the noise. (B, H, D) float32, 0 outside the action mask."""
        config, expert = self.config, self.config.action_expert
        noise, action_mask, horizon = inputs["noise"], inputs["action_mask"], self.config.action_horizon
        length = caches.shape[4] - horizon
        channel_mask, step_mask = action_mask.any(dim=1, keepdim=True), action_mask.any(dim=2)
        places = torch.arange(length + horizon, device=self.device)
        visible = places[:length] < inputs["counts"][:, None]  # (B, L)
        allowed = action_attention_mask(visible, step_mask, expert.action_attention == "causal")
        # Heads that share keys and values become further rows of one head
        groups = expert.num_attention_heads // expert.num_key_value_heads
        mask = torch.zeros_like(allowed, dtype=self.dtype).masked_fill(~allowed, float("-inf")).repeat(1, 1, groups, 1)
        positions = inputs["following"][:, None] + places[:horizon]  # (B, H)
        angles = positions[..., None].float() * self.expert.rotary_emb.inv_freq.float()
        channels = channel_mask.float() @ self.mask_weight.T  # (B, 1, E)

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            rows = queries.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, N, groups H, P)
            out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
            return out.unflatten(2, (groups, horizon)).permute(0, 3, 1, 2, 4).flatten(2)

        def field(actions: Tensor, time: Tensor, constant: Tensor) -> Tensor:
            hidden = self.expert.action_time_mlp_out(F.silu(F.linear(actions, self.action_weight) + constant))
            hidden = hidden.to(self.dtype)
            hidden = self._decode(self.expert_blocks, hidden, angles, caches, length, attend, self.expert.norm.weight)
            velocity = self.expert.action_out_proj(hidden.float())
            if config.prediction == "action":
                velocity = velocity_from_action(actions, velocity, time.expand(len(actions)))
            return torch.where(channel_mask, velocity, inputs["action_padding"][:, None] - noise)

        if guidance is not None:
            bound = {"limit": limit} if limit else {}
            guidance = partial(guidance, target=inputs["target"], weights=inputs["weights"], **bound)
        actions = noise
        for (time, next_time), row in zip(pairwise(self.times), self.time_rows, strict=True):
            step = partial(field, constant=channels + row)
            velocity = step(actions, time) if guidance is None else guidance(step, actions, time)
            actions = euler_step(actions, velocity, time, next_time)
        return torch.where(action_mask, actions, 0.0)

    def _decode(
        self,
        blocks: list[Block],
        residual: Tensor,
        angles: Tensor,
        caches: Tensor,
        start: int,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        final_norm: Tensor | None,
    ) -> Tensor | None:
        """Decoder layers over tokens (B, S, width) whose keys and values go to the places from `start` on.

        With `final_norm` the result is the normed output; without one the last layer only fills its cache.
        """
        ops, eps, in_float32 = self.ops, self.config.action_expert.rms_norm_eps, self.config.norm_in_float32
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()  # (B, S, P)
        norms = [*(block.norm1 for block in blocks[1:]), final_norm]
        hidden = ops.rms_norm(residual, blocks[0].norm1, eps, in_float32)
        for block, next_norm, (keys, values) in zip(blocks, norms, caches, strict=True):
            if next_norm is None:
                _, heads, _, width = keys.shape
                new = block.qkv.last_rows(2 * heads * width)(hidden).unflatten(-1, (-1, width)).transpose(1, 2)
                stop = start + hidden.shape[1]
                keys[:, :, start:stop] = ops.rope(new[:, :heads], cos, sin)
                values[:, :, start:stop] = new[:, heads:]
                return None
            queries = ops.qkv_rope_store(block.qkv(hidden), cos, sin, keys, values, start)
            attended = block.output(attend(queries, keys, values))
            hidden, residual = ops.add_rms_norm(attended, residual, block.norm2, eps, in_float32)
            update = block.down(ops.swiglu(block.gate_up(hidden)))
            hidden, residual = ops.add_rms_norm(update, residual, next_norm, eps, in_float32)
        return hidden


def vision_attention(qkv: Tensor, runs: list[VisionRun], full: bool) -> Tensor:
    """Attention within each image (`full`) or within each window: (patches, 3, heads, P) -> (patches, heads * P)."""

    def attend(states: Tensor, windows: int, patches: int) -> Tensor:
        """(images, windows * patches, 3, heads, P) -> (images, windows * patches, heads * P)"""
        states = states.unflatten(1, (windows, patches)).flatten(0, 1)
        out = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in states.unbind(2)))
        return out.transpose(1, 2).reshape(-1, windows * patches, out.shape[1] * out.shape[3])

    outputs = []
    for run, states in zip(runs, qkv.split([run.images * run.patches for run in runs]), strict=True):
        states = states.unflatten(0, (run.images, run.patches))
        groups = [(1, run.patches)] if full else run.windows
        parts = states.split([windows * patches for windows, patches in groups], dim=1)
        outputs.append(
            join([attend(part, *group) for part, group in zip(parts, groups, strict=True)], 1).flatten(0, 1)
        )
    return join(outputs, 0)


def join(tensors: list[Tensor], dim: int) -> Tensor:
    """`torch.cat` that leaves a single tensor alone, where `cat` would copy it."""
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]
