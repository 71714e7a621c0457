"""WallVLA: vision-language-action models as Hugging Face models.

Names are imported on first use (PEP 562), so `import wallvla` costs nothing and never imports torch.
"""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_DEFINED_IN = {
    "BinningActionCodec": "baseline_codecs_wallvla",
    "Embodiment": "action_space_wallvla",
    "FASTActionCodec": "baseline_codecs_wallvla",
    "WallVLAActionCodec": "action_codec_wallvla",
    "WallVLAActionCodecConfig": "action_codec_wallvla",
    "DiTExpertConfig": "configuration_wallvla",
    "MoTExpertConfig": "configuration_wallvla",
    "SoftPromptExpertConfig": "configuration_wallvla",
    "WallVLAConfig": "configuration_wallvla",
    "WallVLAForConditionalGeneration": "modeling_wallvla",
    "WallVLAOutput": "modeling_wallvla",
    "WallVLAProcessor": "processing_wallvla",
}

__all__ = [
    "BinningActionCodec",
    "Embodiment",
    "FASTActionCodec",
    "WallVLAActionCodec",
    "WallVLAActionCodecConfig",
    "DiTExpertConfig",
    "MoTExpertConfig",
    "SoftPromptExpertConfig",
    "WallVLAConfig",
    "WallVLAForConditionalGeneration",
    "WallVLAOutput",
    "WallVLAProcessor",
    "__version__",
    "register_auto_classes",
]

if TYPE_CHECKING:
    from .action_codec_wallvla import WallVLAActionCodec, WallVLAActionCodecConfig
    from .action_space_wallvla import Embodiment
    from .baseline_codecs_wallvla import BinningActionCodec, FASTActionCodec
    from .configuration_wallvla import DiTExpertConfig, MoTExpertConfig, SoftPromptExpertConfig, WallVLAConfig
    from .modeling_wallvla import WallVLAForConditionalGeneration, WallVLAOutput
    from .processing_wallvla import WallVLAProcessor


def __getattr__(name: str):
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = vars(importlib.import_module(f".{_DEFINED_IN[name]}", __name__))[name]
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_DEFINED_IN})


def register_auto_classes() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoProcessor` use the installed classes for "wallvla" and its action codec.

    From then on a checkpoint loads without `trust_remote_code`, and the code files beside its weights are ignored.
    Only this function registers anything: a registration in the flat files would make every later checkpoint of the
    process run the code of the first one.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from .action_codec_wallvla import WallVLAActionCodec, WallVLAActionCodecConfig
    from .configuration_wallvla import WallVLAConfig
    from .modeling_wallvla import WallVLAForConditionalGeneration
    from .processing_wallvla import WallVLAProcessor

    AutoConfig.register(WallVLAActionCodecConfig.model_type, WallVLAActionCodecConfig, exist_ok=True)
    AutoModel.register(WallVLAActionCodecConfig, WallVLAActionCodec, exist_ok=True)
    AutoConfig.register(WallVLAConfig.model_type, WallVLAConfig, exist_ok=True)
    AutoModel.register(WallVLAConfig, WallVLAForConditionalGeneration, exist_ok=True)
    AutoModelForImageTextToText.register(WallVLAConfig, WallVLAForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(WallVLAConfig, WallVLAProcessor, exist_ok=True)
