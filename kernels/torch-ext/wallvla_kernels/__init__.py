"""Fused operations of WallVLA, a vision-language-action model."""

from . import layers
from .functions import add_rms_norm, qkv_rope_store, rms_norm, rope, swiglu, vision_rope_


__all__ = ["add_rms_norm", "layers", "qkv_rope_store", "rms_norm", "rope", "swiglu", "vision_rope_"]
