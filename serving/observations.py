"""From what a robot sends to what a policy reads: the adapter that an embodiment's `observation_keys` describe."""

import io

import numpy as np
from PIL import Image


MAX_IMAGE_SIDE = 4096
MAX_IMAGE_PIXELS = 4096 * 2160
MAX_INSTRUCTION = 2000  # characters


class RequestError(ValueError):
    """A request that cannot be served as it is. The message is about what the client sent, so the client may see it.

    kind: one word for programs: "bad_request", "safety_stop", "busy", ...
    """

    def __init__(self, message: str, kind: str = "bad_request") -> None:
        super().__init__(message)
        self.kind = kind


class ObservationAdapter:
    """Reads the observations of one kind of robot.

    Args:
        embodiment: an `Embodiment`.
        default_instruction: the task of clients that send none.
    """

    def __init__(self, embodiment, default_instruction: str | None = None) -> None:
        self._keys = embodiment.observation_keys
        self._cameras = tuple(embodiment.cameras)
        self._state_width = embodiment.state_width
        self._default_instruction = default_instruction

    def read(self, message: dict, task: str | None = None) -> dict:
        """`{"images": {camera: uint8 (h, w, 3)}, "state": float32 (S,), "instruction": str}` of a client's message.

        A key like "images/front" is looked up as it is, and as "front" inside of a map "images". Images are uint8
        arrays (h, w, 3) or (3, h, w), or the bytes of a JPEG file. Keys that the adapter does not know are ignored.
        `task` is the instruction of messages that have none.

        Raises:
            RequestError: a key is missing, or its value has another type, shape or size.
        """
        images, states, instruction = {}, [], task or self._default_instruction
        for key, target in self._keys:
            value = _look_up(message, key)
            if target == "instruction":
                instruction = self._instruction(value, key, instruction)
                continue
            if value is None:
                raise RequestError(
                    f"Found keys {_spell(message)}, but not {key!r}. This robot sends "
                    f"{', '.join(repr(name) for name, _ in self._keys)}."
                )
            if target == "state":
                states.append(_numbers(value, key))
            else:
                images[target] = read_image(value, key)
        state = np.concatenate(states) if states else np.empty(0, dtype=np.float32)
        if len(state) != self._state_width:
            raise RequestError(f"Found a state of {len(state)} numbers; this robot has {self._state_width}.")
        return {"images": {camera: images[camera] for camera in self._cameras}, "state": state} | {
            "instruction": instruction
        }

    @staticmethod
    def _instruction(value, key: str, default: str | None) -> str:
        value = default if value is None else value
        if isinstance(value, np.str_):
            value = str(value)
        if not isinstance(value, str) or not value.strip() or len(value) > MAX_INSTRUCTION or "<|" in value:
            raise RequestError(
                f"Found {_shorten(value)} as {key!r}. The task is given in words: a string of 1 to {MAX_INSTRUCTION} "
                f"characters without special tokens."
            )
        return value


def read_image(value, key: str) -> np.ndarray:
    """uint8 (h, w, 3) of an array or of the bytes of a JPEG file; nothing is decoded before its size is known.

    Raises:
        RequestError: not an image, too large, or damaged.
    """
    if isinstance(value, bytes):
        return _decode_jpeg(value, key)
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or 3 not in value.shape[::2]:
        found = f"{value.dtype} array {value.shape}" if isinstance(value, np.ndarray) else _shorten(value)
        raise RequestError(f"Found {found} as {key!r}. An image is a uint8 array (height, width, 3), or JPEG bytes.")
    if value.shape[2] != 3:
        value = np.ascontiguousarray(value.transpose(1, 2, 0))
    _check_size(value.shape[1], value.shape[0], key)
    return value


def _decode_jpeg(data: bytes, key: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:  # reads the header only
            _check_size(*image.size, key)
            return np.asarray(image.convert("RGB"))
    except RequestError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(
            f"Found {len(data)} bytes as {key!r} that are no intact JPEG file ({type(error).__name__})."
        ) from error


def _check_size(width: int, height: int, key: str) -> None:
    if not (0 < width <= MAX_IMAGE_SIDE and 0 < height <= MAX_IMAGE_SIDE and width * height <= MAX_IMAGE_PIXELS):
        raise RequestError(
            f"Found an image of {width} x {height} pixels as {key!r}. Sides are 1 to {MAX_IMAGE_SIDE}, at most "
            f"{MAX_IMAGE_PIXELS} pixels; send it smaller."
        )


def _look_up(message: dict, key: str):
    if key in message:
        return message[key]
    for part in key.split("/"):
        if not isinstance(message, dict) or part not in message:
            return None
        message = message[part]
    return message


def _numbers(value, key: str) -> np.ndarray:
    """A number, a list of numbers or an array (n,) as float32 (n,)."""
    try:
        numbers = np.atleast_1d(np.asarray(value))
    except ValueError as error:  # lists of different lengths
        raise RequestError(f"Found {_shorten(value)} as {key!r}. It is a vector of numbers.") from error
    if numbers.ndim != 1 or numbers.dtype.kind not in "fiub":
        raise RequestError(f"Found {numbers.dtype} {numbers.shape} as {key!r}. It is a vector of numbers.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        numbers = numbers.astype(np.float32)
    if not np.isfinite(numbers).all():
        index = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise RequestError(f"Found {numbers[index]} at {key!r}[{index}]. Every number must be finite.", "safety_stop")
    return numbers


def _shorten(value) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


def _spell(message: dict) -> str:
    return ", ".join(repr(key)[:60] for key in list(message)[:12]) or "none"
