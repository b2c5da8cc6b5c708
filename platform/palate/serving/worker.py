"""A thread that owns an engine: requests come from any event loop, tokens go back to it as they are chosen.

Decoding comes first. Jobs beside it, such as the forward pass over a new person's texts, run in slices between decode
steps, at most a share of the time while requests run. The queue is bounded: what would wait behind ``max_waiting``
others is refused at once. A request whose stream is closed, by a client that is gone or a stop, frees its slot before
the next step.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from palate.serving.engine import Engine, Event, Request

Result = TypeVar("Result")
Job = Generator[None, None, Result]

log = logging.getLogger(__name__)


class Overloaded(Exception):
    """As many requests wait as may: come back later."""


class EngineFailed(Exception):
    """The engine cannot go on, or is being stopped; its requests are lost and may be sent again, to another replica."""


@dataclass(frozen=True)
class Load:
    """What the worker is doing now: requests that decode or wait, and jobs beside them that wait or run."""

    running: int
    waiting: int
    jobs: int


@dataclass(eq=False)
class _Stream:
    """A request under way and where its events go."""

    request: Request
    deliver: Callable[[Event | BaseException], None]
    id: int | None = None  # the engine's, once it has been submitted
    closed: bool = False


class EngineWorker:
    """Runs ``engine`` until ``stop``.

    Args:
        max_waiting: requests that may wait for a slot.
        job_share: largest share of the time that jobs take while requests run.
    """

    def __init__(self, engine: Engine, *, max_waiting: int, job_share: float = 0.04) -> None:
        if max_waiting < 0 or not 0 < job_share < 1:
            raise ValueError(
                f"max_waiting must be at least 0 and job_share between 0 and 1, found {max_waiting} and {job_share}"
            )
        self.engine = engine
        self._most = engine.slots + max_waiting
        self._job_share = job_share
        self._wake = threading.Condition()
        self._arrived: deque[_Stream] = deque()  # submitted, or to be cancelled
        self._active = 0  # streams that have not ended
        self._streams: dict[int, _Stream] = {}  # by the engine's id; the thread's own
        self._jobs: deque[tuple[Job[Any], Future[Any]]] = deque()
        self._owed = 0.0  # seconds that requests have run since jobs had their share
        self._stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="palate-engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        with self._wake:
            running = min(self._active, self.engine.slots)
            return Load(running, self._active - running, len(self._jobs))

    def require_room(self, count: int) -> None:
        """Refuse ``count`` requests at once, rather than after some of them have begun.

        Raises:
            Overloaded: they do not all fit.
        """
        with self._wake:
            if self._active + count > self._most:
                raise Overloaded(f"{self._active} requests run or wait, and {self._most} may: {count} more do not fit")

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request; the last one carries its completion. Closing the iterator cancels the request.

        Raises:
            Overloaded: too many wait.
            ValueError: the engine cannot serve it.
            EngineFailed: the engine failed, or was stopped, before or while it ran.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException]()

        def deliver(event: Event | BaseException) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        one = _Stream(request, deliver)
        self._enter(one)
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if event.completion is not None:
                    return
        finally:
            self._leave(one)

    def run_beside(self, job: Job[Result]) -> Future[Result]:
        """Run a generator a slice at a time between decode steps; the future holds what it returns.

        Jobs run one after another, on the engine's thread, so they may use its model.
        """
        future: Future[Result] = Future()
        with self._wake:
            if self.failure is not None or self._stopping:
                future.set_exception(EngineFailed("the engine has stopped"))
            else:
                self._jobs.append((job, future))
                self._wake.notify()
        return future

    def stop(self) -> None:
        """End the thread; what still runs fails with ``EngineFailed``."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _enter(self, one: _Stream) -> None:
        with self._wake:
            if self.failure is not None or self._stopping:
                raise EngineFailed("the engine has stopped") from self.failure
            if self._active >= self._most:
                raise Overloaded(f"{self._active} requests run or wait, as many as may")
            self._active += 1
            self._arrived.append(one)
            self._wake.notify()

    def _leave(self, one: _Stream) -> None:
        with self._wake:
            self._active -= 1
            one.closed = True
            self._arrived.append(one)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._wait():
                self._admit()
                if not self.engine.idle:
                    start = time.perf_counter()
                    self._step()
                    self._owed += time.perf_counter() - start
                if self._jobs and (self.engine.idle or self._owed >= 0):
                    self._work()
            self._fail(EngineFailed("the server is stopping"))
        except BaseException as error:
            log.exception("the engine failed")
            self.failure = error
            self._fail(EngineFailed(f"the engine failed: {error}"))

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when it is time to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._arrived or self._jobs or not self.engine.idle)
            return not self._stopping

    def _admit(self) -> None:
        """Submit and cancel what came since the last step."""
        while True:
            with self._wake:
                if not self._arrived:
                    return
                one = self._arrived.popleft()
            if one.closed:
                if one.id is not None and self._streams.pop(one.id, None) is not None:
                    self.engine.cancel(one.id)
            else:
                try:
                    one.id = self.engine.submit(one.request, stream=True)
                    self._streams[one.id] = one
                except ValueError as error:
                    one.deliver(error)

    def _step(self) -> None:
        for event in self.engine.step():
            one = self._streams[event.id] if event.completion is None else self._streams.pop(event.id)
            one.deliver(event)

    def _work(self) -> None:
        """One slice of the first job; it is paid for by the running requests' next seconds."""
        job, future = self._jobs[0]
        if not future.running() and not future.set_running_or_notify_cancel():
            job.close()
            self._end_job()
            return
        start = time.perf_counter()
        try:
            next(job)
        except StopIteration as done:
            self._end_job()
            future.set_result(done.value)
        except Exception as error:  # the job's own trouble, not the engine's
            self._end_job()
            future.set_exception(error)
        spent = time.perf_counter() - start
        self._owed = -spent * (1 - self._job_share) / self._job_share

    def _end_job(self) -> None:
        with self._wake:
            self._jobs.popleft()

    def _fail(self, error: EngineFailed) -> None:
        with self._wake:
            self._stopping = True
            waiting = [one for one in self._arrived if not one.closed]
            jobs, self._jobs = list(self._jobs), deque()
        for one in [*self._streams.values(), *waiting]:
            one.deliver(error)
        for _, future in jobs:
            future.set_exception(error)
