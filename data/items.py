"""Action samples from a dataset object that yields LeRobot's items, such as lerobot's own dataset class."""

from collections.abc import Sequence

import numpy as np

from ..action_space_wallvla import short_camera_key


class LeRobotItems:
    """Map-style dataset of action samples (`docs/architecture.md`) over somebody else's dataset object.

    The object is asked for nothing but `len` and items by index with LeRobot's keys: `observation.images.*` (float
    (3, h, w) in [0, 1], or uint8 in either order of axes), `observation.state` (S,), `action` (H, D), `task`, and
    `action_is_pad` (H,). It has to be made with `delta_timestamps={"action": [i / fps for i in range(horizon)]}`, so
    that `action` is a chunk.

    Args:
        dataset: the object.
        embodiment: written into every sample; a key of `processor.embodiments`.
        action_horizon: H.
        cameras: camera keys, full or short. Default: all that the first item has.

    Raises:
        ValueError: the first item lacks a key, or its action is no chunk of H steps.
    """

    def __init__(
        self,
        dataset: Sequence[dict],
        *,
        embodiment: str,
        action_horizon: int,
        cameras: Sequence[str] | None = None,
        state_key: str = "observation.state",
        action_key: str = "action",
    ):
        self._dataset, self.embodiment, self.action_horizon = dataset, embodiment, action_horizon
        self._state_key, self._action_key = state_key, action_key
        item = dataset[0]
        absent = [key for key in (state_key, action_key, "task") if key not in item]
        if absent:
            raise ValueError(f"Items of the dataset have no {', '.join(absent)}; they have {', '.join(item)}.")
        images = {key: key for key in item if key.startswith("observation.image")}
        names = {short_camera_key(key): key for key in images} | images
        unknown = [camera for camera in cameras or () if camera not in names]
        if unknown:
            raise ValueError(
                f"Items of the dataset have no camera {', '.join(unknown)}; they have {', '.join(images)}."
            )
        self.camera_keys = list(images) if cameras is None else [names[camera] for camera in cameras]
        chunk = np.asarray(item[action_key])
        if chunk.ndim != 2 or len(chunk) != action_horizon:
            raise ValueError(
                f"Items of the dataset have {action_key} of shape {chunk.shape}; it must be a chunk of "
                f"{action_horizon} steps. Make the dataset with delta_timestamps={{{action_key!r}: [i / fps for i in "
                f"range({action_horizon})]}}."
            )

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict:
        """The sample of one item, with the keys of `LeRobotDataset`'s samples."""
        item = self._dataset[index]
        is_pad = item.get(f"{self._action_key}_is_pad")
        sample = {
            "images": {key: _pixels(item[key], key) for key in self.camera_keys},
            "instruction": item["task"],
            "state": np.asarray(item[self._state_key], dtype=np.float32).reshape(-1),
            "embodiment": self.embodiment,
            "actions": np.asarray(item[self._action_key], dtype=np.float32),
            "action_is_pad": np.zeros(self.action_horizon, bool) if is_pad is None else np.asarray(is_pad, dtype=bool),
            "dataset_index": index,
        }
        for name, kind in (("episode_index", int), ("frame_index", int), ("timestamp", float), ("subtask", str)):
            if item.get(name) is not None:
                sample[name] = kind(item[name])
        return sample


def _pixels(image, key: str) -> np.ndarray:
    """uint8 (h, w, 3) of an image in any of LeRobot's forms."""
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"{key} has shape {np.shape(image)}; an image is (3, h, w) or (h, w, 3). Depth is no camera.")
    if pixels.dtype != np.uint8:
        if pixels.min() < -1e-3 or pixels.max() > 1 + 1e-3:
            raise ValueError(f"{key} has values from {pixels.min()} to {pixels.max()}; floats are between 0 and 1.")
        pixels = np.round(pixels * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels)
