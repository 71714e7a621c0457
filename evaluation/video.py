"""Rollouts as mp4 files that every browser plays (H.264, yuv420p), through PyAV."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont


CAPTION_HEIGHT = 22  # pixels


def write_video(
    path: Path | str,
    frames: Sequence[np.ndarray],
    fps: float,
    caption: str | None = None,
    min_side: int = 256,
    crf: int = 20,
) -> Path:
    """Writes frames as an mp4; the file appears only when it is complete.

    Args:
        path: the file to write; its folder is made.
        frames: uint8 (h, w, 3), all of one size; small ones are enlarged by a whole factor without blurring.
        fps: frames per second.
        caption: text of a strip below the pictures.
        min_side: frames are enlarged until their shorter side has at least this many pixels.
        crf: quality, 0 (lossless) to 51.

    Raises:
        ValueError: no frames, or frames of different shapes or not uint8 RGB.
    """
    frames = [np.asarray(frame) for frame in frames]
    if not frames:
        raise ValueError(f"There are no frames to write to {path}.")
    shapes = {(frame.shape, frame.dtype.name) for frame in frames}
    if len(shapes) > 1 or frames[0].ndim != 3 or frames[0].shape[2] != 3 or frames[0].dtype != np.uint8:
        raise ValueError(f"Frames of a video are uint8 (h, w, 3), all alike; got {sorted(shapes)}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    factor = max(1, -(-min_side // min(frames[0].shape[:2])))
    strip = None if caption is None else caption_strip(caption, frames[0].shape[1] * factor)
    pictures = (_even_sides(_with_strip(enlarge(frame, factor), strip)) for frame in frames)
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": str(crf), "preset": "veryfast"}
            for index, picture in enumerate(pictures):
                if index == 0:  # the encoder is opened by its first frame
                    stream.height, stream.width = picture.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Repeats every pixel `factor` times in both directions."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def caption_strip(text: str, width: int) -> np.ndarray:
    """One line of dark text on white, uint8 (CAPTION_HEIGHT, width, 3); text that does not fit is shortened."""
    font = ImageFont.load_default(size=13)
    while font.getlength(text) > width - 8 and len(text) > 1:
        text = text[:-2].rstrip() + "…"
    strip = Image.new("RGB", (width, CAPTION_HEIGHT), "white")
    ImageDraw.Draw(strip).text((4, CAPTION_HEIGHT // 2), text, fill="#222222", font=font, anchor="lm")
    return np.asarray(strip)


def _with_strip(picture: np.ndarray, strip: np.ndarray | None) -> np.ndarray:
    return picture if strip is None else np.concatenate([picture, strip])


def _even_sides(picture: np.ndarray) -> np.ndarray:
    """Chroma is stored at half size, so both sides must be even: the last row or column is repeated."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
