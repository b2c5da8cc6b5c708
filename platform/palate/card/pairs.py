"""What a person wrote against what they did not write: the contrast that the user vector is learned from.

Two kinds of negatives answer the same input as the person's own text (CARD, section 2.4, and what its controls showed):
the cluster model's own answer, and texts of other people of the cluster, matched by topic so that only the manner tells
them apart. A text is matched when its input is near and when it repeats about as much of *this* input as the own text
does; without the second condition the own text is given away by its words.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from palate.corpora.schema import Item, normalized

Kind = Literal["own", "cluster", "other"]
OWN: Kind = "own"
CLUSTER: Kind = "cluster"
OTHER: Kind = "other"

TEXTS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),  # whose input is answered
        pa.field("kind", pa.string(), nullable=False),  # own, cluster or other
        pa.field("author_id", pa.string(), nullable=False),  # who wrote it; "" for the cluster model
        pa.field("text", pa.string(), nullable=False),
    ]
)

_CELLS = 10_000_000  # of a similarity matrix held at a time


@dataclass(frozen=True)
class Text:
    """One answer to an item's input. The order of texts is that of the positions extracted from them."""

    user_id: str
    item_id: str
    kind: Kind
    author_id: str
    text: str


def held_out(order: int, share: float) -> bool:
    """Whether the item at this place in a history is kept from the adapter, for the contrast: every 1/share-th is.

    Spread over the whole history, so that both parts are equally old.
    """
    return int((order + 1) * share + 1e-9) > int(order * share + 1e-9)


class Bank:
    """Texts that people wrote, to be searched for what others of their cluster could have answered to an input.

    Of a cluster with more than ``most`` texts, so many drawn ones are searched (the draw depends on their ids alone):
    time and memory grow with the number of inputs, not with its square.

    Args:
        items: what may be taken: history items, never golds.
        clusters: each person's cluster.
    """

    def __init__(self, items: Sequence[Item], clusters: Mapping[str, int], most: int = 20_000) -> None:
        self._clusters = clusters
        homes: dict[int, list[int]] = {}
        for row, item in enumerate(items):
            homes.setdefault(clusters.get(item.user_id, -1), []).append(row)
        kept = sorted(row for rows in homes.values() for row in _drawn(items, rows, most))
        self._items = [items[row] for row in kept]
        self._texts = [normalized(item.output) for item in self._items]
        self._authors = np.array([item.user_id for item in self._items])
        self._homes = np.array([clusters.get(item.user_id, -1) for item in self._items])
        self._people: dict[int, set[str]] = {}
        for author, home in zip(self._authors.tolist(), self._homes.tolist(), strict=True):
            self._people.setdefault(home, set()).add(author)
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", norm="l2")
        try:
            self._vectors = self._vectorizer.fit_transform([_topic(item) for item in self._items])
        except ValueError:  # no text holds a word, as in some scripts: all are equally near
            self._vectors = None

    def matched(self, items: Sequence[Item], per_item: int, *, nearest: int = 20) -> dict[str, list[Item]]:
        """For each item (by ``item_id``), up to ``per_item`` texts of other people that could answer its input.

        Among the ``nearest`` texts of the same cluster by tf-idf of their sources, those whose text overlaps with the
        item's source most nearly as the own text does. Where the cluster holds nobody else, everybody's are searched.
        Texts equal to the own one (normalized) are never taken. Deterministic; ties go to the earlier text.
        """
        found: dict[str, list[Item]] = {item.item_id: [] for item in items}
        if not self._items or per_item == 0:
            return found
        groups: dict[int | None, list[Item]] = {}
        for item in items:
            home = self._clusters.get(item.user_id, -1)
            groups.setdefault(home if self._people.get(home, set()) - {item.user_id} else None, []).append(item)
        for among, members in groups.items():
            rows = np.arange(len(self._items)) if among is None else np.flatnonzero(self._homes == among)
            step = max(1, _CELLS // len(rows))
            for start in range(0, len(members), step):
                chunk = members[start : start + step]
                for item, scores in zip(chunk, self._similarity(chunk, rows), strict=True):
                    others = np.flatnonzero(self._authors[rows] != item.user_id)
                    ranked = rows[others[np.argsort(-scores[others], kind="stable")]]
                    found[item.item_id] = self._alike(item, ranked, nearest)[:per_item]
        return found

    def _similarity(self, items: Sequence[Item], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        if self._vectors is None:
            return np.zeros((len(items), len(rows)))
        vectors = self._vectorizer.transform([_topic(item) for item in items])
        return np.asarray((vectors @ self._vectors[rows].T).toarray())

    def _alike(self, item: Item, ranked: NDArray[np.int64], nearest: int) -> list[Item]:
        seen, near = {normalized(item.output)}, []
        for row in ranked:
            if self._texts[row] not in seen:
                seen.add(self._texts[row])
                near.append(self._items[row])
            if len(near) == nearest:
                break
        wanted = overlap(item.output, item.source)
        return sorted(near, key=lambda other: abs(overlap(other.output, item.source) - wanted))


def drop_near_copies(own: str, texts: Sequence[str], threshold: float = 0.8) -> tuple[list[str], int]:
    """The texts that differ from ``own`` and from one another, and how many were dropped.

    Dropped are empty ones, and those whose ROUGE-L F-measure with a kept text or ``own`` reaches ``threshold``.
    """
    kept: list[str] = []
    for text in texts:
        others = [own, *kept]
        if text.strip() and not any(near_copy(text, other, threshold) for other in others):
            kept.append(text)
    return kept, len(texts) - len(kept)


def near_copy(text: str, other: str, threshold: float = 0.8) -> bool:
    """Whether two texts are the same but for little: equal when normalized, or by ROUGE-L F-measure."""
    if normalized(text) == normalized(other):
        return True
    shorter, longer = sorted((len(_WORDS.tokenize(text)), len(_WORDS.tokenize(other))))
    if 2 * shorter < threshold * (shorter + longer):  # even if all the shorter one's words were in the longer one
        return False
    return bool(_rouge().score(other, text)["rougeL"].fmeasure >= threshold)


def overlap(text: str, source: str) -> float:
    """Share of a text's words that its source holds."""
    words = normalized(text).split()
    known = set(normalized(source).split())
    return sum(word in known for word in words) / len(words) if words else 0.0


class _Words:
    """Words of any script; rouge-score's own tokenizer sees a-z and digits only."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


_WORDS = _Words()


@cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_WORDS)


def _drawn(items: Sequence[Item], rows: list[int], most: int) -> list[int]:
    if len(rows) <= most:
        return rows
    lots = {row: hashlib.sha256(f"{items[row].user_id}/{items[row].item_id}".encode()).digest() for row in rows}
    return sorted(rows, key=lots.__getitem__)[:most]


def _topic(item: Item) -> str:
    return item.source or item.output
