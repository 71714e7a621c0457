"""An append-only file of records that survives crashes and shows tampering.

Every line is JSON: `{"number": 0, "previous": hash of the line before, "record": {...}, "hash": hash of the rest}`.
A line that was changed, removed or inserted breaks the chain at that place. Lines cut from the *end* leave a shorter
chain that is whole: write down `head` now and then (the forms print it) and compare.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


GENESIS = "0" * 64  # what the first line calls the hash before it


class JournalError(ValueError):
    """The file was changed by something else, or is in use; the message names the line."""


class Journal:
    """The records of a file, in order, and the only way to add one.

    Args:
        path: the file; it is made when it does not exist.

    Raises:
        JournalError: a line breaks the chain, or another process has the journal open.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what a failed write left in one would be written later, after we said that it was not
        self._file = open(self.path, "a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise JournalError(f"{self.path} is open in another process: close that one first.") from error
        try:
            self.records, self.head, complete = _read(self.path)
        except JournalError:
            self._file.close()
            raise
        if complete < self.path.stat().st_size:  # a crash cut the last line short
            self._file.truncate(complete)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file free for others."""
        self._file.close()

    def __iter__(self) -> Iterator[dict]:
        return iter(self.records)

    def append(self, record: dict) -> None:
        """Adds one record; it is on the disk when this returns.

        Raises:
            OSError: the disk is full or gone. The record is not in the journal then, and no half of it stays.
        """
        line, head = _line(len(self.records), self.head, record)
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "the disk took only a part of the record", str(self.path))
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise
        self.records.append(json.loads(line)["record"])
        self.head = head


def read_journal(path: Path | str) -> tuple[list[dict], str]:
    """The records and the head of a journal, verified, without taking its lock (a broken last line is left out)."""
    records, head, _ = _read(Path(path))
    return records, head


def _line(number: int, previous: str, record: dict) -> tuple[bytes, str]:
    body = {"number": number, "previous": previous, "record": record}
    digest = _digest(body)
    return json.dumps({**body, "hash": digest}, ensure_ascii=False).encode() + b"\n", digest


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> tuple[list[dict], str, int]:
    """Records, hash of the last one, and the number of bytes that complete lines take."""
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    records, head = [], GENESIS
    for number, line in enumerate(content[:complete].split(b"\n")[:-1]):
        try:
            entry = json.loads(line)
            body = {name: entry[name] for name in ("number", "previous", "record")}
            digest = entry["hash"]
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(
                f"Line {number + 1} of {path} is no journal entry ({error}): restore a backup."
            ) from error
        if body["number"] != number or body["previous"] != head or _digest(body) != digest:
            raise JournalError(
                f"Line {number + 1} of {path} does not continue the hash chain: it, or a line before it, was changed, "
                "removed or inserted. Results from here on cannot be trusted; restore a backup."
            )
        records.append(body["record"])
        head = digest
    return records, head, complete
