"""People's vectors in memory, bounded in bytes, and never older than a second or so."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from palate.users.records import Fitted
from palate.users.store import Store

# What an entry takes beside the vector: keys, objects, its place in the map. Measured roughly, so that people without
# a vector are bounded too.
_ENTRY_BYTES = 600

_Name = tuple[str, str, str]  # tenant, user id, head


@dataclass(frozen=True)
class CacheCounts:
    """``hits``: answered from memory, some after a check of versions (``checks``); ``misses``: vectors read."""

    hits: int
    misses: int
    checks: int
    entries: int
    bytes: int


@dataclass(frozen=True)
class _Entry:
    fitted: Fitted | None
    checked: float  # clock, before the database was asked

    @property
    def version(self) -> int | None:
        return None if self.fitted is None else self.fitted.version

    @property
    def bytes(self) -> int:
        return _ENTRY_BYTES + (0 if self.fitted is None else self.fitted.vector_J.nbytes)


class VectorCache:
    """Vectors of the people who were asked for last. Safe to share between threads.

    A change that another replica makes, deletion among them, is seen after at most ``max_age`` seconds: an entry older
    than that is used only if the database still has its version. People without a vector are remembered likewise.
    """

    def __init__(
        self, store: Store, max_bytes: int, max_age: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._clock = clock
        self._lock = threading.Lock()  # never held while the database is asked
        self._entries: OrderedDict[_Name, _Entry] = OrderedDict()
        self._heads: set[str] = set()
        self._bytes = self._hits = self._misses = self._checks = 0

    def get(self, tenant: str, user_id: str, head: str) -> Fitted | None:
        """The person's vector for a head; None if there is none or nobody of that id. The array is read-only."""
        name = (tenant, user_id, head)
        asked = self._clock()
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and asked - entry.checked <= self._max_age:
                self._entries.move_to_end(name)
                self._hits += 1
                return entry.fitted
        if entry is not None:
            _, version = self._store.current(tenant, user_id, head)
            if version == entry.version:
                self._put(name, _Entry(entry.fitted, asked), hits=1, checks=1)
                return entry.fitted
        fitted = self._store.fitted(tenant, user_id, head)
        self._put(name, _Entry(fitted, asked), misses=1, checks=int(entry is not None))
        return fitted

    def forget(self, tenant: str, user_id: str) -> None:
        """Drop what is held of a person, for the replica that has just changed something itself."""
        with self._lock:
            for head in self._heads:
                self._drop((tenant, user_id, head))

    def counts(self) -> CacheCounts:
        with self._lock:
            return CacheCounts(self._hits, self._misses, self._checks, len(self._entries), self._bytes)

    def _put(self, name: _Name, entry: _Entry, hits: int = 0, misses: int = 0, checks: int = 0) -> None:
        with self._lock:
            self._hits += hits
            self._misses += misses
            self._checks += checks
            other = self._entries.get(name)
            if other is not None and other.checked > entry.checked:
                return  # another thread asked later, so it knows better
            self._drop(name)
            self._heads.add(name[2])
            self._entries[name] = entry
            self._bytes += entry.bytes
            while self._bytes > self._max_bytes and self._entries:
                self._drop(next(iter(self._entries)))

    def _drop(self, name: _Name) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._bytes -= entry.bytes
