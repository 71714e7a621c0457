"""Simulators and policies in processes of their own, over the messages of `wire.py`.

In the simulator's Python environment (this package by `pip install --no-deps`, numpy, gymnasium and Pillow suffice):

    python -m wallvla.evaluation.remote --env pusht --port 9100

and here:

    wallvla eval runs/quickstart/hub --env remote://127.0.0.1:9100

A simulator without a gymnasium adapter serves itself: `environment_server(make).serve_forever()` with any `make(task,
image_size)` that returns an object with the calls of `environments.Environment`. The other way round, a simulator
that brings its own evaluation loop asks a policy: `policy_server(make).serve_forever()` here, `RemotePolicy` there.
"""

import argparse
import logging
import socket
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .gym_env import StepResult
from .wire import VERSION, Connection, WireError, connect


logger = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"


class RemoteEnv:
    """An environment of an `environment_server`; it has the calls of `environments.Environment`.

    Args:
        address: `host:port`.
        task: what the server shall make; None leaves it the choice.
        image_size: side of the images in pixels.
    """

    def __init__(self, address: str, task: str | None = None, image_size: int = 64) -> None:
        self._connection = connect(address)
        hello = {"version": VERSION, "task": task, "image_size": image_size}
        described, _ = self._connection.ask("hello", hello, expect="environment")
        self.instruction: str = described["instruction"]
        self.action_dim: int = described["action_dim"]
        self.action_low: list[float] = described["action_low"]
        self.action_high: list[float] = described["action_high"]
        self.control_frequency: float = described["control_frequency"]
        self.max_steps: int = described["max_steps"]
        self.cameras: tuple[str, ...] = tuple(described["cameras"])
        self.success, self.progress, self.steps = False, 0.0, 0

    def close(self) -> None:
        """Ends the connection; the server closes the environment."""
        self._connection.close()

    def reset_scene(self, seed: int) -> None:
        """Starts the episode that `seed` decides; the instruction may change with it."""
        scene, _ = self._connection.ask("reset", {"seed": seed}, expect="scene")
        self.instruction = scene["instruction"]
        self.success, self.progress, self.steps = False, 0.0, 0

    def observe(self, cameras: Sequence[str] | None = None) -> dict:
        """Images of the cameras asked for and the state."""
        wanted = list(self.cameras if cameras is None else cameras)
        _, arrays = self._connection.ask("observe", {"cameras": wanted}, expect="observation")
        missing = [name for name in ("state", *(f"images/{camera}" for camera in wanted)) if name not in arrays]
        if missing:
            raise WireError(f"{self._connection.peer} left {missing} out of its observation.")
        return {"images": {camera: arrays[f"images/{camera}"] for camera in wanted}, "state": arrays["state"]}

    def step(self, action: np.ndarray) -> StepResult:
        """Executes one action."""
        reply, _ = self._connection.ask("step", None, {"action": np.asarray(action, np.float64)}, expect="stepped")
        self.success, self.progress = reply["success"], reply["progress"]
        self.steps += 1
        return StepResult(reply["reward"], reply["success"], reply["done"])

    def video_frame(self, size: int) -> np.ndarray:
        """A picture for people."""
        return self._connection.ask("frame", {"size": size}, expect="frame")[1]["frame"]


class RemotePolicy:
    """A policy of a `policy_server`; it has the `Policy` protocol."""

    def __init__(self, address: str) -> None:
        self._connection = connect(address)
        described, _ = self._connection.ask("hello", {"version": VERSION}, expect="policy")
        self.cameras: tuple[str, ...] = tuple(described["cameras"])

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def reset(self, seed: int = 0) -> None:
        """Starts the episode `seed`."""
        self._connection.ask("reset", {"seed": seed}, expect="ready")

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        """The server's next actions."""
        arrays = {f"images/{name}": observation["images"][name] for name in self.cameras}
        arrays["state"] = observation["state"]
        _, reply = self._connection.ask("act", {"instruction": instruction}, arrays, expect="chunk")
        if "actions" not in reply:
            raise WireError(f"{self._connection.peer} left the actions out of its reply.")
        return reply["actions"]


class Server:
    """A listening socket; every connection gets a thread and a handler of its own.

    Args:
        make_handler: called with the fields of `hello`, once per connection.
        host, port: where to listen; port 0 takes a free one. Anyone who reaches the port can use it: keep it on the
            loopback interface, and tunnel through ssh from other machines.

    Use it as a context manager for a server in the background, or call `serve_forever`.
    """

    def __init__(self, make_handler: Callable[[dict], "EnvironmentHandler"], host: str = LOOPBACK, port: int = 0):
        self._make_handler = make_handler
        self._listener = socket.create_server((host, port))
        self.address = "{}:{}".format(*self._listener.getsockname()[:2])
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Server":
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stops listening; connections that are open go on until their other side leaves."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept()
        except OSError:
            logger.debug("the listener was closed already")
        self._listener.close()

    def serve_forever(self) -> None:
        """Answers until `close`."""
        while True:
            try:
                stream, peer = self._listener.accept()
            except OSError:  # closed
                return
            connection = Connection(stream, "{}:{}".format(*peer[:2]))
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        handler = None
        try:
            while (request := connection.receive()) is not None:
                header, arrays = request
                if handler is None:
                    _check_hello(header)
                    handler = self._make_handler(header)
                    reply = handler.describe()
                else:
                    reply = handler.answer(header, arrays)
                connection.send(*reply)
        except (WireError, ImportError, ValueError, RuntimeError, LookupError, TypeError, ArithmeticError) as error:
            # The other side has to know, or it would wait; the connection ends because its state is unknown now
            logger.error("%s: %s", connection.peer, traceback.format_exc())
            try:
                connection.send("error", {"message": f"{type(error).__name__}: {error}"})
            except WireError:
                logger.info("%s is gone", connection.peer)
        finally:
            if handler is not None:
                handler.close()
            connection.close()


def _check_hello(header: Mapping) -> None:
    if header["type"] != "hello" or header.get("version") != VERSION:
        raise WireError(f"The first message must be hello of version {VERSION}, got {header}.")


class EnvironmentHandler:
    """One connection to an environment."""

    def __init__(self, make: Callable, hello: Mapping) -> None:
        self._env = make(hello.get("task"), int(hello.get("image_size", 64)))

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()

    def describe(self) -> tuple:
        """The reply to hello."""
        env = self._env
        fields = {
            "instruction": env.instruction,
            "action_dim": int(env.action_dim),
            "action_low": [float(value) for value in env.action_low],
            "action_high": [float(value) for value in env.action_high],
            "control_frequency": float(env.control_frequency),
            "max_steps": int(env.max_steps),
            "cameras": list(env.cameras),
        }
        return "environment", fields

    def answer(self, header: Mapping, arrays: Mapping[str, np.ndarray]) -> tuple:
        """The reply to any other request."""
        env, kind = self._env, header["type"]
        if kind == "reset":
            env.reset_scene(int(header["seed"]))
            return "scene", {"instruction": env.instruction}
        if kind == "observe":
            observation = env.observe(header["cameras"])
            images = {f"images/{name}": image for name, image in observation["images"].items()}
            return "observation", {}, {"state": observation["state"], **images}
        if kind == "step":
            result = env.step(arrays["action"])
            fields = {
                "reward": float(result.reward),
                "success": bool(result.success),
                "done": bool(result.done),
                "progress": float(env.progress),
            }
            return "stepped", fields
        if kind == "frame":
            return "frame", {}, {"frame": env.video_frame(int(header["size"]))}
        raise WireError(f"An environment server does not know {kind!r}: it knows reset, observe, step, frame.")


class PolicyHandler:
    """One connection to a policy. `make()` is asked at every reset, when a dispatcher may change the policy."""

    def __init__(self, make: Callable, hello: Mapping) -> None:
        self._make = make
        self._policy = make()

    def close(self) -> None:
        """Nothing to free: policies belong to who made them."""

    def describe(self) -> tuple:
        """The reply to hello."""
        return "policy", {"cameras": list(self._policy.cameras)}

    def answer(self, header: Mapping, arrays: Mapping[str, np.ndarray]) -> tuple:
        """The reply to any other request."""
        if header["type"] == "reset":
            self._policy = self._make()
            self._policy.reset(int(header["seed"]))
            return "ready", {}
        if header["type"] == "act":
            images = {name.removeprefix("images/"): array for name, array in arrays.items() if name != "state"}
            observation = {"images": images, "state": arrays["state"]}
            chunk = self._policy.act(observation, str(header["instruction"]))
            return "chunk", {}, {"actions": np.asarray(chunk, np.float64)}
        raise WireError(f"A policy server does not know {header['type']!r}: it knows reset and act.")


def environment_server(make: Callable, host: str = LOOPBACK, port: int = 0) -> Server:
    """A server of environments; `make(task or None, image_size)` is called once per connection."""
    return Server(lambda hello: EnvironmentHandler(make, hello), host, port)


def policy_server(make: Callable, host: str = LOOPBACK, port: int = 0) -> Server:
    """A server of policies; `make()` is called for every connection and at every reset."""
    return Server(lambda hello: PolicyHandler(make, hello), host, port)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m wallvla.evaluation.remote`: serves an environment by name."""
    from .environments import check_name, make_environment

    parser = argparse.ArgumentParser(prog="python -m wallvla.evaluation.remote", description=main.__doc__)
    parser.add_argument("--env", help="what is served when a client asks for no task, as in wallvla eval --env")
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=9100)
    options = parser.parse_args(arguments)
    default = (options.env or "").removeprefix("metaworld/")
    if default:
        check_name(default)
    logging.basicConfig(level=logging.INFO)

    def make(task: str | None, image_size: int):
        if not (task or default):
            raise ValueError("The client asked for no task and the server was started without --env: give either.")
        if task not in (None, default) and task.startswith(("gym:", "remote://")):
            raise ValueError(f"{task!r} is not for clients to choose: gym: imports modules. Give it to --env here.")
        return make_environment(task or default, image_size)

    server = environment_server(make, options.host, options.port)
    logger.info("serving %s on %s", default or "any environment", server.address)
    try:
        server.serve_forever()
    finally:
        server.close()


if __name__ == "__main__":
    main()
