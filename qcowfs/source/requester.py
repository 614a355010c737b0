"""Requests to a server of objects: many at once, asked again while that may help, and given up in time.

Used by objects. A thread of this room waits for the server, and the one that reads waits for that thread: so a read
ends when its time is over, or when the source is closed, whatever the library below is doing.
"""

from __future__ import annotations

import errno
import itertools
import random
import threading
import time
from dataclasses import dataclass, field
from queue import SimpleQueue

from qcowfs import limits
from qcowfs.source.answer import Answer, Content, Failure, Temporary, Transport

__all__ = ["Requester"]

FIRST_PAUSE = 0.1  # seconds before the second try; doubled for each that follows
LONGEST_PAUSE = 5.0  # a server that is back is noticed that soon
GRACE = 0.25  # seconds that a thread may take to tell of a deadline that it keeps itself
FAREWELL = 1.0  # seconds that `close` waits for threads; they hold nothing, and the process ends without them


@dataclass(eq=False, slots=True)
class _Job:
    """A request of somebody who waits until `done` can be acquired."""

    start: int
    length: int
    held: Content | None
    deadline: float
    impatient: bool
    done: threading.Lock = field(default_factory=threading.Lock)
    outcome: Answer | BaseException | None = None


class Requester:
    """Asks one server for parts of one object. Any thread.

    Args:
        patience: seconds that one request may take, with all that is asked again.
    """

    def __init__(self, transport: Transport, patience: float) -> None:
        self._transport = transport
        self._patience = patience
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()  # guards the two below
        self._pending: set[_Job] = set()  # asked, and not answered by a thread: their readers may be gone
        self._threads: list[threading.Thread] = []

    def get(self, start: int, length: int, held: Content | None, *, impatient: bool = False) -> Answer:
        """Return `length` bytes from `start` on; fewer only at the end of the object.

        Args:
            held: the content that is being read; None: whichever there is.
            impatient: a server that cannot be reached at all is a failure at once.

        Raises:
            Failure: they cannot be had.
        """
        job = _Job(start, length, held, time.monotonic() + self._patience, impatient)
        job.done.acquire()
        with self._lock:
            if self._closed.is_set():
                raise _closed()
            self._pending.add(job)
            if len(self._threads) < min(len(self._pending), limits.MAX_REQUESTS):
                self._start_thread()
        self._queue.put(job)
        if not job.done.acquire(timeout=self._patience + GRACE):
            raise Failure(f"no answer within {self._patience:g} seconds")
        if isinstance(job.outcome, BaseException):
            raise job.outcome
        assert job.outcome is not None
        return job.outcome

    def close(self) -> None:
        """Let everybody who waits fail, and end the threads."""
        self._closed.set()
        with self._lock:
            waiting, threads = list(self._pending), self._threads[:]
        for job in waiting:
            self._finish(job, _closed())
        self._transport.close()
        for _ in threads:
            self._queue.put(None)
        end = time.monotonic() + FAREWELL
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="qcowfs-request", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._finish(job, self._ask(job))
            except BaseException as error:
                self._finish(job, error)
            job = None  # or it would keep the bytes until the next one comes

    def _finish(self, job: _Job, outcome: Answer | BaseException) -> None:
        with self._lock:
            if job not in self._pending:  # `close` was faster
                return
            self._pending.remove(job)
        job.outcome = outcome
        job.done.release()

    def _ask(self, job: _Job) -> Answer:
        """Ask until there is an answer, pausing longer each time; partly at random, so that not all ask together."""
        for attempt in itertools.count():
            if self._closed.is_set() or time.monotonic() >= job.deadline:
                break
            try:
                return self._transport.get(job.start, job.length, job.held, job.deadline)
            except Temporary as failure:
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempt, 10)) * random.uniform(0.5, 1.0)
                pause = max(pause, failure.after)
                in_vain = time.monotonic() + pause >= job.deadline or (job.impatient and failure.unreachable)
                if in_vain or self._closed.wait(pause):
                    raise
        raise Failure(f"no answer within {self._patience:g} seconds")


def _closed() -> Failure:
    return Failure("it was closed", errno=errno.EBADF)
