"""Normalisation statistics of an embodiment, over exactly the numbers that the model will see."""

from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from ..action_space_wallvla import Embodiment
from .lerobot import LeRobotDataset


CHUNKS_AT_ONCE = 1024  # chunks that are transformed together: bounds the memory of the float64 intermediates


def compute_statistics(
    dataset: LeRobotDataset | Sequence[LeRobotDataset],
    embodiment: Embodiment,
    *,
    chunk_stride: int = 1,
    progress: bool = True,
) -> dict[str, dict[str, list[float]]]:
    """Statistics of states and actions after the embodiment's change of layout and reference frame.

    States count once per frame. Actions in reference frame "absolute" count once per frame too; in the other frames
    they depend on where a chunk starts, so every step of every chunk counts, without the steps past the end of the
    episode. Quantiles are exact (numpy's linear interpolation over all values). No image is decoded.

    Args:
        dataset: one dataset or several of the same robot.
        embodiment: anything with `transform_state`, `transform_actions`, `state_width`, `action_width`,
            `reference_frame` and `action_horizon`; its own statistics are not used.
        chunk_stride: use only the chunks that start at every n-th frame of an episode, where memory (4 bytes per
            channel and step: N * H * K * 4) is short. Only for reference frames other than "absolute".
        progress: whether to show a progress bar.

    Returns:
        `{"state": {...}, "action": {...}}` of q01, q99, mean, std, min and max, lists of one float per column of
        `transform_state` and `transform_actions`: what `Embodiment(statistics=...)` takes.

    Raises:
        ValueError: the dataset's vectors do not fit the embodiment's layouts, or its chunks have another length.
    """
    datasets = [dataset] if isinstance(dataset, LeRobotDataset) else list(dataset)
    if not datasets:
        raise ValueError("Found no dataset. Give at least one.")
    if chunk_stride < 1:
        raise ValueError(f"chunk_stride is {chunk_stride}; it must be at least 1.")
    for each in datasets:
        _check_fit(each, embodiment)
    states, actions = [], []
    total = sum(each.num_episodes for each in datasets)
    with tqdm(total=total, desc="statistics", unit="episode", disable=None if progress else True) as bar:
        for each in datasets:
            for start, stop in each.episode_bounds:
                states.append(_transformed_states(each, embodiment, start, stop))
                actions += _transformed_actions(each, embodiment, start, stop, chunk_stride)
                bar.update()
    return {"state": _summary(states), "action": _summary(actions)}


def _check_fit(dataset: LeRobotDataset, embodiment: Embodiment):
    for kind, found, expected in (
        # An empty state layout is a robot without proprioception: whatever the dataset has is not used.
        ("state", dataset.states.shape[1], embodiment.state_width or dataset.states.shape[1]),
        ("action", dataset.actions.shape[1], embodiment.action_width),
    ):
        if found != expected:
            raise ValueError(
                f"{dataset.root} has {found} {kind} numbers per frame; the embodiment's {kind}_layout has {expected}. "
                "Correct the layout."
            )
    if embodiment.reference_frame != "absolute" and dataset.action_horizon != embodiment.action_horizon:
        raise ValueError(
            f"{dataset.root} is read with action_horizon {dataset.action_horizon}; the embodiment has "
            f"{embodiment.action_horizon}. Statistics of actions in reference frame {embodiment.reference_frame!r} "
            "depend on it: read the dataset with the embodiment's."
        )


def _transformed_states(dataset: LeRobotDataset, embodiment: Embodiment, start: int, stop: int) -> np.ndarray:
    """float32 (frames, K)."""
    if embodiment.state_width == 0:
        return np.empty((stop - start, 0), dtype=np.float32)
    return embodiment.transform_state(dataset.states[start:stop]).astype(np.float32)


def _transformed_actions(
    dataset: LeRobotDataset, embodiment: Embodiment, start: int, stop: int, chunk_stride: int
) -> list[np.ndarray]:
    """Model actions of one episode: a list of float32 (values, K)."""
    if embodiment.reference_frame == "absolute":
        actions = embodiment.transform_actions(dataset.actions[start:stop, None], dataset.states[start:stop])
        return [actions[:, 0].astype(np.float32)]
    parts = []
    starts = np.arange(start, stop, chunk_stride)
    for first in range(0, len(starts), CHUNKS_AT_ONCE):
        indices = starts[first : first + CHUNKS_AT_ONCE]
        chunks, is_pad = dataset.action_chunks(indices)
        model_actions = embodiment.transform_actions(chunks, dataset.states[indices])  # (chunks, H, K)
        parts.append(model_actions[~is_pad].astype(np.float32))
    return parts


def _summary(parts: list[np.ndarray]) -> dict[str, list[float]]:
    """Statistics of each column of the stacked parts (values, K), column by column to keep float64 copies small."""
    columns = [np.concatenate([part[:, k] for part in parts]).astype(np.float64) for k in range(parts[0].shape[1])]
    quantiles = [np.quantile(column, [0.01, 0.99]) for column in columns]
    return {
        "q01": [float(low) for low, _ in quantiles],
        "q99": [float(high) for _, high in quantiles],
        "mean": [float(column.mean()) for column in columns],
        "std": [float(column.std()) for column in columns],
        "min": [float(column.min()) for column in columns],
        "max": [float(column.max()) for column in columns],
    }
