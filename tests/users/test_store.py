"""People in both databases: versions, vectors, leases, deletion, export."""

import base64
import itertools
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import MetaData, insert, select
from sqlalchemy.exc import DBAPIError

from palate.users import schema
from palate.users.checks import MOST_TEXTS, require_id
from palate.users.records import ExportedPerson, Ranking
from palate.users.store import Fitted, PastText, Store, open_store

HEAD = "head-1"
LETTER = PastText("Write a letter", "Dear all, hullo", "2024-05-01")
NOTE = PastText("", "Milk, eggs.")


def fit(version: int, head: str = HEAD, fill: float = 0.5, cluster: int = 2) -> Fitted:
    return Fitted(head, version, cluster, np.full(8, fill, dtype=np.float32), 2)


def together(functions):
    """Call functions in a thread each, started at once; their results."""
    start = threading.Barrier(len(functions))

    def call(function):
        start.wait(timeout=30)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [done.result(timeout=60) for done in [pool.submit(call, function) for function in functions]]


# Histories and versions


def test_a_history_comes_back_whole_and_in_order(store):
    known, changed = store.put_history("acme", "ann", [LETTER, NOTE, LETTER])
    assert changed
    assert known == store.known("acme", "ann")
    assert (known.tenant, known.user_id, known.version, known.count) == ("acme", "ann", 1, 3)
    person = store.person("acme", "ann")
    assert person.texts == (LETTER, NOTE, LETTER)
    same = ("tenant", "user_id", "version", "created", "updated")
    assert [getattr(person, name) for name in same] == [getattr(known, name) for name in same]
    assert person.created.utcoffset().total_seconds() == 0
    for nobody in (("acme", "bob"), ("other", "ann")):
        assert store.person(*nobody) is store.known(*nobody) is None


def test_equal_texts_write_nothing_and_others_count_up(store):
    first, _ = store.put_history("acme", "ann", [LETTER, NOTE])
    assert store.put_history("acme", "ann", (LETTER, NOTE)) == (first, False)
    person, changed = store.put_history("acme", "ann", [NOTE, LETTER])
    assert changed
    assert person.version == 2
    assert person.created == first.created
    assert person.updated > first.updated
    assert store.put_history("acme", "ann", [])[0].count == 0
    assert (store.person("acme", "ann").version, store.person("acme", "ann").texts) == (3, ())


def test_a_first_history_may_be_empty(store):
    person, changed = store.put_history("acme", "ann", [])
    assert (person.version, person.count, changed) == (1, 0, True)
    assert store.put_history("acme", "ann", [])[1] is False


def test_tenants_do_not_see_each_others_people(store):
    store.put_history("acme", "ann", [LETTER])
    store.put_history("other", "ann", [NOTE])
    store.add_feedback("other", "ann", "p", "a", "e")
    assert store.person("acme", "ann").texts == (LETTER,)
    assert store.feedback("acme", "ann") == []
    assert store.save_fitted("other", "ann", fit(2))
    assert store.fitted("acme", "ann", HEAD) is None
    assert store.delete("acme", "ann")
    assert store.person("other", "ann").texts == (NOTE, PastText("p", "e"))
    assert store.fitted("other", "ann", HEAD) is not None


def test_texts_of_any_language_and_length_survive(store):
    texts = [PastText("é" * 70_000, "漢字\n\t'\"\\ 🎈 %s :name", ""), PastText("", "")]
    store.put_history("acme", "ann", texts)
    assert store.person("acme", "ann").texts == tuple(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PastText("a\0b", "c"), r"texts\[1\]\.input holds the character U\+0000 at position 1"),
        (PastText("a", "\ud800"), r"texts\[1\]\.output holds half a surrogate pair at position 0"),
        (PastText("a", "b", "\0"), r"texts\[1\]\.date"),
        (PastText("a", 7), r"texts\[1\]\.output is of type int"),
    ],
)
def test_a_text_that_cannot_be_stored_is_refused_by_name_and_nothing_is_written(store, text, message):
    with pytest.raises(ValueError, match=message):
        store.put_history("acme", "ann", [LETTER, text])
    assert store.person("acme", "ann") is None


def test_versions_of_a_person_go_on_after_deletion(store):
    for number in range(3):
        store.put_history("acme", "ann", [PastText("", str(number))])
    store.put_history("acme", "bob", [NOTE])
    assert store.delete("acme", "ann")
    assert store.put_history("acme", "ann", [LETTER])[0].version == 4
    assert store.put_history("acme", "bob", [LETTER])[0].version == 2  # who stayed counts on by one
    assert store.delete("acme", "bob")
    assert store.delete("acme", "ann")
    assert store.put_history("acme", "ann", [NOTE])[0].version == 5
    assert store.put_history("other", "ann", [NOTE])[0].version == 1


def test_eight_threads_that_put_histories_end_with_one_of_them_whole(store):
    histories = [[PastText(str(thread), f"{thread} {place}") for place in range(20)] for thread in range(8)]

    def put(history):
        return lambda: [store.put_history("acme", "ann", history)[0].version for _ in range(5)]

    store.put_history("acme", "ann", [NOTE])
    together([put(history) for history in histories])
    person = store.person("acme", "ann")
    assert list(person.texts) in histories
    with store.read() as connection:
        stored = connection.execute(select(schema.texts)).all()
    assert len(stored) == 20
    assert 1 + 8 <= person.version <= 1 + 8 * 5


def test_every_version_belongs_to_one_history_under_concurrent_writes(store):
    def put(thread):
        return lambda: [store.put_history("acme", "ann", [NOTE] * (6 * thread + k))[0] for k in range(6)]

    people = list(itertools.chain(*together([put(thread) for thread in range(8)])))
    assert sorted(person.version for person in people) == list(range(1, 49))
    assert sorted(person.count for person in people) == list(range(48))


def test_a_version_is_never_given_twice_while_a_person_is_deleted_and_put_again(store):
    def put(thread):
        return lambda: [store.put_history("acme", "ann", [PastText(str(thread), str(k))])[0] for k in range(6)]

    def remove():
        return [store.delete("acme", "ann") for _ in range(6)]

    results = together([*[put(thread) for thread in range(4)], remove, remove])
    people = list(itertools.chain(*results[:4]))
    assert len({person.version for person in people}) == len(people) == 24


def test_a_reader_sees_one_version_with_its_own_texts(store):
    def history(number):
        return [PastText(str(number), str(place)) for place in range(5)]

    store.put_history("acme", "ann", history(1))
    done = threading.Event()

    def write():
        for number in range(2, 22):
            store.put_history("acme", "ann", history(number))
        done.set()

    def watch():
        seen = []
        while not done.is_set():
            seen.append(store.person("acme", "ann"))
        return seen

    for person in together([write, watch])[1]:
        assert list(person.texts) == history(person.version)


# Ids


@pytest.mark.parametrize("value", ["a", "a" * 128, "ann@example.com", "A:b_c-d.0", "...", "-"])
def test_ids(value, store):
    assert require_id(value, "user id") == value
    assert store.put_history("acme", value, [NOTE])[0].user_id == value
    assert store.people("acme") == [value]


@pytest.mark.parametrize("value", ["", ".", "..", "a/b", "a b", "a\n", "é", "a" * 129, "a\0", None, 7, "a\\b", "%2e"])
def test_what_is_no_id_is_refused(value, store):
    with pytest.raises(ValueError, match=r"user id is .*expected 1 to 128 characters"):
        store.put_history("acme", value, [NOTE])
    with pytest.raises(ValueError, match="tenant is "):
        store.add_feedback(value, "ann", "p", "a", "e")
    assert store.count("acme") == 0


def test_ids_are_listed_page_by_page_in_the_order_of_code_points(store):
    names = ["b", "a", "B", "_", "a-1", "a.1", "a:1", "Z", "9", "ab"]
    for name in names:
        store.put_history("acme", name, [NOTE])
    store.put_history("other", "c", [NOTE])
    assert store.count("acme") == 10
    assert store.people("acme") == sorted(names)
    pages, after = [], ""
    while page := store.people("acme", after=after, limit=3):
        pages.append(page)
        after = page[-1]
    assert [len(page) for page in pages] == [3, 3, 3, 1]
    assert list(itertools.chain(*pages)) == sorted(names)
    assert store.people("nobody") == []


# Feedback


def test_a_full_history_takes_no_feedback_so_that_it_can_be_exported_and_imported(store):
    store.put_history("acme", "ann", [PastText("", str(number)) for number in range(MOST_TEXTS)])
    before = store.person("acme", "ann")
    with pytest.raises(ValueError, match="has 10000 texts, the most"):
        store.add_feedback("acme", "ann", "p", "a", "e")
    assert store.person("acme", "ann") == before
    assert store.feedback("acme", "ann") == []


PAIR = ("a" * 64, "b" * 64)
WRITES = {
    "history": lambda store, more: store.put_history("acme", "ann", [PastText("é" * more, "x" * 50, "day")]),
    "feedback": lambda store, more: store.add_feedback("acme", "ann", "p", "é" * more, "x" * 8),
    "import": lambda store, more: store.restore(
        "acme", {**store.export("acme", "ann"), "texts": [{"input": "é" * more, "output": "x" * 40}]}
    ),
    "ranking": lambda store, more: store.add_ranking("acme", Ranking("ann", "r-2", "é" * more, PAIR), list),
}


@pytest.mark.parametrize(
    ("write", "fills"), [("history", 39), ("feedback", 22), ("import", 52), ("ranking", 40)], ids=[*WRITES]
)
def test_what_is_kept_of_a_person_is_bounded_in_characters(store, monkeypatch, write, fills):
    """Texts, edited answers and rankings count together, and what is refused leaves them as they were."""
    monkeypatch.setattr("palate.users.store.MOST_CHARACTERS", 100)
    store.put_history("acme", "ann", [PastText("é" * 30, "b" * 10, "2024-05-01")])  # 50
    store.add_feedback("acme", "ann", "p", "a", "e")  # 3, and 2 of the history
    store.add_ranking("acme", Ranking("ann", "r-1", "maybe", PAIR), list)  # 5
    before, fitted = store.export("acme", "ann"), store.known("acme", "ann")
    with pytest.raises(ValueError, match=r"ann would have 101 characters .* at most 100 .* delete the person"):
        WRITES[write](store, fills + 1)
    assert store.export("acme", "ann") == before
    assert store.known("acme", "ann") == fitted
    store.put_history("acme", "bob", [PastText("", "c" * 100)])  # another's room
    WRITES[write](store, fills)
    with pytest.raises(ValueError, match="at most 100"):
        store.add_feedback("acme", "ann", "", "", "e")


def test_a_whole_history_is_read_by_nobody_who_needs_a_number(store, monkeypatch):
    monkeypatch.setattr("palate.users.store._history", None)
    assert store.put_history("acme", "ann", [LETTER, NOTE])[0].count == 2
    assert store.put_history("acme", "ann", [LETTER])[0].count == 1
    assert store.add_feedback("acme", "ann", "p", "a", "e").count == 2
    assert store.known("acme", "ann").count == 2


def test_who_only_ranked_comes_back_from_an_export(store, tmp_path):
    store.add_ranking("acme", Ranking("ann", "r-1", "a prompt", PAIR), list)
    exported = store.export("acme", "ann")
    assert exported["texts"] == []
    assert store.restore("acme", exported).count == 0
    assert store.export("acme", "ann")["rankings"] == exported["rankings"]


def test_feedback_is_kept_and_becomes_the_latest_text(store):
    store.put_history("acme", "ann", [LETTER])
    known = store.add_feedback("acme", "ann", "Write a note", "Buy milk!", "milk pls")
    assert (known.version, known.count) == (2, 2)
    assert store.add_feedback("acme", "ann", "Again", "x", "y") == store.known("acme", "ann")
    assert store.person("acme", "ann").texts == (LETTER, PastText("Write a note", "milk pls"), PastText("Again", "y"))
    first, second = store.feedback("acme", "ann")
    assert (first.prompt, first.answer, first.edited) == ("Write a note", "Buy milk!", "milk pls")
    assert first.id < second.id
    assert first.created <= second.created


def test_feedback_makes_a_person(store):
    assert store.add_feedback("acme", "ann", "p", "a", "e").version == 1
    assert store.person("acme", "ann").texts == (PastText("p", "e"),)
    with pytest.raises(ValueError, match="edited holds the character"):
        store.add_feedback("acme", "bob", "p", "a", "\0")
    assert store.people("acme") == ["ann"]


def test_no_concurrent_feedback_is_lost(store):
    def add(thread):
        return lambda: [store.add_feedback("acme", "ann", f"{thread}", "a", f"{k}") for k in range(5)]

    together([add(thread) for thread in range(8)])
    person = store.person("acme", "ann")
    assert person.version == 40
    assert len(set(person.texts)) == len(person.texts) == 40
    assert len(store.feedback("acme", "ann")) == 40


# Vectors


def test_a_vector_comes_back_bit_by_bit(store):
    person, _ = store.put_history("acme", "ann", [LETTER])
    vector_J = np.random.default_rng(0).normal(size=64).astype(np.float32)
    assert store.save_fitted("acme", "ann", Fitted(HEAD, person.version, np.int64(3), vector_J, 1))
    found = store.fitted("acme", "ann", HEAD)
    assert (found.head, found.version, found.cluster, found.texts) == (HEAD, 1, 3, 1)
    assert found.vector_J.dtype == np.float32
    np.testing.assert_array_equal(found.vector_J, vector_J)
    assert store.fitted("acme", "ann", "head-2") is None
    assert store.current("acme", "ann", HEAD) == (1, 1)
    assert store.current("acme", "ann", "head-2") == (1, None)
    assert store.current("acme", "bob", HEAD) == (None, None)


def test_a_vector_of_another_version_or_of_nobody_is_not_written(store):
    assert not store.save_fitted("acme", "ann", fit(1))
    store.put_history("acme", "ann", [LETTER])
    assert store.save_fitted("acme", "ann", fit(1, fill=1.0))
    store.put_history("acme", "ann", [NOTE])
    assert store.current("acme", "ann", HEAD) == (2, 1)
    assert not store.save_fitted("acme", "ann", fit(1, fill=2.0))
    assert not store.save_fitted("acme", "ann", fit(3, fill=2.0))
    assert store.fitted("acme", "ann", HEAD).vector_J[0] == 1.0  # the old one is served on
    assert store.save_fitted("acme", "ann", fit(2, fill=3.0))
    assert store.fitted("acme", "ann", HEAD).vector_J[0] == 3.0
    store.delete("acme", "ann")
    assert not store.save_fitted("acme", "ann", fit(2))
    assert store.fitted("acme", "ann", HEAD) is None


@pytest.mark.parametrize(
    "vector", [np.zeros((2, 2), np.float32), np.array([1.0, np.nan]), np.array([1, 2]), np.array([1e300])]
)
def test_what_is_no_vector_is_refused(store, vector):
    store.put_history("acme", "ann", [LETTER])
    with pytest.raises(ValueError, match=r"the vector for head 'head-1' is .*expected \(J,\) finite"):
        store.save_fitted("acme", "ann", Fitted(HEAD, 1, 0, vector, 1))
    assert store.fitted("acme", "ann", HEAD) is None


def test_dropping_a_head_leaves_the_others(store):
    for name in ("ann", "bob"):
        store.put_history("acme", name, [LETTER])
        store.save_fitted("acme", name, fit(1))
    store.save_fitted("acme", "ann", fit(1, "head-2"))
    assert store.drop_head(HEAD) == 2
    assert store.fitted("acme", "ann", HEAD) is None
    assert store.fitted("acme", "ann", "head-2") is not None
    assert store.stale(HEAD) == 2
    assert store.drop_head(HEAD) == 0


# Leases


def names(people):
    return [person.user_id for person in people]


def test_who_has_no_vector_or_an_old_one_is_claimed_once(store):
    for name in ("ann", "bob", "cat"):
        store.put_history("acme", name, [LETTER])
    store.save_fitted("acme", "ann", fit(1))
    store.save_fitted("acme", "bob", fit(1))
    store.put_history("acme", "bob", [NOTE])
    assert store.stale(HEAD) == 2
    claimed = store.claim_stale(HEAD, "one", seconds=60, limit=10)
    assert sorted(names(claimed)) == ["bob", "cat"]
    assert next(person for person in claimed if person.user_id == "bob") == store.person("acme", "bob")
    assert store.claim_stale(HEAD, "two", seconds=60, limit=10) == []
    assert store.claim_stale(HEAD, "one", seconds=60, limit=10) == []
    assert store.stale(HEAD) == 2
    assert len(store.claim_stale("head-2", "two", seconds=60, limit=10)) == 3  # another head, another lease
    assert store.save_fitted("acme", "bob", fit(2))
    assert store.stale(HEAD) == 1
    store.put_history("acme", "bob", [LETTER])
    assert names(store.claim_stale(HEAD, "two", seconds=60, limit=10)) == ["bob"]


def test_a_lease_runs_out(store):
    store.put_history("acme", "ann", [LETTER])
    assert names(store.claim_stale(HEAD, "one", seconds=0)) == ["ann"]
    assert names(store.claim_stale(HEAD, "two", seconds=60)) == ["ann"]
    assert store.claim_stale(HEAD, "three", seconds=60) == []


def test_an_owner_that_stops_gives_its_people_back(store):
    for name in ("ann", "bob", "cat"):
        store.put_history("acme", name, [LETTER])
    assert len(store.claim_stale(HEAD, "one", seconds=60, limit=2)) == 2
    assert len(store.claim_stale(HEAD, "two", seconds=60, limit=2)) == 1
    assert store.release("one") == 2
    assert store.release("one") == 0
    assert len(store.claim_stale(HEAD, "three", seconds=60, limit=9)) == 2


def test_a_history_that_changes_during_a_fit_is_claimed_when_the_fit_ends(store):
    store.put_history("acme", "ann", [LETTER])
    store.claim_stale(HEAD, "one", seconds=60)
    store.put_history("acme", "ann", [NOTE])
    assert store.claim_stale(HEAD, "two", seconds=60) == []
    assert not store.save_fitted("acme", "ann", fit(1))
    assert [person.version for person in store.claim_stale(HEAD, "two", seconds=60)] == [2]
    assert not store.save_fitted("acme", "ann", fit(1))  # the outdated fit ends no lease but its own
    assert store.claim_stale(HEAD, "three", seconds=60) == []


def test_claims_of_one_tenant_and_the_limit(store):
    for tenant, name in itertools.product(("acme", "other"), ("ann", "bob", "cat")):
        store.put_history(tenant, name, [LETTER])
    assert store.stale(HEAD) == 6
    assert store.stale(HEAD, tenant="other") == 3
    claimed = store.claim_stale(HEAD, "one", seconds=60, limit=2, tenant="other")
    assert [(person.tenant, person.user_id) for person in claimed] == [("other", "ann"), ("other", "bob")]
    assert len(store.claim_stale(HEAD, "one", seconds=60, limit=9, tenant="other")) == 1
    assert len(store.claim_stale(HEAD, "one", seconds=60, limit=9)) == 3
    with pytest.raises(ValueError, match="limit is 0"):
        store.claim_stale(HEAD, "one", seconds=60, limit=0)


def test_everybody_is_found_whatever_the_order_of_changes(store):
    """The search goes on where it ended; people before that place must still be found."""
    for number in range(10):
        store.put_history("acme", f"u{number}", [LETTER])
    assert len(store.claim_stale(HEAD, "one", seconds=60, limit=7)) == 7
    for number in range(7):
        store.save_fitted("acme", f"u{number}", fit(1))
    store.put_history("acme", "u0", [NOTE])
    store.put_history("acme", "u5", [NOTE])
    claimed = store.claim_stale(HEAD, "one", seconds=60, limit=4)
    assert names(claimed) == ["u7", "u8", "u9", "u0"]
    assert names(store.claim_stale(HEAD, "one", seconds=60, limit=4)) == ["u5"]


def test_replicas_that_claim_at_once_share_everybody_without_overlap(url):
    stores = [open_store(url) for _ in range(4)]
    for number in range(60):
        stores[0].put_history("acme", f"u{number}", [LETTER])

    def work(store: Store, owner: str):
        def fit_all():
            mine = []
            while claimed := store.claim_stale(HEAD, owner, seconds=60, limit=3):
                for person in claimed:
                    mine.append(person.user_id)
                    assert store.save_fitted("acme", person.user_id, fit(person.version))
            return mine

        return fit_all

    fitted = list(itertools.chain(*together([work(store, str(place)) for place, store in enumerate(stores * 2)])))
    # One that finds others writing passes over; whoever is last has to look once more.
    fitted += work(stores[0], "last")()
    assert sorted(fitted) == sorted(f"u{number}" for number in range(60))
    assert stores[0].stale(HEAD) == 0
    for store in stores:
        store.close()


# Deletion


def test_deletion_leaves_no_trace_in_any_table(store, url):
    secret = "Zebras-at-quarter-past-nine"
    vector_J = np.linspace(0.1234, 0.9876, 16, dtype=np.float32)
    for number in range(300):  # enough for the tables to have inner pages
        store.put_history("acme", f"u{number}", [PastText(f"question {number}", "An answer. " * 20)])
    store.put_history("acme", "ann-the-secret-one", [PastText(secret, secret, secret)] * 30)
    person = store.add_feedback("acme", "ann-the-secret-one", secret, secret, secret)
    store.claim_stale("head-2", "one", seconds=60, limit=1000)
    assert store.save_fitted("acme", "ann-the-secret-one", Fitted(HEAD, person.version, 1, vector_J, 31))
    for number in range(100):
        store.put_history("acme", f"u{number}", [PastText("changed", "Another answer. " * 30)])
    traces = [b"ann-the-secret-one", secret.encode(), vector_J.tobytes(), vector_J.tobytes()[:16]]
    assert all(any(trace in value for value in everything(store)) for trace in traces)

    assert store.delete("acme", "ann-the-secret-one")
    assert not store.delete("acme", "ann-the-secret-one")
    left = everything(store)
    assert len(left) > 1000
    assert not [value for value in left for trace in traces if trace in value]
    with store.read() as connection:
        known = set(connection.scalars(select(schema.people.c.id)))
        for table in (schema.texts, schema.vectors, schema.leases, schema.feedback):
            assert set(connection.scalars(select(table.c.person_id))) <= known

    if url.startswith("sqlite"):
        folder = Path(url.removeprefix("sqlite:///")).parent
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert b"u299" in files["palate.db"]
        assert not [(name, trace) for name, content in files.items() for trace in traces if trace in content]


def test_compacting_leaves_no_trace_of_rows_that_were_moved(store, url):
    """SQLite leaves copies of rows where it moves them from page to page; 200 people make it do so."""
    chance = random.Random(1)
    people = [f"user-{chance.getrandbits(60):x}" for _ in range(200)]
    for name in people:
        texts = [
            PastText(name * chance.randint(1, 60), "w " * chance.randint(1, 100)) for _ in range(chance.choice([1, 9]))
        ]
        store.put_history("acme", name, texts)
    chance.shuffle(people)
    for name in people[100:]:
        store.put_history("acme", name, [PastText("changed", "w " * chance.randint(1, 2000))])
    gone, stay = people[:50], people[50:]
    for name in gone:
        assert store.delete("acme", name)
    store.compact()
    assert store.people("acme", limit=1000) == sorted(stay)
    assert store.person("acme", stay[0]).texts[0].input.startswith(stay[0])
    if url.startswith("sqlite"):
        content = Path(url.removeprefix("sqlite:///")).read_bytes()
        assert all(name.encode() in content for name in stay)
        assert not [name for name in gone if name.encode() in content]


def everything(store) -> list[bytes]:
    """Every value in every table that the database has, as bytes."""
    found = MetaData()
    found.reflect(store.engine)
    assert set(schema.metadata.tables) < set(found.tables)
    values = []
    with store.read() as connection:
        for table in found.tables.values():
            for row in connection.execute(select(table)):
                values += [value if isinstance(value, bytes) else str(value).encode() for value in row]
    return values


def test_one_lease_ends_early_and_missing_vectors_are_counted(store):
    store.put_history("acme", "ann", [LETTER])
    before = datetime.now(UTC) + timedelta(seconds=1)
    store.put_history("acme", "bob", [LETTER])
    assert store.missing(HEAD) == 2
    assert len(store.claim_stale(HEAD, "one", seconds=60, limit=2)) == 2
    assert not store.release_one("acme", "ann", HEAD, "two")
    assert store.release_one("acme", "ann", HEAD, "one")
    assert [person.user_id for person in store.claim_stale(HEAD, "two", seconds=60, limit=2)] == ["ann"]
    store.save_fitted("acme", "ann", fit(1))
    store.put_history("acme", "ann", [NOTE])
    assert store.missing(HEAD) == 1  # an outdated vector is one
    assert store.missing(HEAD, known_before=before) == 1
    assert store.missing(HEAD, known_before=datetime(2000, 1, 1, tzinfo=UTC)) == 0


def test_one_lease_of_several_ends(store):
    for tenant, name in itertools.product(("acme", "other"), ("ann", "bob")):
        store.put_history(tenant, name, [LETTER])
    for head in (HEAD, "head-2"):
        assert len(store.claim_stale(head, "one", seconds=60, limit=9)) == 4
    assert not store.release_one("acme", "cat", HEAD, "one")
    assert not store.release_one("nobody", "ann", HEAD, "one")
    assert store.release_one("acme", "ann", HEAD, "one")
    assert not store.release_one("acme", "ann", HEAD, "one")
    claimed = store.claim_stale(HEAD, "two", seconds=60, limit=9)
    assert [(person.tenant, person.user_id) for person in claimed] == [("acme", "ann")]
    assert store.claim_stale("head-2", "two", seconds=60, limit=9) == []
    assert store.release("one") == 7


def test_missing_counts_by_head_and_by_when_people_came(store):
    assert store.missing(HEAD) == 0
    ann, _ = store.put_history("acme", "ann", [LETTER])
    bob, _ = store.put_history("other", "bob", [LETTER])
    store.save_fitted("acme", "ann", fit(1))
    assert (store.missing(HEAD), store.missing("head-2")) == (1, 2)
    store.put_history("other", "bob", [NOTE])  # a later change makes nobody new
    assert store.missing("head-2", known_before=bob.created + timedelta(microseconds=1)) == 2
    assert store.missing("head-2", known_before=bob.created) == 1
    assert store.missing("head-2", known_before=ann.created) == 0
    assert store.drop_head(HEAD) == 1
    assert store.missing(HEAD) == 2


def test_errors_of_the_database_hold_no_text(store):
    with pytest.raises(DBAPIError) as error, store.write() as connection:
        connection.execute(insert(schema.texts).values(person_id=99, position=0, input="my secret diary", output="x"))
    assert "secret diary" not in str(error.value)


# Export and restore


def full_person(store):
    store.put_history("acme", "ann", [LETTER, NOTE])
    store.save_fitted("acme", "ann", fit(1, "head-old", fill=0.25))
    person = store.add_feedback("acme", "ann", "p", "a", "e")
    store.save_fitted("acme", "ann", fit(person.version))
    return store.person("acme", "ann")


def test_an_exported_person_is_json_and_comes_back_in_another_database(store, tmp_path):
    person = full_person(store)
    exported = json.loads(json.dumps(store.export("acme", "ann")))
    with open_store(f"sqlite:///{tmp_path}/other.db") as other:
        restored = other.restore("acme", exported)
        assert restored == other.known("acme", "ann")
        assert (restored.version, other.person("acme", "ann").texts) == (1, person.texts)
        assert [(f.prompt, f.answer, f.edited) for f in other.feedback("acme", "ann")] == [("p", "a", "e")]
        assert other.feedback("acme", "ann")[0].created == store.feedback("acme", "ann")[0].created
        assert other.current("acme", "ann", HEAD) == (1, None)  # vectors may be another head's: they are fitted anew
        assert [person.user_id for person in other.claim_stale(HEAD, "one", seconds=60)] == ["ann"]
        again = other.export("acme", "ann")
        assert (again["texts"], again["feedback"]) == (exported["texts"], exported["feedback"])
    assert store.export("acme", "bob") is None


def test_restoring_replaces_and_takes_a_version_that_was_never_used_here(store):
    person = full_person(store)
    exported = store.export("acme", "ann")
    for number in range(3):
        store.put_history("acme", "ann", [PastText("", str(number))])
    store.claim_stale(HEAD, "one", seconds=60)
    restored = store.restore("acme", exported)
    assert (restored.version, restored.count) == (6, len(person.texts))
    assert store.person("acme", "ann").texts == person.texts
    assert len(store.feedback("acme", "ann")) == 1
    assert store.current("acme", "ann", HEAD) == (6, 2)  # served until the new fit, as after any change
    assert store.missing(HEAD) == 0
    store.delete("acme", "ann")
    assert store.restore("acme", {**exported, "version": 2**53}).version == 7  # nobody's number raises the tenant's
    assert store.put_history("acme", "ann", [])[0].version == 8


VECTOR = {"head": "h", "version": 1, "cluster": 0, "texts": 1, "vector": "AACAPw=="}
NOTED = {"prompt": "p", "answer": "a", "edited": "e", "created": "2024-01-01T00:00:00Z"}


def test_the_largest_and_smallest_values_that_an_import_may_hold(store):
    vectors = [{**VECTOR, "head": f"h{number}"} for number in range(15)]
    longest = base64.b64encode(np.full(8192, -3e38, "<f4").tobytes()).decode()
    exported = {
        "format": 1,
        "user_id": "a" * 128,
        "version": 2**53,
        "created": "1970-01-01T14:00:00+14:00",
        "updated": "2200-12-31T11:59:59.999999-12:00",
        "texts": [{"input": "é" * 100_000, "output": "🎈" * 100_000, "date": "d" * 40}, {"input": "", "output": "x"}],
        "feedback": [{**NOTED, "created": "2200-12-31T23:59:59Z"}, {**NOTED, "prompt": "", "answer": ""}],
        "vectors": [*vectors, {**VECTOR, "vector": longest, "version": 2**53, "cluster": 2**31 - 1}],
    }
    store.restore("acme", ExportedPerson.model_validate(exported))
    person = store.person("acme", "a" * 128)
    assert person.version == 1
    assert [len(one.output) for one in person.texts] == [100_000, 1]
    assert person.created.year < 2200  # when this store first knew them
    assert store.feedback("acme", "a" * 128)[0].created.year == 2200
    assert store.current("acme", "a" * 128, "h") == (1, None)
    again = store.restore("acme", store.export("acme", "a" * 128))
    assert again.version == 2
    assert store.delete("acme", "a" * 128)
    assert store.put_history("acme", "bob", [NOTE])[0].version == 3  # no imported number is in the tenant's floor


def test_an_import_ends_leases_and_a_fit_of_before_it_is_not_saved(store):
    person, _ = store.put_history("acme", "ann", [LETTER])
    exported = store.export("acme", "ann")
    store.claim_stale(HEAD, "one", seconds=60)
    assert store.restore("acme", exported).version == 2
    assert not store.save_fitted("acme", "ann", fit(person.version))
    assert [one.version for one in store.claim_stale(HEAD, "two", seconds=60)] == [2]


def test_the_document_of_an_import_says_its_bounds():
    schema = ExportedPerson.model_json_schema()
    lists = {name: schema["properties"][name] for name in ("texts", "feedback", "vectors", "rankings")}
    assert {name: one["maxItems"] for name, one in lists.items()} == {
        "texts": 10_000,
        "feedback": 10_000,
        "vectors": 16,
        "rankings": 10_000,
    }
    assert "minItems" not in lists["texts"]  # of who only ranked images there is none
    found = {}
    for part in [schema, *schema["$defs"].values()]:
        assert part["additionalProperties"] is False
        for name, one in part["properties"].items():
            one = one["anyOf"][0] if "anyOf" in one else one
            if one.get("type") == "string" and one.get("format") != "date-time":
                assert "pattern" in one
                found[name] = (one.get("minLength", 0), one["maxLength"])
            if one.get("type") == "integer" and name != "format":
                assert {"minimum", "maximum"} <= set(one)
    text, written, id = (0, 100_000), (1, 100_000), (1, 128)
    assert found == {
        "input": text, "output": written, "date": (0, 40), "prompt": text, "answer": text, "edited": written,
        "user_id": id, "head": id, "vector": (8, 43_692), "id": id, "model": id,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"format": True}, "format"),
        ({"texts": [{"input": "a"}]}, r"texts\.0"),
        ({"extra": 1}, "extra"),
        ({"version": "2"}, "version"),
        ({"user_id": "a/b"}, "user_id"),
        ({"created": "2024-01-01T00:00:00"}, "created"),
        ({"texts": [{"input": "a", "output": "\0", "date": None}]}, r"texts\.0\.output"),
        ({"texts": [{"input": "a", "output": "\ud800", "date": None}]}, r"texts\.0\.output"),
        ({"texts": [{"input": "a", "output": ""}]}, r"texts\.0\.output"),
        ({"texts": [{"input": "a" * 100_001, "output": "b"}]}, r"texts\.0\.input"),
        ({"version": 2**70}, "version"),
        ({"created": "0001-01-01T00:00:00+14:00"}, "created"),
        ({"texts": [{"input": "", "output": "b"}] * 10_001}, "texts: List should have at most 10000"),
        ({"texts": [{"input": "", "output": "b", "date": "1" * 41}]}, r"texts\.0\.date"),
        ({"feedback": [NOTED] * 10_001}, "feedback: List should have at most 10000"),
        ({"feedback": [{**NOTED, "edited": ""}]}, r"feedback\.0\.edited"),
        ({"feedback": [{**NOTED, "answer": "a\0"}]}, r"feedback\.0\.answer.*U\+0000 at position 1"),
        ({"feedback": [{**NOTED, "created": "2201-01-01T00:00:00Z"}]}, r"feedback\.0\.created.*2201"),
        ({"feedback": [{**NOTED, "id": 1}]}, r"feedback\.0\.id"),
        ({"version": 0}, "version"),
        ({"version": 2**53 + 1}, "version"),
        ({"version": True}, "version"),
        ({"updated": "9999-12-31T23:59:59-14:00"}, "updated"),
        ({"updated": "2200-12-31T12:00:00-12:00"}, "updated"),
        ({"updated": "1970-01-01T00:00:00+00:01"}, "updated"),
        ({"updated": 1_700_000_000}, "updated"),
        ({"updated": "1700000000"}, "updated"),
        ({"user_id": ".."}, "user_id"),
        ({"vectors": [{**VECTOR, "vector": "AAA="}]}, r"vectors\.0\.vector"),
        ({"vectors": [{**VECTOR, "vector": ""}]}, r"vectors\.0\.vector"),
        ({"vectors": [{**VECTOR, "vector": "AACAP!AA"}]}, r"vectors\.0\.vector.*base64"),
        ({"vectors": [{**VECTOR, "vector": "AADAfw=="}]}, r"vectors\.0\.vector.*not finite"),
        ({"vectors": [{**VECTOR, "vector": "AACAfw=="}]}, r"vectors\.0\.vector.*not finite"),
        ({"vectors": [{**VECTOR, "vector": base64.b64encode(bytes(4 * 8193)).decode()}]}, r"vectors\.0\.vector"),
        ({"vectors": [{**VECTOR, "cluster": 2**31}]}, r"vectors\.0\.cluster"),
        ({"vectors": [{**VECTOR, "version": 0}]}, r"vectors\.0\.version"),
        ({"vectors": [{**VECTOR, "head": "a/b"}]}, r"vectors\.0\.head"),
        ({"vectors": [VECTOR, VECTOR]}, "vectors.*'h' has more than one vector"),
        ({"vectors": [{**VECTOR, "head": f"h{n}"} for n in range(17)]}, "vectors: List should have at most 16"),
    ],
)
def test_what_was_not_exported_is_refused_by_name(store, change, message):
    full_person(store)
    exported = {**store.export("acme", "ann"), **change}
    before = store.export("acme", "ann")
    with pytest.raises(ValueError, match=message):
        store.restore("acme", exported)
    assert store.export("acme", "ann") == before
