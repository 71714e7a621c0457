"""Messages between a policy and a simulator in different processes: a JSON header and raw arrays, nothing executable.

    4 bytes   b"WVE1"
    4 bytes   length of the header, unsigned, big endian
    header    JSON object, UTF-8: {"type": "...", ..., "arrays": [{"name", "dtype", "shape"}, ...]}
    arrays    their bytes one after the other, C order, little endian

One schema in both directions and for both kinds of server:

    an environment server is asked                      and answers
        hello {version, task, image_size}                   environment {instruction, action_dim, action_low,
                                                                action_high, control_frequency, max_steps, cameras}
        reset {seed}                                        scene {instruction}
        observe {cameras}                                   observation {} + state, images/<camera>
        step {} + action (D,)                               stepped {reward, success, done, progress}
        frame {size}                                        frame {} + frame (size, size, 3)
    a policy server is asked
        hello {version}                                     policy {cameras}
        reset {seed}                                        ready {}
        act {instruction} + state, images/<camera>          chunk {} + actions (H, D)
    both, when something fails                              error {message}, and the connection ends

Numpy and the standard library are all it needs, so a simulator's environment of any age can speak it.
"""

import json
import math
import socket
import struct
from collections.abc import Mapping

import numpy as np


MAGIC = b"WVE1"
MAX_HEADER = 1 << 20  # bytes
MAX_ARRAYS = 1 << 28  # bytes of all arrays of a message
DTYPES = ("uint8", "int32", "int64", "float32", "float64", "bool")
VERSION = 1


class WireError(RuntimeError):
    """The other side broke the schema, went away, or reported an error."""


def pack(kind: str, fields: Mapping | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """The bytes of one message.

    Raises:
        WireError: an array of a type that the schema does not have.
    """
    listed, bodies = [], []
    for name, value in (arrays or {}).items():
        value = np.ascontiguousarray(value)
        if value.dtype.name not in DTYPES:
            raise WireError(f"Array {name!r} is {value.dtype}; messages carry {', '.join(DTYPES)}.")
        listed.append({"name": name, "dtype": value.dtype.name, "shape": list(np.shape(value))})
        bodies.append(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
    header = json.dumps({"type": kind, **(fields or {}), "arrays": listed}).encode()
    return b"".join([MAGIC, struct.pack(">I", len(header)), header, *bodies])


class Connection:
    """Sends and receives messages over a connected socket."""

    def __init__(self, stream: socket.socket, peer: str) -> None:
        self._stream = stream
        self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer

    def close(self) -> None:
        """Ends the connection."""
        self._stream.close()

    def send(self, kind: str, fields: Mapping | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Sends one message."""
        try:
            self._stream.sendall(pack(kind, fields, arrays))
        except OSError as error:
            raise WireError(f"Cannot send to {self.peer}: {error}. Is the other side still running?") from error

    def receive(self) -> tuple[dict, dict[str, np.ndarray]] | None:
        """The next message as `(header, arrays)`; None when the other side ended the connection between messages.

        Raises:
            WireError: what came is no message of this schema; the message says at which part.
        """
        start = self._read(8, may_end=True)
        if start is None:
            return None
        if start[:4] != MAGIC:
            raise WireError(f"{self.peer} does not speak this protocol: its message starts with {start[:4]!r}.")
        [length] = struct.unpack(">I", start[4:])
        if length > MAX_HEADER:
            raise WireError(f"{self.peer} announces a header of {length} bytes; {MAX_HEADER} are allowed.")
        try:
            header = json.loads(self._read(length))
            sizes = [_array_layout(entry) for entry in header["arrays"]]
            header["type"]
        except (ValueError, KeyError, TypeError) as error:
            raise WireError(f"{self.peer} sent a header that breaks the schema: {error!r}.") from error
        if sum(size for *_, size in sizes) > MAX_ARRAYS:
            raise WireError(f"{self.peer} announces arrays of more than {MAX_ARRAYS} bytes.")
        arrays = {}
        for name, dtype, shape, size in sizes:
            arrays[name] = np.frombuffer(self._read(size), dtype).reshape(shape).astype(dtype.newbyteorder("="))
        return header, arrays

    def ask(
        self,
        kind: str,
        fields: Mapping | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
        expect: str | None = None,
    ) -> tuple[dict, dict[str, np.ndarray]]:
        """Sends a request and returns the reply, which has to be of the type `expect`."""
        self.send(kind, fields, arrays)
        reply = self.receive()
        if reply is None:
            raise WireError(f"{self.peer} closed the connection instead of answering {kind!r}; see its log.")
        if reply[0]["type"] == "error":
            raise WireError(f"{self.peer} could not answer {kind!r}: {reply[0].get('message')}")
        if expect is not None and reply[0]["type"] != expect:
            raise WireError(f"{self.peer} answered {kind!r} by {reply[0]['type']!r}; {expect!r} was expected.")
        return reply

    def _read(self, count: int, may_end: bool = False) -> bytes | None:
        parts, left = [], count
        while left:
            try:
                part = self._stream.recv(min(left, 1 << 20))
            except OSError as error:
                raise WireError(f"Cannot read from {self.peer}: {error}.") from error
            if not part:
                if may_end and left == count:
                    return None
                raise WireError(f"{self.peer} closed the connection in the middle of a message.")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def connect(address: str, timeout: float = 600.0) -> Connection:
    """Connects to `host:port`.

    Args:
        address: of the server.
        timeout: seconds that any answer may take.

    Raises:
        WireError: malformed address, or nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise WireError(f"{address!r} is no address: write host:port, for instance 127.0.0.1:9100.")
    try:
        stream = socket.create_connection((host, int(port)), timeout=timeout)
    except OSError as error:
        raise WireError(f"Nothing answers at {address} ({error}): start the server there first.") from error
    return Connection(stream, address)


def _array_layout(entry: Mapping) -> tuple[str, np.dtype, tuple[int, ...], int]:
    """Name, little-endian type, shape and number of bytes of an array, all checked."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}")
    shape = tuple(entry["shape"])
    if len(shape) > 8 or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"shape {entry['shape']!r} is no list of sizes")
    dtype = np.dtype(entry["dtype"]).newbyteorder("<")
    return str(entry["name"]), dtype, shape, math.prod(shape) * dtype.itemsize
