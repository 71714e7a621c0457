"""Action chunks as the model sees them, with the state and the vision features of their frames: no image, no text."""

import numpy as np
import torch

from ..action_space_wallvla import Embodiment
from .lerobot import LeRobotDataset


class ActionChunks:
    """Map-style dataset of what an action codec is trained on, one chunk per frame; read it in batches.

    A batch is made at once by `__getitems__`, which torch's data loader prefers: `collate_fn` is then the identity.

    Args:
        datasets: LeRobot datasets of one robot, each read with the embodiment's action horizon.
        embodiment: of the robot, with statistics.
        action_dim, state_dim: channels D and S of the codec.
        features: vision features (N, F) of each dataset's frames, or `None`.

    Batch: `actions` (B, H, D), `state` (B, S) float32 normalised, 0 in absent channels; `action_mask` (B, H, D) bool;
    `domain_ids` (B,) int64; with features `features` and `next_features` (B, F) float32, of the frame the chunk starts
    from and the one after its last step (the episode's last frame if it ends before).

    Raises:
        ValueError: a dataset with another horizon, or features of another number of frames.
    """

    def __init__(
        self,
        datasets: list[LeRobotDataset],
        embodiment: Embodiment,
        action_dim: int,
        state_dim: int,
        features: list[np.ndarray] | None = None,
    ):
        for position, dataset in enumerate(datasets):
            if dataset.action_horizon != embodiment.action_horizon:
                raise ValueError(
                    f"{dataset.root} is read with action_horizon {dataset.action_horizon}, the embodiment has "
                    f"{embodiment.action_horizon}. Read the dataset with the embodiment's."
                )
            if features is not None and len(features[position]) != len(dataset):
                raise ValueError(
                    f"{dataset.root} has {len(dataset)} frames, its features have {len(features[position])}. Compute "
                    "them again for this selection of episodes."
                )
        self.datasets, self.embodiment, self.features = datasets, embodiment, features
        self.action_dim, self.state_dim = action_dim, state_dim
        self._ends = np.cumsum([len(dataset) for dataset in datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """The batch of `indices`, in their order."""
        indices = np.asarray(indices)
        source = np.searchsorted(self._ends, indices, side="right")
        local = indices - np.concatenate([[0], self._ends[:-1]])[source]
        size, horizon = len(indices), self.embodiment.action_horizon
        batch = {
            "actions": np.zeros((size, horizon, self.action_dim), dtype=np.float32),
            "state": np.zeros((size, self.state_dim), dtype=np.float32),
            "action_mask": np.zeros((size, horizon, self.action_dim), dtype=bool),
            "domain_ids": np.full(size, self.embodiment.domain, dtype=np.int64),
        }
        if self.features is not None:
            for name in ("features", "next_features"):
                batch[name] = np.zeros((size, self.features[0].shape[1]), dtype=np.float32)
        for number, dataset in enumerate(self.datasets):
            rows = np.flatnonzero(source == number)
            if not len(rows):
                continue
            at = local[rows]
            chunks, is_pad = dataset.action_chunks(at)
            states = dataset.states[at]
            channels = self.embodiment.action_channels
            values = self.embodiment.encode_actions(chunks, states)
            where = np.ix_(rows, np.arange(horizon), channels)
            batch["actions"][where] = np.where(is_pad[..., None], 0.0, values)
            batch["action_mask"][where] = ~is_pad[..., None]
            if self.embodiment.state_width:
                batch["state"][np.ix_(rows, self.embodiment.state_channels)] = self.embodiment.encode_state(states)
            if self.features is not None:
                episode = np.searchsorted(dataset.episode_bounds[:, 1], at, side="right")
                after = np.minimum(at + horizon, dataset.episode_bounds[episode, 1] - 1)
                batch["features"][rows] = self.features[number][at]
                batch["next_features"][rows] = self.features[number][after]
        return {name: torch.from_numpy(values) for name, values in batch.items()}
