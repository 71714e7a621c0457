"""Worker processes for simulators and policies: started by path, fed one job at a time, replies in any order.

Plain subprocesses instead of `multiprocessing`: they can run in a process where `wallvla` cannot be imported, they do
not import the caller's `__main__`, and one that dies takes nobody with it. A worker reads a JSON job per line from its
standard input and answers each with one pickle on its standard output; everything that it prints goes to its log.
"""

import contextlib
import json
import os
import pickle
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


WORKER_SCRIPT = Path(__file__).with_name("worker.py")
LOG_LINES_IN_ERROR = 12
# One thread per worker: the parallelism is the workers. LP_ is Mesa's software renderer.
SINGLE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "LP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class WorkerError(RuntimeError):
    """A worker process stopped; the message names the job, the end of its log and where the log lies."""


class WorkerPool:
    """`num_workers` processes of `worker.py`, all with the same spec.

    Args:
        spec: plain JSON data; `spec["job"]` says what the workers do (see `worker.py`).
        num_workers: number of processes.
        log_dir: folder for `worker-<i>.log`; by default a temporary one, which survives only an error.

    Use it as a context manager: leaving it, also by an error or ctrl-C, stops the processes.
    """

    def __init__(self, spec: dict, num_workers: int, log_dir: Path | str | None = None) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}.")
        self._scratch = Path(tempfile.mkdtemp(prefix="wallvla-workers-"))
        self.log_dir = self._scratch / "logs" if log_dir is None else Path(log_dir)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        spec_path = self._scratch / "spec.json"
        spec_path.write_text(json.dumps(spec))
        self._keep_scratch = False
        self._processes: list[subprocess.Popen] = []
        self._jobs: list[dict | None] = [None] * num_workers  # what each worker is busy with
        for index in range(num_workers):
            # Remote code of a checkpoint is copied into this cache: one each, so that none reads a half-written file.
            environment = {**os.environ, **SINGLE_THREAD, "HF_MODULES_CACHE": str(self._scratch / f"modules-{index}")}
            with open(self._log_path(index), "wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        # -P: this folder must not be importable, its metaworld.py would hide the real package.
                        [sys.executable, "-P", str(WORKER_SCRIPT), str(spec_path)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=environment,
                    )
                )

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def map(self, jobs: Sequence[dict]) -> Iterator[tuple[int, Any]]:
        """Runs the jobs on whichever worker is free and yields `(index of the job, reply)` as they finish.

        Raises:
            WorkerError: a worker stopped. Replies that were already yielded stay valid.
        """
        waiting = iter(range(len(jobs)))
        running: dict[int, int] = {}  # worker -> index of its job
        with selectors.DefaultSelector() as selector:
            for worker, process in enumerate(self._processes):
                selector.register(process.stdout, selectors.EVENT_READ, worker)
            for worker in range(min(len(self._processes), len(jobs))):
                running[worker] = next(waiting)
                self._send(worker, jobs[running[worker]])
            while running:
                for key, _ in selector.select():
                    worker = key.data
                    reply = self._receive(worker)
                    finished = running.pop(worker)
                    index = next(waiting, None)
                    if index is not None:
                        running[worker] = index
                        self._send(worker, jobs[index])
                    yield finished, reply

    def map_in_order(self, jobs: Sequence[dict]) -> Iterator[Any]:
        """Like `map`, but the replies come in the order of the jobs, whichever worker was faster."""
        early: dict[int, Any] = {}
        position = 0
        for index, reply in self.map(jobs):
            early[index] = reply
            while position in early:
                yield early.pop(position)
                position += 1

    def close(self) -> None:
        """Stops the workers and removes the temporary files."""
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # an idle worker leaves at the end of its input
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self._processes.clear()
        if not self._keep_scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _log_path(self, worker: int) -> Path:
        return self.log_dir / f"worker-{worker}.log"

    def _send(self, worker: int, job: dict) -> None:
        self._jobs[worker] = job
        try:
            self._processes[worker].stdin.write(json.dumps(job).encode() + b"\n")
            self._processes[worker].stdin.flush()
        except BrokenPipeError:
            self._raise_stopped(worker)

    def _receive(self, worker: int) -> Any:
        try:
            return pickle.load(self._processes[worker].stdout)
        except (EOFError, pickle.UnpicklingError):
            self._raise_stopped(worker)

    def _raise_stopped(self, worker: int) -> None:
        self._keep_scratch = self.log_dir.parent == self._scratch
        try:
            code = self._processes[worker].wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "none: it is still running"
        log = self._log_path(worker)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_IN_ERROR:])
        raise WorkerError(
            f"Worker {worker} stopped (exit code {code}) at the job {self._jobs[worker]}.\n"
            f"Its whole log is {log}; it ends with:\n{tail}"
        ) from None
