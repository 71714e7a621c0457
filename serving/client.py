"""Clients of a policy server, for a robot's own environment: numpy, msgpack and websockets, no torch.

    with PolicyClient("ws://127.0.0.1:8000") as client:
        client.start_episode(seed=0, task="press the button")
        actions = client.infer({"observation.images.front": image, "observation.state": state})["actions"]   # (H, D)

A loop that hides the latency (real-time chunking; `SynchronousScheduler` waits instead):

    scheduler = OverlappingScheduler(client.metadata["control_frequency"], execute_steps=8, guidance="identity")
    with RobotLoop(client, scheduler) as loop:
        while running:
            action = loop.step(observe)      # None: hold still
"""

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from .chunking import OverlappingScheduler, SynchronousScheduler
from .safety import SafetyRails
from .wire import pack, unpack


MAX_ATTEMPTS = 5  # connections that may break during one question


class ServerError(RuntimeError):
    """The server refused a request. `kind` is its one-word reason, `number` what its log calls the error."""

    def __init__(self, kind: str, message: str, number: str) -> None:
        super().__init__(f"{kind}: {message} (error {number})")
        self.kind, self.number = kind, number


def _server_error(answer: str) -> ServerError:
    try:
        error = json.loads(answer)
        return ServerError(error["error"], error["message"], error["id"])
    except (ValueError, KeyError, TypeError):  # another server's: openpi's sends a stack
        return ServerError("internal", answer, "none")


class PolicyClient:
    """One robot's connection to a policy server; comes back by itself when the server was restarted.

    Args:
        address: "ws://host:port" or, with TLS, "wss://host:port"; "/NAME" at the end chooses a model.
        token: the server's token.
        authority: PEM file of the certificate authority that signed the server's certificate, for "wss".
        timeout_s: how long one answer may take.
        reconnect_s: how long to try to reach a server that is away; 0 gives up at once.

    Raises:
        ConnectionError: no server within `reconnect_s`, or one that refuses the token or the model.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        authority: str | None = None,
        timeout_s: float = 30.0,
        reconnect_s: float = 30.0,
    ) -> None:
        self._address, self._timeout_s, self._reconnect_s = address, timeout_s, reconnect_s
        self._headers = {} if token is None else {"Authorization": f"Api-Key {token}"}
        self._tls = ssl.create_default_context(cafile=authority) if address.startswith("wss:") else None
        self._episode: dict | None = None
        self._calls = 0
        self.metadata: dict = {}
        self._opened = contextlib.ExitStack()  # holds the connection, as websockets wants it
        self._connection = self._connect()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the server."""
        self._opened.close()

    def start_episode(self, seed: int | None = None, task: str | None = None) -> None:
        """Starts an episode: noise that follows from `seed` (the server's choice without one), and its instruction."""
        message = {"__ctrl__": "episode_start", "__seed__": seed, "__task__": task}
        self._exchange({name: value for name, value in message.items() if value is not None})
        self._episode, self._calls = message, 0

    def end_episode(self) -> None:
        """Ends the episode, and its recording."""
        self._exchange({"__ctrl__": "episode_end"})
        self._episode = None

    def infer(self, observation: dict, options: dict | None = None) -> dict:
        """The answer to an observation: "actions" float32 (H, D) in robot units, and timings.

        If the connection breaks, the question is asked again at the next server, with the same seed and call number,
        so that the answer is the same.

        Args:
            observation: by the keys of `metadata["observation_keys"]`.
            options: of the scheduler's `ask`, or "request_id", "seed", "call".

        Raises:
            ServerError: the server refused the request.
            ConnectionError: no server within `reconnect_s`.
            TimeoutError: no answer within `timeout_s`.
        """
        options = dict(options or {})
        if self._episode is not None and self._episode["__seed__"] is not None:
            options = {"seed": self._episode["__seed__"], "call": self._calls} | options
        answer = self._exchange({**observation, "__wallvla__": options})
        self._calls += 1
        return answer

    def _exchange(self, message: dict) -> dict:
        data = pack(message)
        answer = None
        for attempt in range(MAX_ATTEMPTS):
            try:
                if attempt:
                    self._return(message)
                answer = self._ask(data)
                break
            except ConnectionClosed as error:
                if attempt + 1 == MAX_ATTEMPTS:
                    raise ConnectionError(f"{self._address} closed the connection {MAX_ATTEMPTS} times.") from error
        if isinstance(answer, str):
            raise _server_error(answer)
        return unpack(answer)

    def _return(self, message: dict) -> None:
        """Connects again and tells the new server the instruction of the episode that goes on."""
        self._opened.close()
        self._connection = self._connect()
        task = None if self._episode is None else self._episode["__task__"]
        if task is not None and "__ctrl__" not in message:
            self._ask(pack({"__ctrl__": "episode_start", "__task__": task}))

    def _ask(self, data: bytes) -> bytes | str:
        self._connection.send(data)
        try:
            return self._connection.recv(self._timeout_s)
        except TimeoutError:
            self._connection.close()  # an answer that came later would be taken for that of the next question
            raise

    def _connect(self) -> ClientConnection:
        deadline, pause = time.monotonic() + self._reconnect_s, 0.05
        while True:
            try:
                connection = self._opened.enter_context(
                    connect(
                        self._address,
                        ssl=self._tls,
                        compression=None,
                        max_size=None,
                        additional_headers=self._headers,
                        open_timeout=self._timeout_s,
                    )
                )
                self.metadata = unpack(connection.recv(self._timeout_s))
                return connection
            except InvalidStatus as error:
                status = error.response.status_code
                if status != 503 or time.monotonic() > deadline:  # 503: it warms up, stops or is full
                    answer = error.response.body.decode(errors="replace").strip()
                    raise ConnectionError(f"{self._address} refuses this client: {status}, {answer}.") from error
            # InvalidHandshake: killed in the middle of one
            except (OSError, ConnectionClosed, InvalidHandshake) as error:
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"No policy server at {self._address} within {self._reconnect_s} s ({error}). Start one with "
                        f"`wallvla serve`."
                    ) from error
            self._opened.close()
            time.sleep(pause)
            pause = min(2 * pause, 1.0)


class RobotLoop:
    """Runs a scheduler against a server: call `step` at the robot's rate.

    With an `OverlappingScheduler` answers come in a thread of their own and `step` returns at once; with a
    `SynchronousScheduler` `step` waits for the answer.

    Args:
        client: a `PolicyClient`, used by nobody else meanwhile.
        scheduler: decides when to ask and what to execute.
        rails: safety rails on the executed actions.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        client: PolicyClient,
        scheduler: SynchronousScheduler | OverlappingScheduler,
        rails: SafetyRails | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._scheduler, self._rails, self._clock = client, scheduler, rails, clock
        self._overlaps = isinstance(scheduler, OverlappingScheduler)
        self._thread: threading.Thread | None = None
        self._answer: dict | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "RobotLoop":
        return self

    def __exit__(self, *exception) -> None:
        self.wait()

    def step(self, observe: Callable[[], dict]) -> np.ndarray | None:
        """The action (D,) to execute now; None: there is none, hold still.

        Args:
            observe: returns the observation of this instant; called only when one is sent.

        Raises:
            SafetyStop: the rails refuse to go on.
            What `PolicyClient.infer` raises, but for "busy" and "rate_limited", after which the loop asks again.
        """
        now = self._clock()
        self._collect()
        if self._scheduler.wants_chunk(now):
            observation, options = observe(), self._scheduler.ask(now)
            if self._overlaps:
                self._thread = threading.Thread(target=self._infer, args=(observation, options), daemon=True)
                self._thread.start()
            else:
                self._infer(observation, options)
                self._collect()
                now = self._clock()
        action = self._scheduler.action(now)
        if action is None or self._rails is None:
            return action
        self._rails.check_age(now - self._scheduler.observed_at)
        return self._rails.limit(action)

    def wait(self) -> None:
        """Waits for an open question and forgets its answer."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._answer = self._error = None
        self._scheduler.give_up()

    def _infer(self, observation: dict, options: dict) -> None:
        try:
            self._answer = self._client.infer(observation, options)
        except (ServerError, ConnectionError, TimeoutError, ConnectionClosed) as error:
            self._error = error  # raised where the robot's loop sees it

    def _collect(self) -> None:
        if self._thread is not None:
            if self._thread.is_alive():
                return
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._scheduler.give_up()
            if not (isinstance(error, ServerError) and error.kind in ("busy", "rate_limited")):
                raise error
        answer, self._answer = self._answer, None
        if answer is not None:
            self._scheduler.receive(answer["actions"], self._clock())
