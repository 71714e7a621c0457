"""The stock `openpi-client` as a relay: observations come in on standard input, actions go out on standard output.

    python benchmarks/stock_client.py PORT         # in an environment with openpi-client and nothing of ours

Each message is its length (4 bytes, little-endian) and what openpi's own packer made of it. The robot behind the relay
is a simulator that lives in another environment (see `serving_parity.py`), as a robot's driver would.
"""

import sys

from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main() -> None:
    """Answers the requests of `serving_parity.py` through the stock client."""
    client = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]))
    while head := sys.stdin.buffer.read(4):
        observation = msgpack_numpy.unpackb(sys.stdin.buffer.read(int.from_bytes(head, "little")))
        data = msgpack_numpy.packb(client.infer(observation))
        sys.stdout.buffer.write(len(data).to_bytes(4, "little") + data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
