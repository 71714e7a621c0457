"""The policy server: websockets, the protocol of `openpi-client`, several models, many robots.

Protocol. A client connects to `/` (the first model) or `/NAME`. The server sends its metadata; then every binary
message is an observation and gets one answer, in order. All messages are msgpack (see `wire`).

    question   {client keys of the embodiment..., "__wallvla__": {options, all of them optional}}
               options: request_id, seed, call (they fix the noise), guidance, previous, delay (real-time chunking)
    answer     {"actions": float32 (H, D), "server_timing": {infer_ms, queue_ms, total_ms, batch_size}, "request_id"}
    question   {"__ctrl__": "episode_start", "__seed__"?: int, "__task__"?: str} or {"__ctrl__": "episode_end"}
    answer     {"__ack__": "episode_start"}
    error      a text message, JSON: {"error": kind, "message": what was found and what to do, "id": for the log}
               (the stock client raises RuntimeError with this text); the connection stays open

Kinds: bad_request, busy, safety_stop, rate_limited, draining, internal. HTTP: /healthz (200 ready, 503 warming up or
draining) and /metrics on the same port.
"""

import asyncio
import contextlib
import hmac
import http
import ipaddress
import json
import logging
import signal
import ssl
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from .batching import Batcher
from .metrics import BATCH_BUCKETS, LATENCY_BUCKETS, Metrics
from .observations import RequestError
from .policy import PolicyRequest, ServedPolicy
from .recording import MAX_EPISODE_FRAMES, EpisodeJournal, Recorder
from .safety import SafetyRails, SafetyStop
from .wire import WireError, pack, unpack


logger = logging.getLogger(__name__)

OPTIONS = {"request_id", "seed", "call", "guidance", "previous", "delay"}
MAX_BAD_MESSAGES = 32  # in a row; then the connection is closed
POLICY_VIOLATION, GOING_AWAY = 1008, 1001


@dataclass(frozen=True)
class ServerOptions:
    """How a server listens and what it bears.

    host, port: where it listens. Any host but this machine's own needs a token.
    token: what clients send as `Authorization: Api-Key TOKEN` (openpi's client) or `Bearer TOKEN`.
    certificate, private_key: PEM files; together they turn on TLS.
    max_connections: clients at a time.
    max_frame_bytes: size of one message.
    max_batch, batch_window_s, max_queue, max_wait_s: see `Batcher`.
    warm_up_batches: sizes of the calls before the first request. By default 1 and `max_batch`, which shows whether the
        largest fits into memory; the engine builds a bucket for each size, so name those that will come.
    warm_up_image: (width, height) of their frames: the robot's, if the first call should find its bucket.
    max_requests_per_second: of one client.
    send_timeout_s: a client that does not read for so long is dropped.
    ping_s: a client that does not answer a ping for so long is dropped.
    drain_s: how long a stopping server lets requests finish.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    certificate: str | None = None
    private_key: str | None = None
    max_connections: int = 64
    max_frame_bytes: int = 16 * 2**20
    max_batch: int = 16
    batch_window_s: float = 0.005
    max_queue: int = 64
    max_wait_s: float = 2.0
    warm_up_batches: tuple[int, ...] | None = None
    warm_up_image: tuple[int, int] = (224, 224)
    max_requests_per_second: float = 200.0
    send_timeout_s: float = 10.0
    ping_s: float = 20.0
    drain_s: float = 10.0

    def __post_init__(self):
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("Found one of certificate and private_key. TLS needs both files.")
        if self.token is not None and len(self.token) < 16:
            raise ValueError(
                f"Found a token of {len(self.token)} characters. Use at least 16, for instance from `uuidgen`."
            )
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"Found host {self.host} without a token: anybody who reaches this machine could drive the robot. Set "
                f"a token, or keep to 127.0.0.1 and let robots come through an SSH tunnel."
            )
        for name in ("max_connections", "max_batch", "max_queue", "max_frame_bytes"):
            if vars(self)[name] < 1:
                raise ValueError(f"Found {name} {vars(self)[name]}; it is at least 1.")
        if min(*(self.warm_up_batches or (1,)), *self.warm_up_image) < 1:
            raise ValueError(
                f"Found warm_up_batches {self.warm_up_batches} and warm_up_image {self.warm_up_image}; they are at "
                f"least 1."
            )
        for name in ("max_requests_per_second", "send_timeout_s", "ping_s", "max_wait_s"):
            if not vars(self)[name] > 0:
                raise ValueError(f"Found {name} {vars(self)[name]}; it must be above 0.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Session:
    """What the server knows of one connection: its episode, its rails and its recording."""

    def __init__(self, number: int, model: str, policy: ServedPolicy, recorder: Recorder | None) -> None:
        self.model, self.policy = model, policy
        self.rails: SafetyRails | None = policy.make_rails()
        self._recorder = recorder
        self._journal: EpisodeJournal | None = None
        # Connections and episodes without a seed of their own still get different noise, the first one that of seed 0
        self._next_seed = number << 20
        self._instruction: str | None = None
        self.task: str | None = None
        self.start_episode()

    def start_episode(self, seed: int | None = None, task: str | None = None) -> None:
        """The noise starts again, the recording gets a new episode."""
        self.end_episode()
        self.seed, self.calls, self.task = self._next_seed if seed is None else seed, 0, task
        if seed is None:
            self._next_seed += 1
        if self.rails is not None:
            self.rails.reset()

    def end_episode(self) -> None:
        """Closes the recording."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def limit(self, chunk: np.ndarray, age_s: float) -> np.ndarray:
        """The chunk (H, D) inside of the rails. Raises SafetyStop."""
        if self.rails is None:
            return chunk
        self.rails.check_age(age_s)
        return self.rails.limit_chunk(chunk).astype(np.float32)

    def record(self, observation: dict, chunk: np.ndarray) -> None:
        """Adds a frame to the recording. A full disk ends the recording, never the robot's answers."""
        if self._recorder is None:
            return
        full = self._journal is not None and self._journal.num_frames >= MAX_EPISODE_FRAMES
        if full or observation["instruction"] != self._instruction:
            self.end_episode()
        try:
            if self._journal is None:
                self._journal = self._recorder.start_episode(observation["instruction"], self.seed)
                self._instruction = observation["instruction"]
            if self._journal is not None:
                self._journal.add(observation, chunk)
        except OSError as error:
            logger.error("recording stopped: %s", error)
            self._recorder = None
            self.end_episode()


class RateLimiter:
    """A bucket of tokens: `rate` requests a second on average, bursts of one second's worth."""

    def __init__(self, rate: float) -> None:
        self._rate = self._tokens = rate
        self._last = time.monotonic()

    def wait_s(self) -> float:
        """0 if a request may pass now (it is counted), else how long the client has to wait."""
        now = time.monotonic()
        self._tokens = min(max(self._rate, 1.0), self._tokens + (now - self._last) * self._rate)
        self._last = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0


class PolicyServer:
    """Serves policies until it is told to stop.

        server = PolicyServer({"wall-oss": load_policy("wall-oss")})
        asyncio.run(server.run())          # until SIGINT or SIGTERM

    Args:
        policies: name -> policy; the first one also serves the path `/`. Names are letters, digits, `-`, `_` and `.`.
        options: see `ServerOptions`.
        recorders: name -> recorder of the policy's episodes, for those that are recorded.
    """

    def __init__(
        self,
        policies: dict[str, ServedPolicy],
        options: ServerOptions | None = None,
        recorders: dict[str, Recorder] | None = None,
    ) -> None:
        if not policies:
            raise ValueError("Found no policies to serve. Name at least one.")
        for name in policies:
            if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
                raise ValueError(
                    f"Found the model name {name!r}. It is part of the address: letters, digits, - _ and ."
                )
        self.policies, self.options, self.recorders = policies, options or ServerOptions(), recorders or {}
        self.metrics = Metrics()
        self.port: int | None = None  # once it listens
        self._status = "warming up"
        self._connections: dict[ServerConnection, bool] = {}  # connection -> whether it has an open request
        self._numbers = 0
        self._stop: asyncio.Event | None = None
        self._batchers: dict[str, Batcher] = {}
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="wallvla-read")
        self._declare_metrics()

    def _declare_metrics(self) -> None:
        metrics = self.metrics
        metrics.counter("wallvla_requests_total", "Answered requests by model and outcome.")
        metrics.counter("wallvla_connections_total", "Accepted connections.")
        metrics.counter("wallvla_refused_total", "Refused handshakes by reason.")
        metrics.counter("wallvla_interventions_total", "Interventions of the safety rails by reason.")
        metrics.histogram("wallvla_request_seconds", "From the arrival of a request to its answer.", LATENCY_BUCKETS)
        metrics.histogram("wallvla_batch_size", "Requests of one call of a model.", BATCH_BUCKETS)
        metrics.gauge("wallvla_connections", "Open connections.", lambda: len(self._connections))
        metrics.gauge("wallvla_queue", "Waiting requests.", lambda: sum(map(len, self._batchers.values())))
        metrics.gauge("wallvla_ready", "1 when ready.", lambda: float(self._status == "ready"))

    # ---- life ---------------------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[int], None] = lambda port: None, handle_signals: bool = True) -> None:
        """Listens, warms up, serves until `stop`, SIGINT or SIGTERM, then drains.

        Args:
            ready: called with the port when robots can be served.
            handle_signals: False where the caller handles them (only the main thread can).
        """
        options = self.options
        loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        if handle_signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._stop.set)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._readers.shutdown, wait=False, cancel_futures=True)
            listener = await stack.enter_async_context(
                serve(
                    self._handle,
                    options.host,
                    options.port,
                    ssl=self._tls(),
                    compression=None,  # images do not get smaller, and a bomb of zeros would get large
                    max_size=options.max_frame_bytes,
                    max_queue=2,
                    ping_interval=options.ping_s,
                    ping_timeout=options.ping_s,
                    process_request=self._check_handshake,
                    origins=[None],  # a web page must not drive a robot through its visitor's browser
                    server_header=None,
                )
            )
            self.port = listener.sockets[0].getsockname()[1]
            executors = {}
            for name, policy in self.policies.items():
                executors[name] = ThreadPoolExecutor(1, thread_name_prefix=f"wallvla-{name}")
                stack.callback(executors[name].shutdown, wait=False, cancel_futures=True)
                sizes = (1, options.max_batch) if options.warm_up_batches is None else options.warm_up_batches
                await loop.run_in_executor(executors[name], policy.warm_up, sizes, options.warm_up_image)
                self._batchers[name] = self._make_batcher(name, policy, executors[name])
                task = loop.create_task(self._batchers[name].run())
                stack.callback(task.cancel)
            self._status = "ready"
            logger.info("serving %s on %s:%d", ", ".join(self.policies), options.host, self.port)
            ready(self.port)
            await self._stop.wait()
            await self._drain()

    def stop(self) -> None:
        """Asks `run` to drain and return. To be called in its event loop."""
        self._stop.set()

    def _make_batcher(self, name: str, policy: ServedPolicy, executor: ThreadPoolExecutor) -> Batcher:
        options = self.options
        return Batcher(
            policy.infer,
            executor,
            options.max_batch,
            options.batch_window_s,
            options.max_queue,
            options.max_wait_s,
            sessions=lambda: len(self._connections),
            observe=lambda size: self.metrics.observe("wallvla_batch_size", size, (("model", name),)),
        )

    async def _drain(self) -> None:
        """Open requests are answered, then everybody is sent away; new ones are refused from now on."""
        self._status = "draining"
        deadline = time.monotonic() + self.options.drain_s
        while any(self._connections.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        closing = [connection.close(GOING_AWAY, "server stops") for connection in list(self._connections)]
        await asyncio.gather(*closing)

    def _tls(self) -> ssl.SSLContext | None:
        if self.options.certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.options.certificate, self.options.private_key)
        return context

    # ---- handshake and HTTP -------------------------------------------------------------------------------------

    def _check_handshake(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers plain HTTP and refuses clients; None lets the websocket open."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            status = http.HTTPStatus.OK if self._status == "ready" else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "OK\n" if self._status == "ready" else f"{self._status}\n")
        if not self._is_authorized(request.headers):
            return self._refuse(connection, http.HTTPStatus.UNAUTHORIZED, "the token is missing or wrong")
        if path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self.metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return response
        if path != "/" and path[1:] not in self.policies:
            known = ", ".join(f"/{name}" for name in self.policies)
            return self._refuse(connection, http.HTTPStatus.NOT_FOUND, f"no such model; there are {known}")
        if self._status != "ready":
            return self._refuse(connection, http.HTTPStatus.SERVICE_UNAVAILABLE, self._status)
        if len(self._connections) >= self.options.max_connections:
            return self._refuse(connection, http.HTTPStatus.SERVICE_UNAVAILABLE, "busy: too many connections")
        return None

    def _is_authorized(self, headers: Headers) -> bool:
        if self.options.token is None:
            return True
        given = headers.get_all("Authorization")
        value = given[0] if len(given) == 1 else ""
        scheme, _, token = value.partition(" ")
        # compare_digest takes the same time however much of the token is right
        right = hmac.compare_digest(token.encode(errors="surrogateescape"), self.options.token.encode())
        return right and scheme in ("Api-Key", "Bearer")

    def _refuse(self, connection: ServerConnection, status: http.HTTPStatus, reason: str) -> Response:
        self.metrics.add("wallvla_refused_total", labels=(("status", int(status)),))
        return connection.respond(status, reason + "\n")

    # ---- one connection -----------------------------------------------------------------------------------------

    async def _handle(self, connection: ServerConnection) -> None:
        name = connection.request.path.partition("?")[0][1:] or next(iter(self.policies))
        # Counted again here: several handshakes may have passed the check at the same time
        if len(self._connections) >= self.options.max_connections:
            await connection.close(POLICY_VIOLATION, "busy: too many connections")
            return
        session = Session(self._numbers, name, self.policies[name], self.recorders.get(name))
        self._numbers += 1
        self._connections[connection] = False
        self.metrics.add("wallvla_connections_total")
        try:
            await self._send(connection, pack({"model": name, "server": "wallvla", **session.policy.metadata}))
            await self._converse(connection, session)
        except (ConnectionClosed, TimeoutError):
            pass  # the client left, or it does not read what it is sent
        finally:
            del self._connections[connection]
            session.end_episode()

    async def _converse(self, connection: ServerConnection, session: Session) -> None:
        limiter, bad_messages = RateLimiter(self.options.max_requests_per_second), 0
        async for message in connection:
            started = time.monotonic()
            self._connections[connection] = True
            wait_s = limiter.wait_s()
            if wait_s:
                answer, outcome = _error("rate_limited", f"Ask again in {wait_s:.3f} s."), "rate_limited"
            else:
                answer, outcome = await self._answer(message, session, started)
            self.metrics.add("wallvla_requests_total", labels=(("model", session.model), ("outcome", outcome)))
            await self._send(connection, answer)
            self._connections[connection] = False
            self.metrics.observe("wallvla_request_seconds", time.monotonic() - started)
            bad_messages = bad_messages + 1 if outcome == "bad_request" else 0
            if bad_messages >= MAX_BAD_MESSAGES:
                await connection.close(POLICY_VIOLATION, "too many bad messages")
                return
            if wait_s:
                await asyncio.sleep(wait_s)  # what the client sends meanwhile stays in its own buffers

    async def _send(self, connection: ServerConnection, data: bytes | str) -> None:
        try:
            async with asyncio.timeout(self.options.send_timeout_s):
                await connection.send(data)
        except TimeoutError:
            connection.transport.abort()  # a closing handshake would wait for the same reader
            raise

    async def _answer(self, message: bytes | str, session: Session, started: float) -> tuple[bytes | str, str]:
        """The answer to one message, and its outcome in a word."""
        task = asyncio.ensure_future(self._respond(message, session, started))
        # `wait` does not raise. This is the boundary to clients that we do not trust: whatever goes wrong inside ends
        # here, its details go to the log, and the client gets the number under which they are found there.
        await asyncio.wait([task])
        self._count_interventions(session)
        error = task.exception()
        if error is None:
            return task.result(), "ok"
        if isinstance(error, RequestError):
            return _error(error.kind, str(error)), error.kind
        if isinstance(error, WireError):
            return _error("bad_request", str(error)), "bad_request"
        number = uuid.uuid4().hex[:12]
        logger.error("error %s in model %s", number, session.model, exc_info=error)
        return _error("internal", "Something went wrong in the server; its log has the details.", number), "internal"

    def _count_interventions(self, session: Session) -> None:
        if session.rails is not None:
            for reason, count in session.rails.interventions.items():
                self.metrics.add("wallvla_interventions_total", count, (("model", session.model), ("reason", reason)))
            session.rails.interventions.clear()

    async def _respond(self, message: bytes | str, session: Session, started: float) -> bytes:
        if self._status == "draining":
            raise RequestError("The server stops. Connect again.", "draining")
        if isinstance(message, str):
            raise RequestError(
                "Found a text message. Observations are binary: msgpack, as openpi's client packs them."
            )
        loop = asyncio.get_running_loop()
        # In a thread, so that a large frame or a JPEG does not hold up the other clients
        values, request = await loop.run_in_executor(self._readers, self._read, message, session)
        if request is None:
            return pack(self._control(values, session))
        outcome, timing = await self._batchers[session.model].submit(request)
        session.calls += 1
        if isinstance(outcome, RequestError):
            raise outcome
        try:
            chunk = session.limit(outcome, time.monotonic() - started)
        except SafetyStop as stop:
            raise RequestError(str(stop), "safety_stop") from stop
        if session.model in self.recorders:
            await loop.run_in_executor(self._readers, session.record, request.observation, chunk)
        timing["total_ms"] = 1000 * (time.monotonic() - started)
        answer = {"actions": chunk, "server_timing": timing}
        if "request_id" in values:
            answer["request_id"] = values["request_id"]
        return pack(answer)

    def _read(self, message: bytes, session: Session) -> tuple[dict, PolicyRequest | None]:
        """The options of a message and its request; for a control message itself and None."""
        values = unpack(message, self.options.max_frame_bytes)
        if not isinstance(values, dict):
            raise RequestError(f"Found a {type(values).__name__}. A message is a map.")
        if "__ctrl__" in values:
            return values, None
        options = values.get("__wallvla__", {})
        if not isinstance(options, dict) or not set(options) <= OPTIONS:
            raise RequestError(f"Found unknown options in __wallvla__. Known: {', '.join(sorted(OPTIONS))}.")
        number = options.get("request_id")
        if not (number is None or type(number) is int or (isinstance(number, str) and len(number) <= 64)):
            raise RequestError("Found a request_id that is neither an integer nor a string of up to 64 characters.")
        request = PolicyRequest(
            session.policy.adapter.read(values, session.task),
            options.get("seed", session.seed),
            options.get("call", session.calls),
            options.get("guidance"),
            options.get("previous"),
            options.get("delay", 0),
        )
        session.policy.check(request, session.rails)
        return options, request

    def _control(self, values: dict, session: Session) -> dict:
        seed, task = values.get("__seed__"), values.get("__task__") or None
        if values["__ctrl__"] == "episode_start":
            if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
                raise RequestError(f"Found {str(seed)[:60]} as __seed__. It is an integer from 0.")
            if task is not None and (not isinstance(task, str) or len(task) > 2000):
                raise RequestError("Found a __task__ that is no string of up to 2000 characters.")
            session.start_episode(seed, task)
        elif values["__ctrl__"] == "episode_end":
            session.end_episode()
        else:
            raise RequestError("Found an unknown __ctrl__. Known: episode_start, episode_end.")
        return {"__ack__": values["__ctrl__"]}


def _error(kind: str, message: str, number: str | None = None) -> str:
    return json.dumps({"error": kind, "message": message, "id": number or uuid.uuid4().hex[:12]})
