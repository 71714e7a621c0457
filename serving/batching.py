"""One queue in front of one model: requests that wait together are answered together."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

from .observations import RequestError
from .policy import PolicyRequest


@dataclass(eq=False)
class _Waiting:
    request: PolicyRequest
    future: asyncio.Future
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects requests and calls the model with as many as fit.

    A batch goes as soon as the model is free and: it is full, or everybody who is connected waits in it, or its oldest
    request has waited `window_s`. So a single robot never waits for others.

    Args:
        infer: `ServedPolicy.infer`, called in `executor`.
        executor: has one thread, because the model uses all cores by itself.
        max_batch: requests of one call.
        window_s: the latency budget of batching.
        max_queue: requests that may wait; one more is refused as "busy".
        max_wait_s: a request that waited longer is refused as "busy": its observation is old.
        sessions: how many clients are connected.
        observe: called with the size of each batch.
    """

    def __init__(
        self,
        infer: Callable[[list[PolicyRequest]], list],
        executor: Executor,
        max_batch: int,
        window_s: float,
        max_queue: int,
        max_wait_s: float,
        sessions: Callable[[], int],
        observe: Callable[[int], None],
    ) -> None:
        self._infer, self._executor = infer, executor
        self._max_batch, self._window_s = max_batch, window_s
        self._max_queue, self._max_wait_s = max_queue, max_wait_s
        self._sessions, self._observe = sessions, observe
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._queue)

    async def submit(self, request: PolicyRequest) -> tuple[object, dict]:
        """The outcome of `infer` for this request, and its timing.

        Raises:
            RequestError: "busy".
            Whatever `infer` raises.
        """
        if len(self._queue) >= self._max_queue:
            raise RequestError(f"The server is busy: {self._max_queue} requests wait already. Ask again.", "busy")
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.future

    async def run(self) -> None:
        """Answers requests until cancelled."""
        while True:
            await self._gather()
            batch = self._take()
            if batch:
                await self._answer(batch)

    async def _gather(self) -> None:
        """Returns when a batch should go."""
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        enough = min(self._max_batch, max(1, self._sessions()))
        while len(self._queue) < enough:
            left = self._queue[0].since + self._window_s - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """The oldest request and those with its guidance, up to `max_batch`. Drops who left or waited too long."""
        batch, others, now = [], [], time.monotonic()
        while self._queue and len(batch) < self._max_batch:
            waiting = self._queue.popleft()
            if waiting.future.done():  # cancelled: the client has gone
                continue
            if now - waiting.since > self._max_wait_s:
                message = f"The server is busy: the request waited {now - waiting.since:.2f} s. Ask again."
                waiting.future.set_exception(RequestError(message, "busy"))
            elif not batch or waiting.request.guidance == batch[0].request.guidance:
                batch.append(waiting)
            else:
                others.append(waiting)
        self._queue.extendleft(reversed(others))
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        started = time.monotonic()
        self._observe(len(batch))
        call = asyncio.get_running_loop().run_in_executor(
            self._executor, self._infer, [item.request for item in batch]
        )
        # `wait` does not raise: whatever goes wrong in a model belongs to these requests and must not end this loop
        await asyncio.wait([call])
        seconds, error = time.monotonic() - started, call.exception()
        for index, waiting in enumerate(batch):
            if waiting.future.done():
                continue
            if error is not None:
                waiting.future.set_exception(error)
                continue
            timing = {
                "infer_ms": 1000 * seconds,
                "queue_ms": 1000 * (started - waiting.since),
                "batch_size": len(batch),
            }
            waiting.future.set_result((call.result()[index], timing))
