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


class ActionExpertConfig(PreTrainedConfig):
    """What every action expert has: `kind` says which it is (`action_experts_wallvla`), and `bind(config)` fills in
    and checks what depends on the rest of the model, with a ValueError where the two do not fit."""

    model_type = "wallvla_action_expert"
    base_config_key = "action_expert"


@strict
class MoTExpertConfig(ActionExpertConfig):
    r"""
    A narrow transformer that attends to the keys and values of every VL layer (Wall-OSS-0.5, 2.1.1). Fields left at
    `None` are copied from the VL expert, with which it shares attention.

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

    kind: Literal["mot"] = "mot"
    hidden_size: int = 1024
    intermediate_size: int = 2048
    action_attention: Literal["causal", "bidirectional"] = "causal"
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float | None = None
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None

    def bind(self, config: "WallVLAConfig") -> None:
        text = config.vlm_config.text_config
        # Of the class: published files write another one into the instance
        if type(text).model_type not in MOT_TEXT_MODELS:
            raise ValueError(
                f"A mot expert shares the attention of every VL layer, which {type(text).model_type} does not offer: "
                f"use one of {', '.join(MOT_TEXT_MODELS)}, or an expert of another kind."
            )
        values = text.to_dict()
        if "sliding_attention" in (values.get("layer_types") or ()):
            raise ValueError("The action expert reads the whole prefix: VL experts with sliding windows do not fit.")
        shared = {
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": values.get("head_dim") or text.hidden_size // text.num_attention_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "max_position_embeddings": text.max_position_embeddings,
        }
        for name, value in shared.items():
            found = self.to_dict()[name]
            if found is None:
                setattr(self, name, value)
            elif found != value:
                raise ValueError(
                    f"action_expert.{name} is {found} but the VL expert has {value}. The experts attend together, so "
                    f"they must agree: leave action_expert.{name} at None to copy it."
                )
        # With equal positions on the three axes multi-section rope is ordinary rope
        self.rope_parameters = {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]}
        if self.hidden_size % 2:
            raise ValueError(
                f"action_expert.hidden_size is {self.hidden_size}; the sinusoidal time embedding needs an even width."
            )


@strict
class SoftPromptExpertConfig(ActionExpertConfig):
    r"""
    X-VLA's transformer over the states of a VLM (section 3.3).

    conditioning (`str`, *optional*, defaults to `"soft_prompt"`):
        How a domain differs beyond its projections of action tokens (figure 2): `"soft_prompt"`: learned tokens;
        `"hpt"`: a resampler of its own for what the VLM saw; `"none"`: in nothing. Language prompts are `"none"` with
        a prompt that describes the robot (`prompts_wallvla`).
    num_soft_prompts (`int`, *optional*, defaults to 32):
        Tokens of a domain, or queries of its resampler.
    time_dim (`int`, *optional*, defaults to 32), max_time_period (`float`, *optional*, defaults to 100):
        Of the embedding of the noise level, which is 1 - tau.
    max_position_embeddings (`int`, *optional*, defaults to 512):
        Longest sequence of action tokens and observation.
    dropout (`float`, *optional*, defaults to 0.1):
        On attention weights and on the outputs of both halves of a layer.
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads:
        Of the transformer.
    """

    kind: Literal["soft_prompt"] = "soft_prompt"
    conditioning: Literal["soft_prompt", "hpt", "none"] = "soft_prompt"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_soft_prompts: int = 32
    time_dim: int = 32
    max_time_period: float = 100.0
    max_position_embeddings: int = 512
    dropout: float = 0.1

    def bind(self, config: "WallVLAConfig") -> None:
        if config.prediction != "action":
            raise ValueError('A soft_prompt expert predicts the clean action: use prediction "action".')
        if config.binary_channels and config.state_dim != config.action_dim:
            raise ValueError(
                f"state_dim is {config.state_dim} and action_dim {config.action_dim}: with binary_channels, which are "
                "hidden in both, state and action have the same channels."
            )


@strict
class DiTExpertConfig(ActionExpertConfig):
    r"""
    Qwen-VLA's single-stream DiT (section 2.2). The paper gives the sizes of its parts; open, and chosen here so that
    they come out: plain softmax attention with heads of 128, a SwiGLU of 10240, no biases but in AdaLN and the
    projections, adaLN-Zero initialisation, the last hidden states of the VLM, flow times embedded as 1000 tau.

    action_projection (`str`, *optional*, defaults to `"shared"`):
        The three ways of table 10: `"shared"`: channels padded to K, one pair of projections. `"concatenated"`: each
        domain has channels of its own, so a first and last matrix of its own. `"per_domain"`: each domain has whole
        projections of its own.
    mrope_section (`list[int]`, *optional*, defaults to `[24, 20, 20]`):
        Pairs of rotary channels for time, rows and columns; together half a head.
    rope_theta (`float`, *optional*):
        Base of the rotary frequencies; the VLM's when absent.
    time_dim (`int`, *optional*, defaults to 256):
        Width of the sinusoidal embedding of the flow time.
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads:
        Of the blocks.
    """

    kind: Literal["dit"] = "dit"
    action_projection: Literal["shared", "concatenated", "per_domain"] = "shared"
    hidden_size: int = 1536
    intermediate_size: int = 10240
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    mrope_section: list[int] | tuple[int, ...] = (24, 20, 20)
    rope_theta: float | None = None
    time_dim: int = 256

    def bind(self, config: "WallVLAConfig") -> None:
        if self.rope_theta is None:
            self.rope_theta = float(config.vlm_config.text_config.rope_parameters["rope_theta"])
        pairs = self.hidden_size // self.num_attention_heads // 2
        if sum(self.mrope_section) != pairs or len(self.mrope_section) != 3:
            raise ValueError(
                f"action_expert.mrope_section is {list(self.mrope_section)}: three numbers with sum {pairs}, half the "
                f"width of a head."
            )


# Text models whose layers a mot expert can share
MOT_TEXT_MODELS = ("qwen2_5_vl_text", "qwen2", "qwen3", "qwen3_vl_text")
EXPERT_CONFIGS = {"mot": MoTExpertConfig, "soft_prompt": SoftPromptExpertConfig, "dit": DiTExpertConfig}


@strict
class WallVLAConfig(PreTrainedConfig):
    r"""
    vlm_config (`dict` or `PreTrainedConfig`, *optional*, defaults to Qwen2.5-VL-3B):
        The VL expert: a configuration of Qwen2.5-VL, Qwen3-VL, Qwen3.5, InternVL or Florence-2.
    action_expert (`dict` or `ActionExpertConfig`, *optional*):
        The action expert; `kind` says which: `"mot"` ([`MoTExpertConfig`], the default), `"soft_prompt"`
        ([`SoftPromptExpertConfig`]) or `"dit"` ([`DiTExpertConfig`]).
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
        Mean over all valid elements, or `"per_channel"`: for each sample first within each channel, then over its
        channels (Qwen-VLA, equations 1 and 2).
    loss_channel_weights (`list[float]`, *optional*, defaults to none):
        With `"per_channel"`, the sum over channels with these weights (D,) in the place of their mean (X-VLA).
    binary_channels (`list[int]`, *optional*, defaults to none):
        Channels that hold a decision, 0 or 1: the network does not see them, predicts a logit and learns by binary
        cross-entropy (X-VLA's grippers). Only with prediction `"action"`.
    action_token_loss_weight, text_loss_weight (`float`, *optional*, default to 0.01):
        Weights of the two cross-entropy losses (equation 1).
    time_sampler (`str`, *optional*, defaults to `"beta"`):
        `"beta"` (equation 3), `"uniform"`, `"logit_normal"` or `"stratified"`; all scaled by `time_scale`.
    time_alpha (`float`, *optional*, defaults to 1.5):
        alpha of Beta(alpha, 1).
    time_scale (`float`, *optional*, defaults to 0.999):
        The largest flow time s in training and in sampling.
    num_inference_steps (`int`, *optional*, defaults to 10):
        Steps of `sample_actions`.
    sampler (`str`, *optional*, defaults to `"euler"`):
        `"euler"`, or `"renoise"`: each step puts the predicted action back on the path from the same noise (X-VLA).
    norm_in_float32 (`bool`, *optional*, defaults to `False`):
        The RMS norms of both experts stay in float32 and multiply by their weight before they cast back, as
        Wall-OSS was trained. `False` is Qwen's order: cast, then multiply. In float32 the two are the same.
    proprioception (`str`, *optional*, defaults to `"text"`):
        `"text"`: the state is part of the prompt. `"projected"`: a linear map of [state ; which channels exist]
        takes the place of the token `state_token_id` (wall-oss-flow-0.1). `"expert"`: the action expert reads it.
        `"none"`: nobody does.
    state_dim (`int`, *optional*, defaults to 26), state_token_id (`int`, *optional*):
        Channels of the state where it is no text, and the token of a projected one.
    domains (`list[str]`, *optional*, defaults to none):
        Names of the domains that have parameters of their own, in the order of `domain_ids`
        (`WallVLAForConditionalGeneration.add_domain`).
    language_tokens (`int`, *optional*):
        For VLMs whose rows have one layout (Florence-2): tokens of the language, padding included.
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
        "action_expert": SubConfigSpec(config_class=MoTExpertConfig),
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
    loss_channel_weights: list[float] | tuple[float, ...] = ()
    binary_channels: list[int] | tuple[int, ...] = ()
    action_token_loss_weight: float = 0.01
    text_loss_weight: float = 0.01
    time_sampler: Literal["beta", "uniform", "logit_normal", "stratified"] = "beta"
    time_alpha: float = 1.5
    time_scale: float = 0.999
    num_inference_steps: int = 10
    sampler: Literal["euler", "renoise"] = "euler"
    initializer_range: float = 0.02
    norm_in_float32: bool = False
    proprioception: Literal["text", "projected", "expert", "none"] = "text"
    state_dim: int = 26
    state_token_id: int | None = None
    domains: list[str] | tuple[str, ...] = ()
    language_tokens: int | None = None

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        if isinstance(self.action_expert, dict):
            kind = self.action_expert.get("kind", "mot")
            if kind not in EXPERT_CONFIGS:
                raise ValueError(f"action_expert.kind is {kind!r}: use one of {', '.join(EXPERT_CONFIGS)}.")
            self.action_expert = EXPERT_CONFIGS[kind](**self.action_expert)
        super().__post_init__(**kwargs)
        # `save_pretrained` of the outer config writes both levels, and loading looks at the outer one
        self.tie_word_embeddings = self.vlm_config.tie_word_embeddings
        self.action_expert.bind(self)

    def validate_architecture(self):
        """Part of `@strict` validation."""
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
        if self.loss_channel_weights and (
            self.loss_reduction != "per_channel" or len(self.loss_channel_weights) != self.action_dim
        ):
            raise ValueError(
                f"Found {len(self.loss_channel_weights)} loss_channel_weights with loss_reduction "
                f'"{self.loss_reduction}": one for each of {self.action_dim} channels, with "per_channel".'
            )
        if self.binary_channels and self.prediction != "action":
            raise ValueError('binary_channels are predicted as logits of the clean action: use prediction "action".')
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains {list(self.domains)} has a name twice.")

    @classmethod
    def wall_oss_05(cls, **overrides) -> "WallVLAConfig":
        """Wall-OSS-0.5 at full size: Qwen2.5-VL-3B with a 36 x 1024 action expert; 4,154,377,216 parameters."""
        return cls(**overrides)

    @classmethod
    def x_vla(
        cls, action_space: Literal["ee6d", "agibot_ee6d", "joint", "auto"] = "ee6d", **overrides
    ) -> "WallVLAConfig":
        """X-VLA at full size: Florence-2-Large without its decoder, a 24 x 1024 transformer; 879.48M parameters.

        Args:
            action_space: what the 30 anchors hold. `"ee6d"`: for each of two arms position, rot6d, gripper, the first
                20 canonical channels, with errors weighted 500 / 10 / 1. `"agibot_ee6d"`: the same with grippers that
                are numbers and no decisions, weighted 10. `"joint"`: 14 joints, of which 6 and 13 are grippers,
                weighted 1 / 0.1. `"auto"`: 20 channels of anything.
            **overrides: fields of `WallVLAConfig`.
        """
        # Means over the channels of a part, so each channel has its share of the part's weight
        pose = [500 / 3] * 3 + [10 / 6] * 6
        joints = [1 / 12] * 6 + [0.1 / 2]
        spaces = {
            "ee6d": (20, [*pose, 1 / 2] * 2, [9, 19]),
            "agibot_ee6d": (20, [*pose, 10 / 2] * 2, []),
            "joint": (14, joints * 2, [6, 13]),
            "auto": (20, [1 / 20] * 20, []),
        }
        channels, weights, grippers = spaces[action_space]
        fields = {
            "vlm_config": {
                "model_type": "florence2",
                "text_config": {
                    "model_type": "bart",
                    "vocab_size": 51289,
                    "d_model": 1024,
                    "encoder_layers": 12,
                    "decoder_layers": 12,
                    "encoder_ffn_dim": 4096,
                    "decoder_ffn_dim": 4096,
                    "encoder_attention_heads": 16,
                    "decoder_attention_heads": 16,
                    "max_position_embeddings": 4096,
                },
                "vision_config": {
                    "embed_dim": [256, 512, 1024, 2048],
                    "num_heads": [8, 16, 32, 64],
                    "num_groups": [8, 16, 32, 64],
                    "projection_dim": 1024,
                },
            },
            "action_expert": {"kind": "soft_prompt"},
            "action_dim": channels,
            "action_horizon": 30,
            "state_dim": channels,
            "proprioception": "expert",
            "prediction": "action",
            "loss_reduction": "per_channel",
            "loss_channel_weights": weights,
            "binary_channels": grippers,
            "time_sampler": "stratified",
            "time_scale": 1.0,
            "sampler": "renoise",
            "domains": [f"domain_{index}" for index in range(30)],
            "language_tokens": 50,
        }
        return cls(**{**fields, **overrides})

    @classmethod
    def qwen_vla(cls, **overrides) -> "WallVLAConfig":
        """Qwen-VLA: Qwen3.5-4B and a 16 x 1536 DiT with K = 64 channels (section 2.2)."""
        fields = {
            "vlm_config": {
                "model_type": "qwen3_5",
                "text_config": {
                    "model_type": "qwen3_5_text",
                    "vocab_size": 248320,
                    "hidden_size": 2560,
                    "intermediate_size": 9216,
                    "num_hidden_layers": 32,
                    "num_attention_heads": 16,
                    "num_key_value_heads": 4,
                    "head_dim": 256,
                    "linear_num_key_heads": 16,
                    "linear_num_value_heads": 32,
                },
                "vision_config": {"out_hidden_size": 2560},
                "tie_word_embeddings": True,
            },
            "action_expert": {"kind": "dit"},
            "action_dim": 64,
            "action_horizon": 16,
            "proprioception": "none",
            "loss_space": "velocity",
            "loss_reduction": "per_channel",
            "text_loss_weight": 0.1,
        }
        return cls(**{**fields, **overrides})

    @classmethod
    def mot_testbed(cls, **overrides) -> "WallVLAConfig":
        """The testbed of "Rethinking VLA scaling": InternVL-3.5-2B and an expert of equal depth, heads and head width.

        The paper gives 0.7B for the expert at width 1024, which is a SwiGLU of 6144.
        """
        fields = {
            "vlm_config": {
                "model_type": "internvl",
                "text_config": {
                    "model_type": "qwen3",
                    "vocab_size": 151936,
                    "hidden_size": 2048,
                    "intermediate_size": 6144,
                    "num_hidden_layers": 28,
                    "num_attention_heads": 16,
                    "num_key_value_heads": 8,
                    "head_dim": 128,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                },
                "tie_word_embeddings": True,
            },
            "action_expert": {"hidden_size": 1024, "intermediate_size": 6144},
            "action_dim": 64,
            "action_horizon": 16,
            "state_dim": 64,
            "proprioception": "expert",
            "loss_space": "velocity",
            "time_sampler": "uniform",
        }
        return cls(**{**fields, **overrides})

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


__all__ = ["DiTExpertConfig", "MoTExpertConfig", "SoftPromptExpertConfig", "WallVLAConfig"]
