"""One thread that computes for many requests, so that none of them blocks the others."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Generator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


class RefusedError(Exception):
    """End of a request without a result: there are too many, or the server stops."""


@dataclass(order=True)
class _Job:
    size: int
    number: int
    steps: Generator[Any, None, Any] = field(compare=False)
    result: futures.Future[Any] = field(compare=False, default_factory=futures.Future)


class Scheduler:
    """Thread that advances one request at a time, always one of the smallest, and of those the first.

    So a small request is answered within its own computing time, however many large ones there are, whose clients may
    have gone. ``limit`` is the largest number of unfinished requests.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._jobs: list[_Job] = []  # the next one first
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._stopped = False
        threading.Thread(target=self._work, name="scheduler", daemon=True).start()

    def run(self, steps: Generator[Any, None, T], work: int, seconds: float | None = None) -> T:
        """Run the generator ``steps`` to its end and return its result. Other requests may run whenever it yields.

        Requests of about the same ``work`` run in the order of their arrival.

        Raises:
            TimeoutError: ``seconds`` have passed.
            RefusedError: there are too many requests, or :meth:`stop` was called.
        """
        # Powers of two: with finer sizes, ever smaller requests could interrupt each other, each with its own KV cache.
        job = _Job(work.bit_length(), next(self._numbers), steps)
        with self._changed:
            if self._stopped:
                raise RefusedError("the server is stopping")
            if len(self._jobs) >= self.limit:
                raise RefusedError(f"{self.limit} requests are waiting already")
            bisect.insort(self._jobs, job)
            self._changed.notify()
        try:
            return job.result.result(seconds)
        except futures.TimeoutError:  # not the built-in one before Python 3.11
            raise TimeoutError from None
        finally:  # an error, or Ctrl-C, also ends the work
            self._remove(job)

    def stop(self) -> None:
        """End all requests, now and later."""
        with self._changed:
            self._stopped, jobs, self._jobs = True, self._jobs, []
        for job in jobs:
            job.result.set_exception(RefusedError("the server is stopping"))

    def _remove(self, job: _Job) -> bool:
        """Remove a job; return whether it was still there, so that its result is set only once."""
        with self._changed:
            present = job in self._jobs
            if present:
                self._jobs.remove(job)
            return present

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs)
                job = self._jobs[0]
            try:
                next(job.steps)
            except StopIteration as end:
                if self._remove(job):
                    job.result.set_result(end.value)
            except BaseException as error:
                if self._remove(job):
                    job.result.set_exception(error)
            del job  # closes the generator of a request that has been removed
