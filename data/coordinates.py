"""Boxes and points of other datasets in the form that the model reads: `<box>[...]</box>`, `<point>[...]</point>`.

Sources count in pixels of the image, in 0 to 1, in 0 to 100 (PixMo) or in 0 to 1000 (Qwen2-VL, and many since); the
model counts in pixels of the image as it sees it, which is the processor's business (`format_box`, `format_point`).
"""

import re
from collections.abc import Sequence


# How many units an image side has; None: as many as it has pixels.
CONVENTIONS = {"pixel": None, "unit": 1.0, "percent": 100.0, "thousand": 1000.0}

_N = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX_TEXT = rf"\[{_N},{_N},{_N},{_N}\]"
_POINT_TEXT = rf"\[{_N},{_N}\]"
# Spellings, tried in this order; each gives four or two numbers.
_SPELLINGS = (
    re.compile(rf"<box>\s*{_BOX_TEXT}\s*</box>"),
    re.compile(rf"<point>\s*{_POINT_TEXT}\s*</point>"),
    re.compile(rf"<\|box_start\|>\({_N},{_N}\),\({_N},{_N}\)<\|box_end\|>"),  # Qwen2-VL
    re.compile(rf'\{{\s*"bbox_2d"\s*:\s*{_BOX_TEXT}[^{{}}]*\}}'),  # Qwen2.5-VL
    re.compile(rf'\{{\s*"point_2d"\s*:\s*{_POINT_TEXT}[^{{}}]*\}}'),
    re.compile(r'<point x="(-?\d+(?:\.\d+)?)" y="(-?\d+(?:\.\d+)?)"[^>]*>[^<]*</point>'),  # PixMo, Molmo
    re.compile(rf"\({_N},{_N}\)"),  # RoboPoint: [(0.25, 0.31), (0.4, 0.5)]
)


def to_pixels(values: Sequence[float], convention: str, image_size: tuple[int, int]) -> tuple[float, ...]:
    """Coordinates x, y, x, y, ... of a convention in pixels of an image of `image_size` (width, height).

    Raises:
        ValueError: an unknown convention, or a coordinate outside the image by more than a hundredth of its side:
            then the convention is another one.
    """
    units = _units(convention)
    scaled = tuple(
        value if units is None else value / units * image_size[axis % 2] for axis, value in enumerate(values)
    )
    for axis, value in enumerate(scaled):
        side = image_size[axis % 2]
        if not -0.01 * side <= value <= 1.01 * side:
            raise ValueError(
                f"Found coordinates {list(values)} as {convention!r}: {value:.1f} lies outside an image of "
                f"{image_size[0]} x {image_size[1]} pixels. Correct the convention ({', '.join(CONVENTIONS)})."
            )
    return tuple(min(max(value, 0.0), float(image_size[axis % 2])) for axis, value in enumerate(scaled))


def from_pixels(values: Sequence[float], convention: str, image_size: tuple[int, int]) -> tuple[float, ...]:
    """Inverse of `to_pixels`, for coordinates inside the image."""
    units = _units(convention)
    return tuple(value if units is None else value / image_size[axis % 2] * units for axis, value in enumerate(values))


def convert_text(text: str, convention: str, image_size: tuple[int, int], processor) -> str:
    """`text` with every box and point in the model's form.

    Args:
        text: may use any of the spellings above.
        convention: what its numbers count; a key of CONVENTIONS.
        image_size: (width, height) of the image that it is about.
        processor: a `WallVLAProcessor`, or anything with `format_box` and `format_point`.
    """
    pieces, start = [], 0
    while True:
        found = [match for match in (spelling.search(text, start) for spelling in _SPELLINGS) if match]
        if not found:
            return "".join([*pieces, text[start:]])
        match = min(found, key=lambda match: (match.start(), -match.end()))
        values = to_pixels([float(value) for value in match.groups()], convention, image_size)
        written = processor.format_box if len(values) == 4 else processor.format_point
        pieces += [text[start : match.start()], written(values, image_size)]
        start = match.end()


def _units(convention: str) -> float | None:
    if convention not in CONVENTIONS:
        raise ValueError(f"Found coordinates {convention!r}; known are {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[convention]
