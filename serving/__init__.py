"""Serving policies to robots over websockets, and the clients of such servers.

    server.py       the policy server; wire-compatible with `openpi-client`
    client.py       clients for robots: synchronous, asynchronous, real-time chunking

Nothing is imported here: `client`, `chunking`, `wire` and `safety` need only numpy, msgpack and websockets, so they
run in a robot's own environment without torch or transformers.
"""
