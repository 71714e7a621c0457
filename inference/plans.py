"""What depends on the layout of cameras and prompt alone: orders, windows, positions. Computed on the host, in numpy.

The stock model computes the same in every call, with loops and `.tolist()` that wait for the device.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor


def window_order(rows: int, columns: int, window: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Orders a grid of tokens so that the tokens of an attention window are neighbours, and windows of equal size too.

    Args:
        rows, columns: of the grid.
        window: side of a window; those at the right and lower edge may be smaller.

    Returns:
        Permutation (rows * columns,), and (number of windows, tokens of each) by falling size.
    """
    tokens = np.arange(rows * columns).reshape(rows, columns)
    windows = [
        tokens[row : row + window, column : column + window].ravel()
        for row in range(0, rows, window)
        for column in range(0, columns, window)
    ]
    windows.sort(key=len, reverse=True)
    return np.concatenate(windows), [(len(list(run)), size) for size, run in groupby(map(len, windows))]


@dataclass(frozen=True)
class VisionRun:
    """Consecutive images with one patch grid: their number, the patches of each, and (windows, patches) groups."""

    images: int
    patches: int
    windows: list[tuple[int, int]]


@dataclass(frozen=True)
class VisionPlan:
    """Order and rope of the vision encoder for one layout of cameras.

    order: of the merged tokens, (merged tokens,) int64: the token that is computed at each place.
    cos, sin: in that order, (patches, P) float32.
    """

    runs: list[VisionRun]
    order: Tensor
    cos: Tensor
    sin: Tensor


def plan_vision(grids: np.ndarray, merge: int, window: int, inverse_frequencies: Tensor) -> VisionPlan:
    """Plans the images of a call.

    Args:
        grids: patch rows and columns of each image, (images, 2) int64.
        merge: side of the blocks of patches that become one token.
        window: side of an attention window, in merged tokens.
        inverse_frequencies: of the axial rope, (P / 4,) float32, on the device of the result.
    """
    runs, orders, positions, start = [], [], [], 0
    for (rows, columns), run in groupby(map(tuple, grids.tolist())):
        images = len(list(run))
        order, windows = window_order(rows // merge, columns // merge, window)
        y, x = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge).swapaxes(2, 3)
        blocks = np.stack([y, x], axis=-1).reshape(-1, merge**2, 2)  # (merged tokens, patches of a block, 2)
        runs.append(VisionRun(images, rows * columns, [(count, size * merge**2) for count, size in windows]))
        for _ in range(images):
            orders.append(order + start)
            positions.append(blocks[order].reshape(-1, 2))
            start += len(order)
    device = inverse_frequencies.device
    places = torch.from_numpy(np.concatenate(positions)).to(device).float()  # (patches, 2)
    angles = (places[..., None] * inverse_frequencies).flatten(1).repeat(1, 2)  # (patches, P)
    return VisionPlan(runs, torch.from_numpy(np.concatenate(orders)).to(device), angles.cos(), angles.sin())


def rope_positions(is_image: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, int]:
    """Multimodal rope positions of one prompt (Qwen2-VL, section 2.1): text counts on, an image spans a square.

    Args:
        is_image: (S,) bool.
        grids: rows and columns of each image in tokens, (images, 2) int64.

    Returns:
        Positions (time, y, x), (3, S) int64, and the position of what follows.
    """
    starts = np.flatnonzero(is_image & ~np.concatenate([[False], is_image[:-1]]))
    positions = np.empty((3, len(is_image)), dtype=np.int64)
    token = position = 0
    for start, (rows, columns) in zip(starts, grids, strict=True):
        positions[:, token:start] = position + np.arange(start - token)
        position += start - token
        token = start + rows * columns
        positions[0, start:token] = position
        positions[1:, start:token] = position + np.indices((rows, columns)).reshape(2, -1)
        position += max(rows, columns)
    positions[:, token:] = position + np.arange(len(is_image) - token)
    return positions, int(position + len(is_image) - token)
