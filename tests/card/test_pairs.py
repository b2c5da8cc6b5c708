"""Negatives: whose they are, how they are matched, and what is dropped."""

import pytest

from palate.card import pairs
from palate.corpora.schema import Item


def item(user: str, number: int, source: str, output: str) -> Item:
    return Item(user, f"{user}{number}", number, source, source, output)


BANK = [
    item("a", 0, "red kettle that boils water", "a kettle"),
    item("b", 0, "red kettle that boils water fast", "boils water fast!"),
    item("b", 1, "red kettle that boils water slowly", "so bad"),
    item("c", 0, "green garden chair", "kettle water garden"),
    item("d", 0, "red kettle that boils water", "other cluster"),
]
CLUSTERS = {"a": 0, "b": 0, "c": 0, "d": 1}


def test_matched_texts_are_other_peoples_of_the_cluster_nearest_first_then_by_overlap():
    own = item("a", 1, "red kettle that boils water", "boils the water")  # two of three words from the source
    found = pairs.Bank(BANK, CLUSTERS).matched([own], 3, nearest=2)["a1"]
    assert [other.item_id for other in found] == [
        "b0",
        "b1",
    ]  # overlaps 2/3 and 0; c0 is not near, a0 own, d0 elsewhere
    assert [o.item_id for o in pairs.Bank(BANK, CLUSTERS).matched([own], 1, nearest=3)["a1"]] == ["b0"]


def test_a_lone_person_is_contrasted_with_everybody():
    own = item("d", 1, "red kettle that boils water", "hm")
    assert {other.user_id for other in pairs.Bank(BANK, CLUSTERS).matched([own], 4)["d1"]} == {"a", "b", "c"}


def test_a_text_equal_to_the_own_one_is_never_a_negative():
    own = item("a", 1, "red kettle that boils water fast", "Boils  water FAST!")
    assert "b0" not in [o.item_id for o in pairs.Bank(BANK, CLUSTERS).matched([own], 5)["a1"]]


def test_nobody_else_or_no_words_leave_a_defined_answer():
    assert pairs.Bank(BANK[:1], CLUSTERS).matched([item("a", 1, "x", "y")], 2) == {"a1": []}
    found = pairs.Bank([item("b", 0, "——", "？")], CLUSTERS).matched([item("a", 1, "…", "！")], 2)
    assert [other.item_id for other in found["a1"]] == ["b0"]


def test_near_copies_are_dropped_and_counted():
    own = "http: fix the crash at close"
    kept, dropped = pairs.drop_near_copies(
        own, ["HTTP: fix the crash at close", "docs: new page", " ", "docs: new page"]
    )
    assert (kept, dropped) == (["docs: new page"], 3)


def test_near_copies_are_found_in_any_script_and_in_long_texts_at_once():
    own = "исправлена ошибка при закрытии соединения"
    assert pairs.near_copy("Исправлена ошибка при закрытии", own)
    assert not pairs.near_copy("новая страница о загрузке файлов", own)
    long = " ".join(f"word{number}" for number in range(300_000))
    assert not pairs.near_copy(long, own)


def test_of_a_large_cluster_a_drawn_part_is_searched_the_same_in_any_order():
    texts = [item("b", number, f"topic {number}", f"about {number}") for number in range(30)]
    own = item("a", 1, "topic 3", "about three")
    found = [pairs.Bank(bank, CLUSTERS, most=5).matched([own], 30)["a1"] for bank in (texts, texts[::-1])]
    assert len(found[0]) == 5
    assert {other.item_id for other in found[0]} == {other.item_id for other in found[1]}


@pytest.mark.parametrize("share", [0.25, 1 / 3, 0.5, 0.75])
def test_the_held_out_share_is_spread_over_the_history(share):
    flags = [pairs.held_out(order, share) for order in range(240)]
    assert sum(flags) == round(240 * share)
    assert all(abs(sum(flags[start : start + 12]) - 12 * share) <= 1 for start in range(0, 228))


def test_all_or_nothing_can_be_held_out():
    assert all(pairs.held_out(order, 1.0) for order in range(10))
    assert not any(pairs.held_out(order, 0.0) for order in range(10))
