"""Configuration of WallVLA: a Hugging Face VLM (the VL expert) plus an action expert trained by flow matching."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


AUTO_MAP = {
    "AutoConfig": "configuration_wallvla.WallVLAConfig",
    "AutoModel": "modeling_wallvla.WallVLAForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_wallvla.WallVLAForConditionalGeneration",
    "AutoProcessor": "processing_wallvla.WallVLAProcessor",
}


@strict
class WallVLAActionExpertConfig(PreTrainedConfig):
    r"""
    The action expert. Fields left at `None` are copied from the VL expert, with which it shares attention.

    kind (`str`, *optional*, defaults to `"mot"`):
        `"mot"`: a narrow transformer that attends to the keys and values of every VL layer (Wall-OSS-0.5, 2.1.1).
    hidden_size (`int`, *optional*, defaults to 1024):
        Width of the action tokens.
    intermediate_size (`int`, *optional*, defaults to 2048):
        Width of the SwiGLU.
    action_attention (`str`, *optional*, defaults to `"causal"`):
        `"causal"` or `"bidirectional"` attention among the action tokens of a chunk.
    num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps, max_position_embeddings:
        Must equal the VL expert's.
    rope_parameters (`dict`, *optional*):
        Always the VL expert's, whatever is given.
    """

    model_type = "wallvla_action_expert"
    base_config_key = "action_expert"

    kind: Literal["mot"] = "mot"
    hidden_size: int = 1024
    intermediate_size: int = 2048
    action_attention: Literal["causal", "bidirectional"] = "causal"
    hidden_act: str = "silu"
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float | None = None
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None


@strict
class WallVLAConfig(PreTrainedConfig):
    r"""
    vlm_config (`dict` or `PreTrainedConfig`, *optional*, defaults to Qwen2.5-VL-3B):
        The VL expert: any Qwen2.5-VL configuration.
    action_expert (`dict` or `WallVLAActionExpertConfig`, *optional*):
        The action expert.
    action_dim (`int`, *optional*, defaults to 26):
        Channels D of an action (Wall-OSS-0.5, section 2.2.3).
    action_horizon (`int`, *optional*, defaults to 32):
        Steps H of an action chunk.
    action_token_start_id, num_action_tokens (`int`, *optional*):
        The discrete action tokens are the ids `start <= id < start + num`. `None` and 0: there are none.
    action_token_levels (`int`, *optional*, defaults to 1), action_tokens_per_chunk (`int`, *optional*):
        The tokens of a chunk are divided evenly among the levels, and so are the ids: the first share of the tokens
        comes from the first share of the ids. `None` tokens: their number depends on the motion (FAST).
    action_codec_fingerprint (`str`, *optional*):
        Of the codec whose tokens the model was trained on. The processor refuses any other.
    prediction (`str`, *optional*, defaults to `"velocity"`):
        What the action expert predicts: `"velocity"` or the clean `"action"`.
    loss_space (`str`, *optional*, defaults to `"action"`):
        Where the flow loss is measured: `"action"` (section 2.2.2, equation 5) or `"velocity"`.
    loss_reduction (`str`, *optional*, defaults to `"per_element"`):
        Mean over all valid elements, or `"per_channel"`: first within each channel, then over channels.
    action_token_loss_weight, text_loss_weight (`float`, *optional*, default to 0.01):
        Weights of the two cross-entropy losses (equation 1).
    time_sampler (`str`, *optional*, defaults to `"beta"`):
        `"beta"` (equation 3), `"uniform"`, `"logit_normal"` or `"stratified"`; all scaled by `time_scale`.
    time_alpha (`float`, *optional*, defaults to 1.5):
        alpha of Beta(alpha, 1).
    time_scale (`float`, *optional*, defaults to 0.999):
        The largest flow time s in training and in sampling.
    num_inference_steps (`int`, *optional*, defaults to 10):
        Euler steps of `sample_actions`.
    norm_in_float32 (`bool`, *optional*, defaults to `False`):
        The RMS norms of both experts stay in float32 and multiply by their weight before they cast back, as
        Wall-OSS was trained. `False` is Qwen's order: cast, then multiply. In float32 the two are the same.
    proprioception (`str`, *optional*, defaults to `"text"`):
        `"text"`: the state is part of the prompt. `"projected"`: a linear map of [state ; which channels exist]
        takes the place of the token `state_token_id` (wall-oss-flow-0.1).
    state_dim (`int`, *optional*, defaults to 26), state_token_id (`int`, *optional*):
        Channels of a projected state and its token; not used with `"text"`.
    """

    model_type = "wallvla"
    sub_configs_defaults = {
        "vlm_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="qwen2_5_vl",
            init_kwargs={
                "text_config": {
                    "vocab_size": 151936,
                    "hidden_size": 2048,
                    "intermediate_size": 11008,
                    "num_hidden_layers": 36,
                    "num_attention_heads": 16,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 128000,
                    "rms_norm_eps": 1e-6,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
                },
                "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048, "intermediate_size": 3420},
                "tie_word_embeddings": True,
            },
        ),
        "action_expert": SubConfigSpec(config_class=WallVLAActionExpertConfig),
    }

    vlm_config: dict | PreTrainedConfig | None = None
    action_expert: dict | PreTrainedConfig | None = None
    action_dim: int = 26
    action_horizon: int = 32
    action_token_start_id: int | None = None
    num_action_tokens: int = 0
    action_token_levels: int = 1
    action_tokens_per_chunk: int | None = None
    action_codec_fingerprint: str | None = None
    prediction: Literal["velocity", "action"] = "velocity"
    loss_space: Literal["action", "velocity"] = "action"
    loss_reduction: Literal["per_element", "per_channel"] = "per_element"
    action_token_loss_weight: float = 0.01
    text_loss_weight: float = 0.01
    time_sampler: Literal["beta", "uniform", "logit_normal", "stratified"] = "beta"
    time_alpha: float = 1.5
    time_scale: float = 0.999
    num_inference_steps: int = 10
    initializer_range: float = 0.02
    norm_in_float32: bool = False
    proprioception: Literal["text", "projected"] = "text"
    state_dim: int = 26
    state_token_id: int | None = None

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        # `save_pretrained` of the outer config writes both levels, and loading looks at the outer one
        self.tie_word_embeddings = self.vlm_config.tie_word_embeddings
        text, expert = self.vlm_config.text_config, self.action_expert
        shared = {
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.hidden_size // text.num_attention_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "max_position_embeddings": text.max_position_embeddings,
        }
        for name, value in shared.items():
            found = expert.to_dict()[name]
            if found is None:
                setattr(expert, name, value)
            elif found != value:
                raise ValueError(
                    f"action_expert.{name} is {found} but the VL expert has {value}. The experts attend together, so "
                    f"they must agree: leave action_expert.{name} at None to copy it."
                )
        # With equal positions on the three axes multi-section rope is ordinary rope
        expert.rope_parameters = {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]}

    def validate_architecture(self):
        """Part of `@strict` validation."""
        if self.action_expert.hidden_size % 2:
            raise ValueError(
                f"action_expert.hidden_size is {self.action_expert.hidden_size}; the sinusoidal time embedding needs "
                "an even width."
            )
        if self.num_action_tokens and self.action_token_start_id is None:
            raise ValueError(
                f"num_action_tokens is {self.num_action_tokens} but action_token_start_id is None: give the id of the "
                "first discrete action token."
            )
        if (
            self.num_action_tokens % self.action_token_levels
            or (self.action_tokens_per_chunk or 0) % self.action_token_levels
        ):
            raise ValueError(
                f"{self.num_action_tokens} action tokens, {self.action_tokens_per_chunk} of them per chunk, are not "
                f"divided evenly among action_token_levels {self.action_token_levels}."
            )
        if self.proprioception == "projected" and self.state_token_id is None:
            raise ValueError(
                'proprioception is "projected" but state_token_id is None: give the id of the token that the '
                "projected state replaces."
            )
        if self.prediction == "action" and self.loss_space == "velocity":
            raise ValueError(
                'prediction "action" with loss_space "velocity" divides by 1 - tau, which is 0 at the clean end: use '
                'loss_space "action".'
            )
        if "sliding_attention" in self.vlm_config.text_config.layer_types:
            raise ValueError("The action expert reads the whole prefix: VL experts with sliding windows do not fit.")

    @classmethod
    def wall_oss_05(cls, **overrides) -> "WallVLAConfig":
        """Wall-OSS-0.5 at full size: Qwen2.5-VL-3B with a 36 x 1024 action expert; 4,154,377,216 parameters."""
        return cls(**overrides)

    @classmethod
    def tiny(cls, vocab_size: int = 512, **overrides) -> "WallVLAConfig":
        """A few million parameters, the same architecture: for tests and for the quickstart on a CPU.

        Args:
            vocab_size: rows of the embedding table.
            **overrides: fields of `WallVLAConfig`; an unknown one is an error.
        """
        unknown = sorted(set(overrides) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"WallVLAConfig has no field {unknown}; its fields are {sorted(cls.__dataclass_fields__)}."
            )
        fields = {
            "vlm_config": {
                "model_type": "qwen2_5_vl",
                "text_config": {
                    "vocab_size": vocab_size,
                    "hidden_size": 128,
                    "intermediate_size": 384,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 4096,
                    "rms_norm_eps": 1e-6,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
                    "bos_token_id": None,
                    "eos_token_id": None,
                },
                "vision_config": {
                    "depth": 2,
                    "hidden_size": 128,
                    "intermediate_size": 384,
                    "num_heads": 4,
                    "out_hidden_size": 128,
                    "patch_size": 8,
                    "temporal_patch_size": 1,
                    "spatial_merge_size": 2,
                    "window_size": 64,
                    "fullatt_block_indexes": [0, 1],
                },
                "tie_word_embeddings": True,
            },
            "action_expert": {"hidden_size": 128, "intermediate_size": 384},
            "action_dim": 4,
            "action_horizon": 8,
            "num_inference_steps": 5,
        }
        return cls(**{**fields, **overrides})


__all__ = ["WallVLAActionExpertConfig", "WallVLAConfig"]
