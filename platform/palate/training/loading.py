"""Reading ahead: the samples of the coming steps are loaded by threads while the model computes the present one.

Decoding an image, and reading a file, let other Python threads run. What a step gets is exactly what the plain loop
would load; only when it is loaded differs.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from palate.training.stream import Cursor, Loaded, Stream, Unit, part

FETCHERS = 4  # threads that bring shards near: they wait for the network, mostly

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """One step's global batch, the cursors after it, and the content of this rank's part of it."""

    units: list[Unit]
    cursors: tuple[Cursor, ...]
    loaded: list[Loaded]


class Ahead:
    """The steps from ``cursors`` on, one by one, for one rank of ``size``.

    A shard that a source says it can bring near (``Source``) is fetched when a window that touches it comes into
    sight: the present window's first, then the next one's.

    Args:
        steps: how many are planned and loaded ahead, and so held in memory; 0 loads each when it is taken.
        readers: threads that load samples.
    """

    def __init__(
        self, stream: Stream, cursors: tuple[Cursor, ...], rank: int, size: int, *, steps: int, readers: int
    ) -> None:
        self._stream, self._cursors, self._rank, self._size, self._steps = stream, cursors, rank, size, steps
        self._seen: tuple[tuple[int, int], ...] = ()  # epochs and windows whose blocks were asked for
        self._asked: set[tuple[int, int]] = set()  # source and block
        self._closed = False
        if steps:
            self._free = threading.Semaphore(steps)
            self._planned: queue.SimpleQueue[
                tuple[list[Unit], tuple[Cursor, ...], list[Future[Loaded]]] | Exception
            ] = queue.SimpleQueue()
            self._readers = ThreadPoolExecutor(readers, "read")
            self._fetchers = ThreadPoolExecutor(FETCHERS, "fetch")
            self._planner = threading.Thread(target=self._plan, name="plan", daemon=True)
            self._planner.start()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self) -> Step:
        """The next step; raises what the plain loop would raise in it."""
        if not self._steps:
            units, self._cursors = self._stream.plan(self._cursors)
            return Step(units, self._cursors, [self._stream.load(unit) for unit in self._mine(units)])
        planned = self._planned.get()
        if isinstance(planned, Exception):
            self._planned.put(planned)  # there is nothing after it
            raise planned
        units, cursors, futures = planned
        loaded = [future.result() for future in futures]
        self._free.release()
        return Step(units, cursors, loaded)

    def close(self) -> None:
        """Stop; what is being read or fetched is waited for, but not what is waited for itself, such as storage that
        does not answer."""
        if self._closed or not self._steps:
            return
        self._closed = True
        self._free.release()
        waiting: list[Any] = [source for source in self._stream.sources if hasattr(source, "end_waits")]
        for source in waiting:
            source.end_waits(True)
        self._planner.join()
        self._readers.shutdown(cancel_futures=True)
        self._fetchers.shutdown(cancel_futures=True)
        for source in waiting:
            source.end_waits(False)

    def _mine(self, units: list[Unit]) -> Sequence[Unit]:
        return part(units, self._rank, self._size)

    def _plan(self) -> None:
        cursors = self._cursors
        try:
            while True:
                self._free.acquire()
                if self._closed:
                    return
                self._prefetch(cursors)
                units, cursors = self._stream.plan(cursors)
                futures = [self._readers.submit(self._stream.load, unit) for unit in self._mine(units)]
                self._planned.put((units, cursors, futures))
        except Exception as error:
            self._planned.put(error)

    def _prefetch(self, cursors: tuple[Cursor, ...]) -> None:
        seen = tuple((cursor.epoch, cursor.window) for cursor in cursors)
        if seen == self._seen:
            return
        self._seen, asked = seen, set()
        for number, blocks in enumerate(self._stream.coming(cursors)):
            source: Any = self._stream.sources[number]
            if hasattr(source, "fetch"):
                for block in source.fetchable(blocks):
                    asked.add((number, block))
                    if (number, block) not in self._asked:
                        self._fetchers.submit(_fetch, source, block)
        self._asked = asked


def _fetch(source: Any, block: int) -> None:
    try:
        source.fetch(block)
    except Exception as error:  # whoever needs the block meets the same error, in the step that it belongs to
        log.debug("block %d of %s could not be fetched ahead: %s", block, source.name, error)
