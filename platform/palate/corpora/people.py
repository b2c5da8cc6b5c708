"""From one person's entries to history and questions: whose text is whose, in what order, and no gold in any history.

Pure functions on tables of ``ENTRIES`` that hold whole people.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from palate.corpora.entries import QUESTION, link_of
from palate.corpora.schema import ITEMS, QUESTIONS, Task, normalized


@dataclass(frozen=True)
class Rules:
    """What happens to the entries of one person.

    ``chronological``: the order is by date where all texts of the person have one, else by appearance.
    ``max_texts``: the latest texts that are looked at; 0: all.
    ``hold_out``: the latest texts that become questions, where the data has no questions of its own.
    ``own_output``: an equal output alone makes an item the question's own text (tweets, long texts), not only an
    equal source.
    """

    task: Task
    item_template: str = "{source}"
    chronological: bool = True
    max_texts: int = 0
    hold_out: int = 0
    min_texts: int = 0
    own_output: bool = False


@dataclass(frozen=True)
class Finished:
    """What one bucket of users gives: tables of ``ITEMS`` and ``QUESTIONS``, and counts by name."""

    items: pa.Table
    questions: pa.Table
    counts: Counter[str]


@dataclass(frozen=True)
class _Person:
    """One person's distinct texts in order, questions, and the texts (by Python id) that each question may look at."""

    user_id: str
    texts: list[dict[str, Any]]
    asked: list[dict[str, Any]]
    profiles: dict[int, set[int]]


def recover_users(rows: NDArray[np.int64], links: NDArray[np.int64]) -> dict[int, str]:
    """The user of each row: rows that share an item, directly or through other rows, are one person's.

    Args:
        rows, links: (E,) each pair says that the profile of this row holds this item.

    The id is a hash of the person's smallest link, so it does not depend on the order of anything.
    """
    if not len(rows):
        return {}
    row_values, row_index = np.unique(rows, return_inverse=True)
    link_values, link_index = np.unique(links, return_inverse=True)
    edges = np.stack([row_index, len(row_values) + link_index], axis=1)
    components = connected(len(row_values) + len(link_values), edges)
    smallest = np.full(components.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, components[len(row_values) :], link_values)
    return {
        int(row): hashlib.sha256(f"palate recovered user {smallest[component]}".encode()).hexdigest()[:16]
        for row, component in zip(row_values, components, strict=False)
    }


def connected(size: int, edges: Any) -> NDArray[np.int32]:
    """(size,) the component of each of ``size`` nodes; ``edges`` are pairs of nodes, (E, 2)."""
    pairs = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    return connected_components(graph, directed=False)[1]


def gold_pairs(entries: pa.Table, rules: Rules) -> set[int]:
    """A hash of (source, gold), normalized, for every question that has a gold."""
    asked = itertools.chain.from_iterable(person.asked for person in _people(entries, rules, Counter()))
    return {_pair(one) for one in asked if one["output"]}


def finish(entries: pa.Table, rules: Rules, golds: Collection[int] = frozenset()) -> Finished:
    """The items and questions of whole people: deduplicated, ordered in time, without the questions' own texts.

    Args:
        golds: ``gold_pairs`` of all people; an item of another person that is such a pair (a paper of two authors)
            would teach the gold, so it goes too. Where the answer is a label it stays: dropping just the items that
            agree would itself tell the answer.
    """
    items: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for person in _people(entries, rules, counts):
        texts = _without_golds(person, rules, golds, counts)
        names = _item_ids(person.user_id, texts, counts)
        for order, one in enumerate(texts):
            items.append(
                {
                    "user_id": person.user_id,
                    "item_id": names[id(one)],
                    "order": order,
                    "source": one["source"],
                    "input": _input(one, rules),
                    "output": one["output"],
                    "date": one["date"],
                }
            )
        for one in person.asked:
            profile = person.profiles.get(one["row"], set())
            counts["questions_without_gold"] += one["output"] is None
            questions.append(
                {
                    "question_id": one["id"],
                    "user_id": person.user_id,
                    "source": one["source"],
                    "input": _input(one, rules),
                    "output": one["output"],
                    "date": one["date"],
                    "profile": [names[id(text)] for text in texts if id(text) in profile],
                }
            )
        counts["users"] += 1
        counts["items"] += len(texts)
        counts["questions"] += len(person.asked)
        counts["users_without_items"] += not texts
    return Finished(
        pa.Table.from_pylist(items, schema=ITEMS), pa.Table.from_pylist(questions, schema=QUESTIONS), counts
    )


def date_key(date: str) -> tuple[int, ...]:
    """The numbers of a date or time, to sort by: LaMP's official rule, and right for ISO 8601 in one time zone."""
    return tuple(int(number) for number in re.findall(r"\d+", date))


def _people(entries: pa.Table, rules: Rules, counts: Counter[str]) -> Iterator[_Person]:
    """The people that are kept, by id."""
    rows = entries.sort_by([("user_id", "ascending"), ("row", "ascending"), ("place", "ascending")]).to_pylist()
    for user_id, group in itertools.groupby(rows, key=lambda one: one["user_id"]):
        own = list(group)
        texts, profiles = _distinct_texts([one for one in own if one["place"] != QUESTION], counts)
        if len(texts) < rules.min_texts:
            counts["users_below_min_texts"] += 1
            counts["texts_of_dropped_users"] += len(texts)
            continue
        if rules.chronological and all(one["date"] and date_key(one["date"]) for one in texts):
            texts.sort(key=lambda one: (date_key(one["date"]), one["row"], one["place"]))
        if rules.max_texts and len(texts) > rules.max_texts:
            counts["texts_over_max_texts"] += len(texts) - rules.max_texts
            texts = texts[-rules.max_texts :]
        asked = [one for one in own if one["place"] == QUESTION]
        if rules.hold_out:
            kept = max(1, len(texts) - rules.hold_out)
            texts, asked = texts[:kept], texts[kept:]
            profiles = {one["row"]: {id(text) for text in texts} for one in asked}
        yield _Person(user_id, texts, asked, profiles)


def _distinct_texts(
    entries: list[dict[str, Any]], counts: Counter[str]
) -> tuple[list[dict[str, Any]], dict[int, set[int]]]:
    """Each text of a person once, in order of appearance, and for each row the texts of its profile (by Python id)."""
    first: dict[tuple[str, str, str], dict[str, Any]] = {}
    profiles: dict[int, set[int]] = {}
    for one in entries:
        text = first.setdefault((one["id"], one["source"], one["output"]), one)
        counts["duplicate_items"] += text is not one
        if text["date"] is None:
            text["date"] = one["date"]
        profiles.setdefault(one["row"], set()).add(id(text))
    return list(first.values()), profiles


def _without_golds(person: _Person, rules: Rules, golds: Collection[int], counts: Counter[str]) -> list[dict[str, Any]]:
    """The texts that are no question's gold. An equal label on another text stays and is counted."""
    ids = {one["id"] for one in person.asked}
    sources = {normalized(one["source"]) for one in person.asked} - {""}
    outputs = {normalized(one["output"]) for one in person.asked if one["output"]} - {""}
    kept = []
    for one in person.texts:
        equal_output = normalized(one["output"]) in outputs
        if one["id"] in ids:
            counts["leaked_items_same_id"] += 1
        elif normalized(one["source"]) in sources:
            counts["leaked_items_same_source"] += 1
        elif rules.own_output and equal_output:
            counts["leaked_items_same_output"] += 1
        elif golds and rules.task.metric == "text" and _pair(one) in golds:
            counts["leaked_items_of_another_person"] += 1
        else:
            counts["items_with_an_equal_label"] += equal_output
            kept.append(one)
    return kept


def _pair(one: Mapping[str, Any]) -> int:
    return link_of("pair", normalized(one["source"]), normalized(one["output"]))


def _item_ids(user_id: str, texts: list[dict[str, Any]], counts: Counter[str]) -> dict[int, str]:
    """Ids that are unique in the corpus, by Python id of the text. An id used for two texts gets a suffix."""
    used: Counter[str] = Counter()
    names = {}
    for one in sorted(texts, key=lambda text: (text["row"], text["place"])):
        used[one["id"]] += 1
        again = used[one["id"]]
        counts["item_ids_used_again"] += again > 1
        names[id(one)] = f"{user_id}/{one['id']}" if again == 1 else f"{user_id}/{one['id']}~{again}"
    return names


def _input(one: Mapping[str, Any], rules: Rules) -> str:
    return one["input"] if one["input"] is not None else rules.item_template.replace("{source}", one["source"])
