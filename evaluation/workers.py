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


class Worker:
    """One process of `worker.py`: jobs go in, each is answered by one reply.

    Args:
        number: of the worker, for messages.
        spec_path: JSON file of the spec.
        log_path: gets everything that the process prints.
        modules_cache: where remote code of checkpoints is copied to; one for each process, so that none reads a
            half-written file.
    """

    def __init__(self, number: int, spec_path: Path, log_path: Path, modules_cache: Path) -> None:
        self.number, self.log_path = number, log_path
        self.job: dict | None = None  # what it is busy with
        environment = {**os.environ, **SINGLE_THREAD, "HF_MODULES_CACHE": str(modules_cache)}
        with open(log_path, "ab") as log:
            self.process = subprocess.Popen(
                # -P: this folder must not be importable, its metaworld.py would hide the real package.
                [sys.executable, "-P", str(WORKER_SCRIPT), str(spec_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )

    def send(self, job: dict) -> None:
        """Gives the worker a job.

        Raises:
            WorkerError: the process stopped.
        """
        self.job = job
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._raise_stopped()

    def receive(self) -> Any:
        """Waits for the reply to the job.

        Raises:
            WorkerError: the process stopped.
        """
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            self._raise_stopped()

    def begin_to_stop(self) -> None:
        """Asks the process to leave."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # an idle worker leaves at the end of its input
        self.process.terminate()

    def stop(self) -> None:
        """Waits until the process has left, and makes it after five seconds."""
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _raise_stopped(self) -> None:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "none: it is still running"
        tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-LOG_LINES_IN_ERROR:])
        raise WorkerError(
            f"Worker {self.number} stopped (exit code {code}) at the job {self.job}.\n"
            f"Its whole log is {self.log_path}; it ends with:\n{tail}"
        ) from None


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
        (self._scratch / "spec.json").write_text(json.dumps(spec))
        self._keep_scratch = False
        self.workers: list[Worker] = []
        for number in range(num_workers):
            (self.log_dir / f"worker-{number}.log").unlink(missing_ok=True)
            self.workers.append(self._start(number))

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _start(self, number: int) -> Worker:
        log_path = self.log_dir / f"worker-{number}.log"
        return Worker(number, self._scratch / "spec.json", log_path, self._scratch / f"modules-{number}")

    def restart(self, worker: Worker) -> None:
        """Puts a new process in the place of a worker that stopped or hangs; its log goes on."""
        worker.process.kill()
        worker.begin_to_stop()
        worker.stop()
        self.workers[worker.number] = self._start(worker.number)

    def map(self, jobs: Sequence[dict]) -> Iterator[tuple[int, Any]]:
        """Runs the jobs on whichever worker is free and yields `(index of the job, reply)` as they finish.

        Raises:
            WorkerError: a worker stopped. Replies that were already yielded stay valid.
        """
        waiting = iter(range(len(jobs)))
        running: dict[int, int] = {}  # number of the worker -> index of its job
        try:
            with selectors.DefaultSelector() as selector:
                for worker in self.workers:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                for worker in self.workers[: len(jobs)]:
                    running[worker.number] = next(waiting)
                    worker.send(jobs[running[worker.number]])
                while running:
                    for key, _ in selector.select():
                        worker = key.data
                        reply = worker.receive()
                        finished = running.pop(worker.number)
                        index = next(waiting, None)
                        if index is not None:
                            running[worker.number] = index
                            worker.send(jobs[index])
                        yield finished, reply
        except WorkerError:
            self.keep_logs()
            raise

    def map_in_order(self, jobs: Sequence[dict]) -> Iterator[Any]:
        """Like `map`, but the replies come in the order of the jobs, whichever worker was faster."""
        early: dict[int, Any] = {}
        position = 0
        for index, reply in self.map(jobs):
            early[index] = reply
            while position in early:
                yield early.pop(position)
                position += 1

    def keep_logs(self) -> None:
        """Lets logs in a temporary folder survive `close`."""
        self._keep_scratch = self.log_dir.parent == self._scratch

    def close(self) -> None:
        """Stops the workers and removes the temporary files."""
        for worker in self.workers:
            worker.begin_to_stop()
        for worker in self.workers:
            worker.stop()
        self.workers.clear()
        if not self._keep_scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
