"""What a run over several processes needs beside the framework: complete batches, checkpoints whole or absent."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..modeling_wallvla import WallVLAForConditionalGeneration


# In a checkpoint: how much of the data mixture was used
DATA_STATE = "mixture_state.json"

logger = logging.getLogger(__name__)


def complete_batch(batch: Mapping[str, Tensor], model: WallVLAForConditionalGeneration) -> dict[str, Tensor]:
    """Adds to a batch what it lacks for every module of the model to run, without weight in any loss.

    Sharded and replicated modules talk to the other ranks whenever they run, forward and backward. A rank whose batch
    has no image, no label or no action would skip the vision tower, the LM head or the action expert, and the others
    would wait for it for ever. So its batch gets an image on a padding token, labels of -100 and a chunk whose mask is
    False everywhere: their gradients are zero, and they count no element (`tests/test_sharding.py`).

    Rows of one layout always have images, and a VLM without an LM head needs no labels.

    Args:
        batch: see "Batch" in docs/architecture.md.
        model: that gets it.

    Returns:
        A batch with all those keys; sequences are longer by the tokens of an image if one was added.
    """
    batch, config = dict(batch), model.config
    ids = batch["input_ids"]
    if "pixel_values" not in batch and config.language_tokens is None:
        image, tokens = model.vl_expert.blank_image(ids.device)
        batch |= image
        if "mm_token_type_ids" not in batch:
            batch["mm_token_type_ids"] = torch.zeros_like(ids)
        columns = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0, "labels": -100}
        for key, value in columns.items():
            if key in batch:
                batch[key] = torch.cat([batch[key].new_full((len(ids), tokens), value), batch[key]], dim=1)
        batch["input_ids"][0, :tokens] = config.vlm_config.image_token_id
        batch["mm_token_type_ids"][0, :tokens] = 1
    if "labels" not in batch and model.get_output_embeddings() is not None:
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
    if "actions" not in batch:
        shape = (len(ids), config.action_horizon, config.action_dim)
        batch["actions"] = torch.zeros(shape, device=ids.device)
        batch["action_mask"] = torch.zeros(shape, dtype=torch.bool, device=ids.device)
    if "domain_ids" not in batch:
        batch["domain_ids"] = torch.zeros_like(ids[:, 0])
    if config.proprioception in ("projected", "expert") and "states" not in batch:
        batch["states"] = torch.zeros(len(ids), config.state_dim, device=ids.device)
        batch["state_mask"] = torch.zeros_like(batch["states"], dtype=torch.bool)
    return batch


def unfinished_marker(checkpoint: Path) -> Path:
    """The file beside a checkpoint folder that exists while the folder is being written."""
    return checkpoint.with_name(f"{checkpoint.name}.unfinished")


def discard_unfinished(output_dir: str | Path) -> None:
    """Deletes the checkpoints of a run that were being written when it was killed.

    The marker goes last, so that being killed in here is no harm either. After that
    `transformers.trainer_utils.get_last_checkpoint` finds whole checkpoints only.
    """
    for marker in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*.unfinished")):
        checkpoint = marker.with_suffix("")
        logger.warning("%s was being written when its run ended: deleted.", checkpoint)
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
        marker.unlink()


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The last whole checkpoint of a run, or `None`. Reads only, so every rank may ask."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    whole = [
        path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdecimal() and not unfinished_marker(path).exists()
    ]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
