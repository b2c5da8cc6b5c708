"""Rankings of images in both databases."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from palate.users import schema
from palate.users.records import Ranking
from palate.users.store import OtherRanking, PastText, Store

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
HEAD = "head-1"


def add(store: Store, user: str, id: str, *images: str, tenant: str = "acme") -> Ranking:
    return store.add_ranking(tenant, Ranking(user, id, "a prompt", images, "model"), lambda: None)


def removed(store: Store) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    store.remove_images(lambda *image: found.append(image))
    return found


def test_rankings_come_back_in_the_order_in_which_they_came(store):
    made = [add(store, "bob", "z", B, A), add(store, "ann", "y", A, B, C), add(store, "bob", "x", A, C)]
    add(store, "ann", "z", A, B, tenant="other")
    assert store.rankings("acme") == made
    assert store.rankings("acme", after=made[0].number, limit=1) == [made[1]]
    assert add(store, "ann", "y", A, B, C) == made[1]
    with pytest.raises(OtherRanking, match="'y' is the id of another"):
        add(store, "ann", "y", A, C, B)
    assert made[0].created < made[2].created
    assert store.export("acme", "bob")["rankings"][0] == {
        "id": "z", "prompt": "a prompt", "model": "model", "created": made[0].created.isoformat(), "images": [B, A],
    }  # fmt: skip


def test_a_ranking_makes_a_person_and_changes_no_history(store):
    add(store, "ann", "1", A, B)
    person = store.person("acme", "ann")
    assert (person.version, person.texts) == (1, ())
    store.put_history("acme", "bob", [PastText("a", "b")])
    add(store, "bob", "2", A, B)
    assert store.person("acme", "bob").version == 1
    exported = store.export("acme", "bob")
    assert store.restore("acme", exported).version == 2
    assert [one.id for one in store.rankings("acme")] == ["1", "2"]


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        (Ranking("a/b", "1", "p", (A, B)), "user id is"),
        (Ranking("ann", "a b", "p", (A, B)), "id is"),
        (Ranking("ann", "1", "p\0", (A, B)), "prompt holds"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(store, ranking, message):
    with pytest.raises(ValueError, match=message):
        store.add_ranking("acme", ranking, lambda: None)
    assert store.rankings("acme") == []
    assert store.people("acme") == []


def test_a_ranking_whose_images_cannot_be_kept_is_not_stored(store):
    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        store.add_ranking("acme", Ranking("ann", "1", "p", (A, B)), fail)
    assert store.rankings("acme") == []
    assert store.person("acme", "ann") is None


def test_deletion_leaves_images_that_others_of_the_tenant_ranked(store):
    add(store, "ann", "1", A, B)
    add(store, "ann", "2", B, A)
    add(store, "bob", "3", B, C)
    add(store, "ann", "1", A, D, tenant="other")
    assert store.delete("acme", "ann")
    assert removed(store) == [("acme", A)]
    assert removed(store) == []
    with store.read() as connection:
        known = set(connection.scalars(select(schema.rankings.c.id)))
        assert set(connection.scalars(select(schema.ranked_images.c.ranking_id))) == known
        assert len(known) == 2
    store.delete("other", "ann")
    store.delete("acme", "bob")
    assert sorted(removed(store)) == [("acme", B), ("acme", C), ("other", A), ("other", D)]


def test_no_ranking_names_an_image_that_was_removed_whatever_happens_at_once(store):
    there, errors, stop = {A, B, C}, [], threading.Event()

    def rank(number: int) -> None:
        for turn in range(15):
            store.announce_images("acme", [A, B])
            there.update((A, B))
            add_kept(number, turn)
            store.delete("acme", f"u{number}")

    def add_kept(number: int, turn: int) -> None:
        ranking = Ranking(f"u{number}", f"{number}-{turn}", "p", (A, B))
        store.add_ranking("acme", ranking, lambda: there.update((A, B)))
        if not {A, B} <= there:
            errors.append((number, turn))

    def sweep() -> None:
        while not stop.is_set():
            store.remove_images(lambda tenant, digest: there.discard(digest))

    with ThreadPoolExecutor(4) as pool:
        sweeping = pool.submit(sweep)
        ranking = [pool.submit(rank, number) for number in range(3)]
        for one in ranking:
            one.result(timeout=120)
        stop.set()
        sweeping.result(timeout=60)
    assert errors == []
    assert store.rankings("acme") == []
    store.remove_images(lambda tenant, digest: there.discard(digest))
    assert there == {C}
