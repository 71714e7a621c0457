"""The VL expert: which Hugging Face VLMs there are, and what an action expert reads of them.

Each is the stock module under its stock names. What differs from one to the next is how pictures become tokens, how
positions are counted and how a layer is called; one class below says so for each, and none of them has parameters.

Shapes: B samples, S prefix tokens (left padded), C width of the VL expert, N key-value heads, P width of a head.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Florence2Model, PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.utils import torch_compilable_check


@dataclass(frozen=True)
class PrefixContext:
    """All that an action expert may read of the prefix.

    keys, values: of every VL layer, after rope, (B, N, S, P) each; empty for VLMs that have none to share. With room
        for a chunk: (B, N, S + H, P).
    last_hidden_state: (B, S, C), after the final norm.
    visible: tokens that action queries may read, (B, S) bool: neither padding nor anything from the first discrete
        action token on.
    positions: of the tokens, on the three axes of multimodal rope, (3, B, S) int64.
    next_position: where the chunk starts, (B,) int64: the position of the first discrete action token, or the one
        after the last token. Training and inference agree on it.
    auxiliary: features of views that only the vision tower saw, (B, A, C); `None` where every view is in the prefix.
    domain_ids: (B,) int64 or `None`.
    states, state_mask: normalised proprioception (B, state_dim) float32, and which channels of it the robot has, bool;
        `None` where the prompt says it, or nothing does.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    last_hidden_state: Tensor
    visible: Tensor
    positions: Tensor
    next_position: Tensor
    auxiliary: Tensor | None = None
    domain_ids: Tensor | None = None
    states: Tensor | None = None
    state_mask: Tensor | None = None

    def detach(self) -> "PrefixContext":
        """The same numbers, through which no gradient flows."""
        return replace(
            self,
            keys=tuple(k.detach() for k in self.keys),
            values=tuple(v.detach() for v in self.values),
            last_hidden_state=self.last_hidden_state.detach(),
            auxiliary=None if self.auxiliary is None else self.auxiliary.detach(),
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


def check_image_tokens(is_image: Tensor, features: int) -> None:
    """Raises ValueError unless a batch has as many image tokens (`is_image` (B, S) bool) as features for them."""
    torch_compilable_check(
        is_image.sum() == features,
        f"The images have {features} tokens, and `input_ids` another number of image tokens. Pass the two as the "
        "processor made them.",
    )


@dataclass(frozen=True)
class EncodedPrefix:
    """What the layers of a VLM made of a prefix; the fields are those of `PrefixContext`."""

    last_hidden_state: Tensor
    positions: Tensor
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    auxiliary: Tensor | None = None


class Qwen25VL:
    """Qwen2.5-VL, and what the other decoders share with it.

    Args:
        config: of the VLM.
        language_tokens: see `WallVLAConfig`.
    """

    def __init__(self, config: PreTrainedConfig, language_tokens: int | None = None):
        self.config, self.language_tokens = config, language_tokens

    def build(self) -> nn.Module:
        """The stock module with random weights."""
        return AutoModelForImageTextToText.from_config(self.config)

    def adopt(self, stock: nn.Module) -> nn.Module:
        """What a stock model with its LM head is here: the same, for VLMs that are kept whole."""
        return stock

    def lm_head(self, vlm: nn.Module) -> nn.Module:
        """Hidden states (..., C) to logits (..., vocabulary)."""
        return vlm.lm_head

    def decoder(self, vlm: nn.Module) -> nn.Module:
        """The text model: `embed_tokens`, `layers`, `norm`, `rotary_emb`."""
        return vlm.model.language_model

    def features(self, vlm: nn.Module, pixel_values: Tensor, image_grid_thw: Tensor | None) -> tuple[Tensor, list]:
        """Tokens of all images (tokens, C), and what is added to them after the first layers, (tokens, C) each."""
        return torch.cat(vlm.model.get_image_features(pixel_values, image_grid_thw).pooler_output), []

    def positions(
        self, vlm: nn.Module, ids: Tensor, attention_mask: Tensor, is_image: Tensor, image_grid_thw: Tensor | None
    ) -> Tensor:
        """(3, B, S) int64."""
        return vlm.model.get_rope_index(
            ids, is_image.int(), image_grid_thw=image_grid_thw, attention_mask=attention_mask
        )[0]

    def run_layer(self, layer: nn.Module, hidden: Tensor, mask: Tensor, tap: KeyValueTap, rope: tuple) -> Tensor:
        """One decoder layer. The tap goes by position: the checkpointing wrapper drops a keyword `past_key_values`."""
        return layer(hidden, mask, None, tap, position_embeddings=rope)

    def rope(self, decoder: nn.Module, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the decoder at positions (3, B, S)."""
        return decoder.rotary_emb(hidden, positions)

    def encode(
        self,
        vlm: nn.Module,
        hidden: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        is_image: Tensor,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
    ) -> EncodedPrefix:
        """Runs the prefix.

        Args:
            vlm: what `build` made.
            hidden: embedded tokens, (B, S, C).
            ids, attention_mask: (B, S).
            is_image: which tokens are an image's, (B, S) bool.
            pixel_values, image_grid_thw: all images of the batch as the VLM's own processor makes them, or `None`.
        """
        hidden, added = self._with_images(vlm, hidden, is_image, pixel_values, image_grid_thw)
        decoder = self.decoder(vlm)
        positions = self.positions(vlm, ids, attention_mask, is_image, image_grid_thw)
        rope = self.rope(decoder, hidden, positions)
        mask = create_causal_mask(
            config=decoder.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=None
        )
        taps = [KeyValueTap() for _ in decoder.layers]
        for index, (layer, tap) in enumerate(zip(decoder.layers, taps, strict=True)):
            hidden = self.run_layer(layer, hidden, mask, tap, rope)
            if index < len(added):
                hidden = hidden + torch.zeros_like(hidden).masked_scatter(is_image[..., None], added[index])
        keys, values = tuple(tap.keys for tap in taps), tuple(tap.values for tap in taps)
        return EncodedPrefix(decoder.norm(hidden), positions, keys, values)

    def _with_images(
        self,
        vlm: nn.Module,
        hidden: Tensor,
        is_image: Tensor,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Puts the images on their tokens; the second is what is added after the first layers, (tokens, C) each."""
        if pixel_values is None:
            check_image_tokens(is_image, 0)
            return hidden, []
        features, added = self.features(vlm, pixel_values.to(hidden.dtype), image_grid_thw)
        check_image_tokens(is_image, len(features))
        hidden = hidden.masked_scatter(is_image[..., None], features.to(hidden.dtype))
        return hidden, [each.to(hidden.dtype) for each in added]

    def blank_image(self, device: torch.device, side: int | None = None) -> tuple[dict[str, Tensor], int]:
        """A square image as a batch has it, and its number of tokens.

        `side`: in pixels, a multiple of what one token covers; the smallest when absent. Of no effect on VLMs whose
        images have one size.

        Raises:
            ValueError: a side that is no multiple of that.
        """
        vision = self.config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        if side is not None and (side < unit or side % unit):
            raise ValueError(
                f"Found a square picture of {side} pixels. Its side is a multiple of {unit}, patch size times merge "
                f"size: use {max(1, round(side / unit)) * unit}."
            )
        patches = vision.spatial_merge_size if side is None else side // vision.patch_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(patches * patches, patch, device=device)
        image = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, patches, patches]], device=device)}
        return image, (patches // vision.spatial_merge_size) ** 2

    def encoded_length(self, batch: dict[str, Tensor]) -> int:
        """How many tokens of each row of a batch go through the layers of the language model."""
        return batch["input_ids"].shape[1]


class Qwen3VL(Qwen25VL):
    """Qwen3-VL: three depths of the vision tower are added to the image tokens after the first layers (DeepStack)."""

    def features(self, vlm: nn.Module, pixel_values: Tensor, image_grid_thw: Tensor | None) -> tuple[Tensor, list]:
        output = vlm.model.get_image_features(pixel_values, image_grid_thw)
        return torch.cat(output.pooler_output), [torch.cat(each) for each in output.deepstack_features]

    def run_layer(self, layer: nn.Module, hidden: Tensor, mask: Tensor, tap: KeyValueTap, rope: tuple) -> Tensor:
        return layer(hidden, rope, mask, None, tap)


class Qwen35(Qwen25VL):
    """Qwen3.5: most layers are linear attention, which leaves no keys and values to share."""

    def encode(self, vlm, hidden, ids, attention_mask, is_image, pixel_values, image_grid_thw) -> EncodedPrefix:
        hidden, _ = self._with_images(vlm, hidden, is_image, pixel_values, image_grid_thw)
        positions = self.positions(vlm, ids, attention_mask, is_image, image_grid_thw)
        output = self.decoder(vlm)(
            inputs_embeds=hidden, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )
        return EncodedPrefix(output.last_hidden_state, positions)


class InternVL(Qwen25VL):
    """InternVL: square tiles of one size, positions of text, a Qwen2 or Qwen3 decoder."""

    def features(self, vlm: nn.Module, pixel_values: Tensor, image_grid_thw: Tensor | None) -> tuple[Tensor, list]:
        return vlm.model.get_image_features(pixel_values).pooler_output.flatten(0, 1), []

    def positions(self, vlm, ids, attention_mask, is_image, image_grid_thw) -> Tensor:
        # Left padding counts from 0, as the stock model does when it generates
        return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0).expand(3, -1, -1)

    def rope(self, decoder: nn.Module, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return decoder.rotary_emb(hidden, positions[0])

    def blank_image(self, device: torch.device, side: int | None = None) -> tuple[dict[str, Tensor], int]:
        height, width = self.config.vision_config.image_size
        return {"pixel_values": torch.zeros(1, 3, height, width, device=device)}, self.config.image_seq_length


class Florence2(Qwen25VL):
    """The encoder of Florence-2, without its decoder: X-VLA's VLM (section 3.3, "high-dimensional observations").

    A row is [main view | language | auxiliary views], always of one length. The first two go through the encoder,
    which sees padding of the language too, as X-VLA was trained; the views behind them only through the vision tower,
    and the places of a missing view are zero. There is no LM head.
    """

    def build(self) -> nn.Module:
        return self.without_decoder(Florence2Model(self.config))

    def adopt(self, stock: nn.Module) -> nn.Module:
        return self.without_decoder(stock.model)

    @staticmethod
    def without_decoder(vlm: Florence2Model) -> Florence2Model:
        """The same module, less what makes text."""
        text = vlm.language_model
        del text.decoder
        # Of its two ties one is left, and each level has a list
        text._tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}
        text.all_tied_weights_keys = text.get_expanded_tied_weights_keys(all_submodels=False)
        vlm.all_tied_weights_keys = {
            f"language_model.{k}": f"language_model.{v}" for k, v in text.all_tied_weights_keys.items()
        }
        return vlm

    def lm_head(self, vlm: nn.Module) -> nn.Module:
        raise ValueError("Found text to learn or to generate, but this VLM is an encoder: it has no LM head.")

    def encode(self, vlm, hidden, ids, attention_mask, is_image, pixel_values, image_grid_thw) -> EncodedPrefix:
        if pixel_values is None:
            raise ValueError("Found no `pixel_values`: this VLM encodes the main view together with the language.")
        features = vlm.get_image_features(pixel_values.to(hidden.dtype)).pooler_output  # (images, tokens of one, C)
        tokens, batch = features.shape[1], len(ids)
        check_image_tokens(is_image, len(features) * tokens)
        views = torch.zeros_like(hidden).masked_scatter(is_image[..., None], features.flatten(0, 1).to(hidden.dtype))
        hidden = torch.where(is_image[..., None], views, hidden)
        length = tokens + self.language_tokens
        encoded = vlm.language_model.encoder(inputs_embeds=hidden[:, :length]).last_hidden_state
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, batch, -1)
        return EncodedPrefix(encoded, positions[..., :length], auxiliary=views[:, length:])

    def image_tokens(self, side: int) -> int:
        """Tokens of a square image of `side` pixels: one for each place of the last stage, and their mean."""
        vision = self.config.vision_config
        for kernel, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
            side = (side + 2 * padding - kernel) // stride + 1
        return side**2 + 1

    def blank_image(self, device: torch.device, side: int | None = None) -> tuple[dict[str, Tensor], int]:
        side = math.prod(self.config.vision_config.patch_stride) if side is None else side
        return {"pixel_values": torch.zeros(1, 3, side, side, device=device)}, self.image_tokens(side)

    def encoded_length(self, batch: dict[str, Tensor]) -> int:
        return self.image_tokens(batch["pixel_values"].shape[-1]) + self.language_tokens


# By `model_type` of the VLM
VL_EXPERTS = {
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "qwen3_5": Qwen35,
    "internvl": InternVL,
    "florence2": Florence2,
}
