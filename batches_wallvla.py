"""Samples to the arrays of a batch: tokens, states and actions.

Shapes: B samples, S tokens, H action steps and D action channels of the model, K channels of a robot.
"""

from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase

from .action_space_wallvla import Embodiment, stack_vectors


Groups = list[tuple[Embodiment, list[int]]]  # each robot of a batch and the numbers of its samples

NO_IMAGE = -1  # stands in a row for a view that a sample does not have


def token_arrays(
    rows: list[list[int]],
    learned: list[list[bool]] | None,
    image_counts: list[int],
    image_tokens: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    image_token: str,
    max_length: int | None,
) -> dict[str, np.ndarray]:
    """`input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` (B, S) int64, rows flush right.

    Args:
        rows: token ids of each sample, an image as one `image_token`, a view that is missing as one NO_IMAGE.
        learned: which of them become labels; `None`: no labels.
        image_counts: images of each sample.
        image_tokens: tokens of each image, (images,); its places are repeated as often.
        tokenizer, image_token: whose ids these are.
        max_length: the longest row that is no error.
    """
    size, image_id = len(rows), tokenizer.convert_tokens_to_ids(image_token)
    tokens = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
    row_of = np.repeat(np.arange(size), [len(row) for row in rows])
    is_image = tokens == image_id
    found = np.bincount(row_of[is_image], minlength=size)
    for index in np.flatnonzero(found != image_counts):
        raise ValueError(
            f"Found {found[index]} image tokens for {image_counts[index]} image(s) in sample {index}. The text "
            f"must not contain {image_token}: the processor writes one per image. Remove it."
        )
    repeats = np.ones(len(tokens), dtype=np.int64)
    repeats[is_image] = image_tokens
    repeats[tokens == NO_IMAGE] = image_tokens.max(initial=1)  # only where all images have as many
    tokens, row_of = np.repeat(tokens, repeats), np.repeat(row_of, repeats)

    lengths = np.bincount(row_of, minlength=size)
    longest = lengths.max()
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"Found {longest} tokens in sample {lengths.argmax()}, max_length is {max_length}. Cutting would "
            f"remove image tokens or the instruction: raise max_length, or lower longest_side."
        )
    where = row_of, np.arange(len(tokens)) - np.cumsum(lengths)[row_of] + longest  # flush right
    input_ids = np.full((size, longest), tokenizer.pad_token_id, dtype=np.int64)
    input_ids[where] = np.where(tokens == NO_IMAGE, tokenizer.pad_token_id, tokens)
    attention_mask = np.zeros_like(input_ids)
    attention_mask[where] = tokens != NO_IMAGE
    data = {"input_ids": input_ids, "attention_mask": attention_mask}
    data["mm_token_type_ids"] = (input_ids == image_id).astype(np.int64)
    if learned is not None:
        is_learned = np.repeat(np.fromiter(chain.from_iterable(learned), dtype=bool), repeats)
        data["labels"] = np.full_like(input_ids, -100)
        data["labels"][where] = np.where(is_learned, tokens, -100)
    return data


def state_values(samples: list[dict], groups: Groups, state_dim: int | None) -> dict[int, np.ndarray]:
    """{index of the sample: its normalised state, (state_dim,) or without `state_dim` (K,)}."""
    found = {}
    for embodiment, indices in groups:
        rows = [i for i in indices if samples[i].get("state") is not None and not samples[i].get("state_is_dropped")]
        if not rows or not embodiment.state_channels.size:
            continue
        values = embodiment.encode_state(stack_vectors([samples[i]["state"] for i in rows], rows, "state", 1))
        bound = np.inf if embodiment.normalization == "none" else 1.0
        for value, row in zip(values, rows, strict=True):
            if samples[row].get("state_noise") is not None:
                value[:] = np.clip(value + samples[row]["state_noise"][: len(value)], -bound, bound)
        if state_dim is not None:
            padded = np.tile(embodiment.padding("state", state_dim).astype(np.float64), (len(rows), 1))
            padded[:, embodiment.state_channels] = values
            values = padded
        found.update(zip(rows, values, strict=True))
    return found


def state_arrays(size: int, values: dict[int, np.ndarray], groups: Groups, state_dim: int) -> dict[str, np.ndarray]:
    """`states` and `state_mask` of `size` samples; rows without a state are zero."""
    states = np.zeros((size, state_dim), dtype=np.float32)
    mask = np.zeros((size, state_dim), dtype=bool)
    for embodiment, rows in groups:
        for row in rows:
            if row in values:
                states[row] = values[row]
                mask[row, embodiment.state_channels] = True
    return {"states": states, "state_mask": mask}


def action_arrays(samples: list[dict], groups: Groups, horizon: int, action_dim: int) -> dict[str, np.ndarray]:
    """`action_mask`, `action_padding`, `domain_ids` and, if the samples have them, `actions`.

    See `WallVLAProcessor.encode`.
    """
    shape = (len(samples), horizon, action_dim)
    data = {
        "action_mask": np.zeros(shape, dtype=bool),
        "action_padding": np.zeros((len(samples), action_dim), dtype=np.float32),
        "domain_ids": np.zeros(len(samples), dtype=np.int64),
    }
    indices = sorted(chain.from_iterable(rows for _, rows in groups))
    without = [index for index in indices if samples[index].get("actions") is None]
    if without and len(without) < len(indices):
        raise ValueError(
            f"Found no `actions` in sample {without[0]}, though other samples have them. A batch is for training "
            f"(all action samples have `actions`) or for inference (none has)."
        )
    if not without:
        data["actions"] = np.zeros(shape, dtype=np.float32)
    for embodiment, rows in groups:
        data["domain_ids"][rows] = embodiment.domain
        data["action_padding"][rows] = embodiment.padding("action", action_dim)
        if without:
            where = np.ix_(rows, np.arange(embodiment.action_horizon), embodiment.action_channels)
            data["action_mask"][where] = True
            continue
        by_steps = {}  # chunks near the end of an episode may be shorter
        for row in rows:
            by_steps.setdefault(len(samples[row]["actions"]), []).append(row)
        for steps, rows_of_steps in by_steps.items():
            values, valid = _encoded_chunks(samples, embodiment, rows_of_steps, steps)
            where = np.ix_(rows_of_steps, np.arange(steps), embodiment.action_channels)
            data["actions"][where] = np.where(valid, values, 0.0)
            data["action_mask"][where] = valid
    return data


def _encoded_chunks(
    samples: list[dict], embodiment: Embodiment, rows: list[int], steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised chunks (rows, steps, K) and which steps are real, (rows, steps, 1) bool."""
    if steps > embodiment.action_horizon:
        raise ValueError(
            f"Found {steps} action steps in sample {rows[0]}, the embodiment's action_horizon is "
            f"{embodiment.action_horizon}. Cut the chunk to that many steps when reading the dataset."
        )
    states = None
    if embodiment.reference_frame != "absolute":
        stateless = [row for row in rows if samples[row].get("state") is None]
        if stateless:
            raise ValueError(
                f"Found no state in sample {stateless[0]}, whose actions are {embodiment.reference_frame}: they "
                f"are measured from the current pose. Pass it; `state_is_dropped` keeps it out of the prompt."
            )
        states = stack_vectors([samples[row]["state"] for row in rows], rows, "state", 1)
    chunks = stack_vectors([samples[row]["actions"] for row in rows], rows, "actions", 2)
    is_pad = np.zeros((len(rows), steps), dtype=bool)
    for line, row in enumerate(rows):
        if samples[row].get("action_is_pad") is not None:
            flags = np.asarray(samples[row]["action_is_pad"], dtype=bool)
            if flags.shape != (steps,):
                raise ValueError(
                    f"Found action_is_pad of shape {flags.shape} and {steps} action steps in sample {row}. Each "
                    f"step has one entry."
                )
            is_pad[line] = flags
    return embodiment.encode_actions(chunks, states), ~is_pad[..., None]
