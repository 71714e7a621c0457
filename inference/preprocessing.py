"""Camera frames to patches on the device, in integers: every byte equals what the processor's Pillow makes.

Pillow resizes 8-bit images with fixed-point weights and rounds to 8 bits after each axis, so integer arithmetic
reproduces it exactly, on any device and whatever the float32 settings are.

Shapes: I images of one size, h and w in pixels.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


PRECISION_BITS = 22  # of Pillow's fixed-point weights: 32 less 8 for the pixel and 2 for sums beyond [0, 1]
SUPPORT = 2.0  # of the bicubic filter, in source pixels


def bicubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5 ("Cubic convolution interpolation", 1981, equation 15)."""
    x = np.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@lru_cache(maxsize=256)
def resize_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Which source pixels make each target pixel of one axis, as `PIL.Image.resize` with BICUBIC.

    Returns:
        Indices and fixed-point weights, both (target, taps) int64; unused taps have weight 0.
    """
    scale = source / target
    stretch = max(scale, 1.0)  # shrinking widens the filter: antialiasing
    centers = (np.arange(target) + 0.5) * scale
    first = np.maximum((centers - SUPPORT * stretch + 0.5).astype(np.int64), 0)
    stop = np.minimum((centers + SUPPORT * stretch + 0.5).astype(np.int64), source)
    indices = first[:, None] + np.arange(2 * math.ceil(SUPPORT * stretch) + 1)  # (target, taps)
    weights = bicubic((indices - centers[:, None] + 0.5) / stretch)
    weights = np.where(indices < stop[:, None], weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = np.trunc(weights * (1 << PRECISION_BITS) + np.copysign(0.5, weights)).astype(np.int64)
    return np.minimum(indices, source - 1), fixed


class FrameResizer:
    """Resizes frames of one size as the processor does: to the longer side, then to whole patches.

    Args:
        sizes: (width, height) of the frames and after each step.
        device: where the frames are.
    """

    def __init__(self, sizes: list[tuple[int, int]], device: torch.device):
        self._passes = []  # (dimension, source indices (target, taps), weights (target, taps))
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            for dimension, source, target in ((2, before[0], after[0]), (1, before[1], after[1])):
                if source != target:
                    indices, weights = (torch.from_numpy(array).to(device) for array in resize_taps(source, target))
                    self._passes.append((dimension, indices, weights.int()))

    def __call__(self, frames: Tensor) -> Tensor:
        """(I, h, w, 3) uint8 -> (I, h', w', 3) uint8."""
        for dimension, indices, weights in self._passes:
            taps = frames.index_select(dimension, indices.flatten()).unflatten(dimension, indices.shape).int()
            taps *= weights.view(*weights.shape, *[1] * (3 - dimension))
            total = taps.sum(dim=dimension + 1, dtype=torch.int32) + (1 << PRECISION_BITS - 1)
            frames = (total >> PRECISION_BITS).clamp_(0, 255).byte()
        return frames


def cut_patches(frames: Tensor, patch: int, merge: int) -> Tensor:
    """Frames (I, h, w, 3) to patches (patches, 3 * patch^2) uint8 in the order of the image processor.

    Image by image, blocks of merge x merge patches row by row; within a patch channel, y, x.
    """
    images, height, width, _ = frames.shape
    frames = frames.view(images, height // patch // merge, merge, patch, width // patch // merge, merge, patch, 3)
    return frames.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3 * patch * patch)
