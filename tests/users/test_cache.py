"""Vectors in memory: what other replicas change is seen in time, and the bound holds."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.users import cache as caches
from palate.users.cache import VectorCache
from palate.users.records import Fitted
from palate.users.store import PastText, Store, open_store

HEAD = "head-1"
ENTRY = caches._ENTRY_BYTES + 16 * 4


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Counting:
    """A store that counts what the cache asks it."""

    def __init__(self, store: Store):
        self.store, self.currents, self.reads = store, 0, 0

    def current(self, *name):
        self.currents += 1
        return self.store.current(*name)

    def fitted(self, *name):
        self.reads += 1
        return self.store.fitted(*name)


@pytest.fixture
def clock():
    return Clock()


def put(store, user_id, fill, head=HEAD):
    """A new history for somebody, and a vector of this number for it."""
    person, _ = store.put_history("acme", user_id, [PastText("", f"{user_id} {fill}")])
    assert store.save_fitted("acme", user_id, Fitted(head, person.version, 0, np.full(16, fill, np.float32), 1))


def first(fitted):
    return None if fitted is None else float(fitted.vector_J[0])


def test_a_vector_is_read_once(store, clock):
    put(store, "ann", 1)
    counting = Counting(store)
    cache = VectorCache(counting, 10_000, clock=clock)
    assert [first(cache.get("acme", "ann", HEAD)) for _ in range(5)] == [1.0] * 5
    assert (counting.reads, counting.currents) == (1, 0)
    counts = cache.counts()
    assert (counts.hits, counts.misses, counts.checks, counts.entries, counts.bytes) == (4, 1, 0, 1, ENTRY)


def test_an_old_entry_is_checked_and_kept_while_its_version_stands(store, clock):
    put(store, "ann", 1)
    counting = Counting(store)
    cache = VectorCache(counting, 10_000, max_age=1.0, clock=clock)
    cache.get("acme", "ann", HEAD)
    clock.now += 1.5
    assert first(cache.get("acme", "ann", HEAD)) == 1.0
    clock.now += 0.5
    assert first(cache.get("acme", "ann", HEAD)) == 1.0  # checked half a second ago
    assert (counting.reads, counting.currents) == (1, 1)
    assert (cache.counts().hits, cache.counts().misses, cache.counts().checks) == (2, 1, 1)


def test_what_another_replica_changes_is_seen_within_the_age(url, clock):
    with open_store(url) as here, open_store(url) as there:
        cache = VectorCache(here, 10_000, max_age=1.0, clock=clock)
        put(there, "ann", 1)
        assert first(cache.get("acme", "ann", HEAD)) == 1.0
        put(there, "ann", 2)
        assert first(cache.get("acme", "ann", HEAD)) == 1.0
        clock.now += 1.01
        assert first(cache.get("acme", "ann", HEAD)) == 2.0
        assert there.delete("acme", "ann")
        clock.now += 1.01
        assert cache.get("acme", "ann", HEAD) is None
        put(there, "ann", 3)
        clock.now += 1.01
        assert first(cache.get("acme", "ann", HEAD)) == 3.0
        there.drop_head(HEAD)
        clock.now += 1.01
        assert cache.get("acme", "ann", HEAD) is None


def test_an_out_of_date_vector_is_served_until_the_new_one_is_there(store, clock):
    put(store, "ann", 1)
    cache = VectorCache(store, 10_000, clock=clock)
    store.put_history("acme", "ann", [PastText("", "new")])
    assert first(cache.get("acme", "ann", HEAD)) == 1.0
    clock.now += 2
    assert first(cache.get("acme", "ann", HEAD)) == 1.0


def test_deleting_and_coming_back_within_the_age_is_no_confusion(store, clock):
    """Versions go on after deletion, so the vector of before is not taken for the one of now."""
    put(store, "ann", 1)
    cache = VectorCache(store, 10_000, clock=clock)
    cache.get("acme", "ann", HEAD)
    store.delete("acme", "ann")
    put(store, "ann", 2)
    clock.now += 1.5
    assert first(cache.get("acme", "ann", HEAD)) == 2.0


def test_the_unknown_are_remembered_and_bounded(store, clock):
    counting = Counting(store)
    cache = VectorCache(counting, 10 * caches._ENTRY_BYTES, clock=clock)
    for _ in range(3):
        assert cache.get("acme", "nobody", HEAD) is None
    assert counting.reads == 1
    for number in range(100):
        assert cache.get("acme", f"nobody-{number}", HEAD) is None
    assert cache.counts().entries == 10
    put(store, "nobody", 1)
    clock.now += 1.5
    assert first(cache.get("acme", "nobody", HEAD)) == 1.0


def test_the_least_recently_used_go_first(store, clock):
    for name in ("ann", "bob", "cat"):
        put(store, name, 1)
    counting = Counting(store)
    cache = VectorCache(counting, 2 * ENTRY, clock=clock)
    for name in ("ann", "bob", "ann", "cat", "ann", "bob"):
        cache.get("acme", name, HEAD)
    assert counting.reads == 4  # ann, bob, cat in bob's place, bob
    assert cache.counts().bytes == 2 * ENTRY


def test_a_vector_larger_than_the_cache_is_served_and_not_kept(store, clock):
    put(store, "ann", 1)
    cache = VectorCache(store, ENTRY - 1, clock=clock)
    assert first(cache.get("acme", "ann", HEAD)) == 1.0
    assert (cache.counts().entries, cache.counts().bytes) == (0, 0)


def test_tenants_and_heads_are_apart(store, clock):
    put(store, "ann", 1)
    assert store.save_fitted("acme", "ann", Fitted("head-2", 1, 0, np.full(16, 2.0, np.float32), 1))
    cache = VectorCache(store, 10_000, clock=clock)
    names = [("acme", "ann", HEAD), ("acme", "ann", "head-2"), ("other", "ann", HEAD)]
    for _ in range(2):
        assert [first(cache.get(*name)) for name in names] == [1.0, 2.0, None]


def test_forgetting_a_person_forgets_every_head_and_nobody_else(store, clock):
    for name in ("ann", "bob"):
        put(store, name, 1)
    counting = Counting(store)
    cache = VectorCache(counting, 10_000, clock=clock)

    def ask():
        before = counting.reads
        for name in (("acme", "ann", HEAD), ("acme", "ann", "head-2"), ("acme", "bob", HEAD)):
            cache.get(*name)
        return counting.reads - before

    assert (ask(), ask()) == (3, 0)
    put(store, "ann", 2)
    cache.forget("acme", "ann")
    assert first(cache.get("acme", "ann", HEAD)) == 2.0
    assert ask() == 1
    assert cache.counts().entries == 3
    cache.forget("acme", "nobody")


def test_the_array_cannot_be_changed_by_who_gets_it(store, clock):
    put(store, "ann", 1)
    fitted = VectorCache(store, 10_000, clock=clock).get("acme", "ann", HEAD)
    with pytest.raises(ValueError, match="read-only"):
        fitted.vector_J[0] = 7


def test_a_slow_answer_does_not_replace_a_later_one(clock):
    """One thread asks, is held up, and comes back with an old vector after another thread has read the new one."""

    class Slow:
        def __init__(self):
            self.asked, self.go_on, self.value = threading.Event(), threading.Event(), 1

        def fitted(self, tenant, user_id, head):
            value = self.value
            if value == 1:
                self.asked.set()
                assert self.go_on.wait(30)
            return Fitted(head, value, 0, np.full(16, value, np.float32), 1)

    slow = Slow()
    cache = VectorCache(slow, 10_000, clock=clock)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(cache.get, "acme", "ann", HEAD)
        assert slow.asked.wait(30)
        slow.value, clock.now = 2, clock.now + 0.5
        assert first(cache.get("acme", "ann", HEAD)) == 2.0
        slow.go_on.set()
        assert first(held.result(30)) == 1.0
    assert first(cache.get("acme", "ann", HEAD)) == 2.0
    assert cache.counts().bytes == ENTRY


def test_many_threads_get_what_is_theirs(store):
    for number in range(12):
        put(store, f"u{number}", number)
    cache = VectorCache(store, 6 * ENTRY)

    def ask(thread):
        order = np.random.default_rng(thread).integers(0, 12, 200)
        return all(first(cache.get("acme", f"u{number}", HEAD)) == float(number) for number in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    counts = cache.counts()
    assert counts.hits + counts.misses == 1600
    assert counts.entries == 6
    assert counts.bytes == 6 * ENTRY


class Memory:
    """A store in a dict, for many random histories."""

    def __init__(self):
        self.vectors = {}

    def fitted(self, *name):
        return self.vectors.get(name)

    def current(self, *name):
        found = self.vectors.get(name)
        return (None, None) if found is None else (found.version, found.version)


STEPS = st.lists(
    st.tuples(st.sampled_from(["get", "put", "delete", "wait", "forget"]), st.sampled_from("abcde"), st.integers(1, 40))
)


@given(STEPS, st.integers(0, 3000))
def test_whatever_happens_nothing_older_than_the_age_is_served_and_the_bound_holds(steps, max_bytes):
    clock, memory, versions = Clock(), Memory(), 0
    cache = VectorCache(memory, max_bytes, max_age=1.0, clock=clock)
    past = {}  # by name: (until when it stood, version)
    for action, user_id, size in steps:
        name = ("acme", user_id, HEAD)
        now = memory.vectors.get(name)
        if action in ("put", "delete"):
            past.setdefault(user_id, []).append((clock.now, None if now is None else now.version))
            memory.vectors.pop(name, None)
        if action == "put":
            versions += 1
            memory.vectors[name] = Fitted(HEAD, versions, 0, np.zeros(size, np.float32), 1)
        elif action == "wait":
            clock.now += size / 20
        elif action == "forget":
            cache.forget("acme", user_id)
            past.pop(user_id, None)
        elif action == "get":
            found = cache.get(*name)
            recent = {version for ended, version in past.get(user_id, []) if clock.now - ended <= 1.0}
            assert (None if found is None else found.version) in {None if now is None else now.version} | recent
        entries = cache._entries.values()
        assert cache.counts().bytes == sum(entry.bytes for entry in entries) <= max_bytes
