"""The wire format of openpi: msgpack, in which a numpy array is a map of its bytes, dtype and shape.

Unpacking trusts nothing: sizes, shapes and types are checked before anything is made of them, and nothing is ever
executed (no pickle, no object arrays, no extension types).
"""

import math

import msgpack
import numpy as np


_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
DTYPES = {np.dtype(name).str: np.dtype(name) for name in ("bool", *_INTEGERS, "float16", "float32", "float64")}
MAX_DIMENSIONS = 4
MAX_CONTAINERS = 512  # lists and maps of a frame, arrays included
MAX_LENGTH = 1024  # entries of one list or map
MAX_TEXT = 2**16  # bytes of one string
MAX_FRAME = 16 * 2**20  # bytes


class WireError(ValueError):
    """Bytes that are not a message of this protocol; the message says which rule they break."""


def pack(message) -> bytes:
    """A message (maps, lists, numbers, strings, bytes, numpy arrays and scalars) as bytes.

    Raises:
        WireError: an array of objects, structures or complex numbers, or a value that msgpack does not have.
    """
    try:
        return msgpack.packb(message, default=_pack_array)
    except (TypeError, OverflowError) as error:
        raise WireError(f"A message holds maps, lists, numbers, strings, bytes and arrays: {error}.") from error


def unpack(frame: bytes, max_bytes: int = MAX_FRAME):
    """The message of `pack` or of openpi's client. Arrays are read-only views of `frame`.

    Raises:
        WireError: what was found and which limit or rule it breaks.
    """
    if len(frame) > max_bytes:
        raise WireError(f"Found a frame of {len(frame)} bytes; the limit is {max_bytes}. Send smaller images or JPEG.")
    reader = _Reader()
    try:
        return msgpack.unpackb(
            frame,
            object_pairs_hook=reader.map,
            list_hook=reader.list,
            ext_hook=_refuse_extension,
            max_str_len=MAX_TEXT,
            max_bin_len=max_bytes,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
            max_ext_len=MAX_TEXT,
        )
    except WireError:
        raise
    # All that msgpack raises on bytes that it cannot read; RecursionError comes from its pure Python version
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(
            f"Found bytes that are not msgpack ({type(error).__name__}). Pack them as openpi does."
        ) from error


class _Reader:
    """The hooks of one `unpack` call. They run after each container, so what they keep small is the next one."""

    def __init__(self) -> None:
        self._containers = 0

    def _count(self) -> None:
        self._containers += 1
        if self._containers > MAX_CONTAINERS:
            raise WireError(f"Found more than {MAX_CONTAINERS} lists and maps in a message. Send numbers as arrays.")

    def list(self, values: list) -> list:
        self._count()
        return values

    def map(self, pairs: list):
        self._count()
        values = dict(pairs)
        if b"__ndarray__" in values:
            return _array(values)
        if b"__npgeneric__" in values:
            return _scalar(values)
        for key in values:
            if not isinstance(key, str):
                raise WireError(f"Found a {type(key).__name__} as the key of a map. Keys are strings.")
        return values


def _pack_array(value):
    if isinstance(value, np.ndarray | np.generic):
        # The byte order of the other machine may be another one; what is stored is always little-endian
        value = value.astype(value.dtype.newbyteorder("<"), copy=False)
        if value.dtype.str not in DTYPES:
            raise TypeError(f"cannot send an array of dtype {value.dtype}")
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"cannot send a {type(value).__name__}")


def _dtype(values: dict) -> np.dtype:
    name = values.get(b"dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise WireError(f"Found an array of dtype {str(name)[:40]!r}. Known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def _array(values: dict) -> np.ndarray:
    dtype, data, shape = _dtype(values), values.get(b"data"), values.get(b"shape")
    if not isinstance(data, bytes):
        raise WireError(f"Found the data of an array as {type(data).__name__}. It is its bytes.")
    # type(...) is int: a bool is an int to isinstance
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(type(size) is int for size in shape):
        raise WireError(f"Found {str(shape)[:80]} as the shape of an array. It is at most {MAX_DIMENSIONS} integers.")
    # Python's integers do not overflow, so that no product of sizes can pass for a small one
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise WireError(f"Found {len(data)} bytes for an array of shape {shape} and dtype {dtype}; they must agree.")
    if math.prod(max(size, 1) for size in shape) > 2**40:  # beside a zero; numpy multiplies the others nevertheless
        raise WireError(f"Found the shape {shape}; it is larger than any frame.")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _scalar(values: dict) -> np.generic:
    dtype, data = _dtype(values), values.get(b"data")
    if not isinstance(data, bool | int | float):
        raise WireError(f"Found the value of a number as {type(data).__name__}.")
    try:
        return dtype.type(data)
    except (OverflowError, ValueError) as error:
        raise WireError(f"Found {data!r}, which does not fit {dtype}.") from error


def _refuse_extension(code: int, data: bytes):
    raise WireError(f"Found an extension type ({code}) of msgpack. Messages hold none.")
