"""A pretrained VLM and a new action expert, as a repository of this layout: where systems without weights start.

Qwen-VLA and the MoT testbed have no published weights; their papers start from a VLM and a random action expert.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    set_seed,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..action_experts_wallvla import ACTION_EXPERTS
from ..configuration_wallvla import WallVLAConfig
from ..images_wallvla import florence2_image_processor, internvl_image_processor
from ..modeling_wallvla import WallVLAForConditionalGeneration
from ..processing_wallvla import WallVLAProcessor
from ..prompts_wallvla import INTERN_VL, QWEN_CHAT, QWEN_VLA, X_VLA, PromptFormat
from ..vl_experts_wallvla import VL_EXPERTS


@dataclass(frozen=True)
class System:
    """A system that can be composed.

    preset: its configuration with another `vlm_config`.
    prompts: by `model_type` of the VLM; these are the VLMs that it takes.
    """

    preset: Callable[..., WallVLAConfig]
    prompts: dict[str, PromptFormat]


SYSTEMS = {
    "qwen_vla": System(WallVLAConfig.qwen_vla, {"qwen3_5": QWEN_VLA, "qwen3_vl": QWEN_VLA, "qwen2_5_vl": QWEN_VLA}),
    "mot_testbed": System(
        WallVLAConfig.mot_testbed, {"internvl": INTERN_VL, "qwen2_5_vl": QWEN_CHAT, "qwen3_vl": QWEN_CHAT}
    ),
    "x_vla": System(WallVLAConfig.x_vla, {"florence2": X_VLA}),
}
LONGEST_SIDE = 448  # of pictures that are no squares, in pixels
# Squares have other settings here than in the VLM's own repository: one tile, X-VLA's resolution
SQUARES = {"internvl": internvl_image_processor, "florence2": florence2_image_processor}


def compose(
    vlm: str,
    output: str | Path,
    system: str,
    robots: dict[str, str | Path] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> WallVLAConfig:
    """Writes a repository with the weights of a VLM and a random action expert.

    Args:
        vlm: Hub id or folder, in the layout of its own transformers class.
        output: folder that does not exist yet. It appears when it is complete.
        system: a key of `SYSTEMS`.
        robots: JSON files of embodiments by name. More can be added in fine-tuning.
        dtype: of the weights; the heads of the action expert stay in float32.
        seed: of the action expert.

    Raises:
        ValueError: a VLM that the system does not take or that lacks weights, or robots that do not fit.
        FileExistsError: `output` exists.
    """
    output, chosen = Path(output), SYSTEMS[system]
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another folder, or delete it first.")
    vlm_config = AutoConfig.from_pretrained(vlm)
    if vlm_config.model_type not in chosen.prompts:
        raise ValueError(
            f"{vlm} is a {vlm_config.model_type}; {system} takes {', '.join(chosen.prompts)}. Choose another VLM or "
            f"another system of {', '.join(SYSTEMS)}."
        )
    config = chosen.preset(vlm_config=vlm_config.to_dict(), dtype=dtype)
    processor = build_processor(vlm, config, chosen, robots or {})
    set_seed(seed)
    model = build_model(vlm, config, len(processor.tokenizer))
    processor.check_model(config)
    folder = output.with_name(output.name + ".partial")
    if folder.exists():
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    os.replace(folder, output)
    return config


def build_processor(
    vlm: str, config: WallVLAConfig, system: System, robots: dict[str, str | Path]
) -> WallVLAProcessor:
    """The VLM's own tokenizer and pictures with the prompts of the system."""
    tokenizer = AutoTokenizer.from_pretrained(vlm)
    kind = config.vlm_config.model_type
    prompts = system.prompts[kind]
    tokenizer.add_special_tokens({"extra_special_tokens": [prompts.image_token]}, replace_extra_special_tokens=False)
    config.vlm_config.image_token_id = tokenizer.convert_tokens_to_ids(prompts.image_token)
    return WallVLAProcessor(
        SQUARES[kind]() if kind in SQUARES else Qwen2VLImageProcessorPil.from_pretrained(vlm),
        tokenizer,
        {name: json.loads(Path(file).read_text()) for name, file in robots.items()},
        action_dim=config.action_dim,
        action_horizon=config.action_horizon,
        longest_side=None if kind in SQUARES else LONGEST_SIDE,
        state_dim=config.state_dim if config.proprioception == "expert" else None,
        proprioception=config.proprioception,
        prompt_format=prompts,
    )


def build_model(vlm: str, config: WallVLAConfig, vocabulary: int) -> WallVLAForConditionalGeneration:
    """The VLM's weights and a random action expert, without a second copy of either.

    Args:
        vlm, config: see `compose`.
        vocabulary: tokens of the tokenizer; a smaller embedding grows to it.

    Raises:
        ValueError: a VLM that lacks weights.
    """
    family = VL_EXPERTS[config.vlm_config.model_type](config.vlm_config, config.language_tokens)
    with torch.device("meta"):
        model = WallVLAForConditionalGeneration(config)
    stock, found = AutoModelForImageTextToText.from_pretrained(
        vlm, config=config.vlm_config, dtype=config.dtype, output_loading_info=True
    )
    missing = sorted(found["missing_keys"])
    if missing:  # which the framework makes up at random
        raise ValueError(f"{vlm} lacks {len(missing)} parameters of its model: {missing[:8]}. Download it again.")
    model.vlm = family.adopt(stock)
    expert = ACTION_EXPERTS[config.action_expert.kind](config)
    for module in expert.modules():
        model._init_weights(module)
    for name, parameter in expert.named_parameters():
        if not any(part in name for part in expert.fp32_modules):
            parameter.data = parameter.data.to(config.dtype)
    model.action_expert = expert
    rows = model.get_input_embeddings().num_embeddings
    if vocabulary > rows and config.language_tokens is None:
        model.resize_token_embeddings(math.ceil(vocabulary / 64) * 64)
        config.vlm_config.text_config.vocab_size = model.get_input_embeddings().num_embeddings
    return model
