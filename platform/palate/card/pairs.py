"""What a person wrote against what they did not write: the contrast that the user vector is learned from.

Two kinds of negatives answer the same input as the person's own text (CARD, section 2.4, and what its controls showed):
the cluster model's own answer, and texts of other people of the cluster, matched by topic so that only the manner tells
them apart. A text is matched when its input is near and when it repeats about as much of *this* input as the own text
does; without the second condition the own text is given away by its words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from rouge_score import rouge_scorer
from sklearn.feature_extraction.text import TfidfVectorizer

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

_CHUNK = 512  # rows of a similarity matrix held at a time


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


def matched_texts(
    items: Sequence[Item],
    bank: Sequence[Item],
    clusters: Mapping[str, int],
    per_item: int,
    *,
    nearest: int = 20,
) -> dict[str, list[Item]]:
    """For each item (by ``item_id``), up to ``per_item`` items of other people whose texts could answer its input.

    Among the ``nearest`` bank items of the same cluster by tf-idf of their sources, those whose text overlaps with the
    item's source most nearly as the own text does. Where the cluster holds nobody else, everybody's items are searched.
    Texts equal to the own one (normalized) are never taken. Deterministic; ties go to the earlier bank item.

    Args:
        items: whose inputs are answered, with the own text as ``output``.
        bank: what may be taken: history items, never golds.
        clusters: each person's cluster.
    """
    if not items or not bank or per_item == 0:
        return {item.item_id: [] for item in items}
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", norm="l2")
    try:
        bank_vectors = vectorizer.fit_transform([_topic(item) for item in bank])
        item_vectors = vectorizer.transform([_topic(item) for item in items])
    except ValueError:  # no text holds a word, as in some scripts: all are equally near
        bank_vectors = item_vectors = None
    authors = np.array([item.user_id for item in bank])
    homes = np.array([clusters.get(item.user_id, -1) for item in bank])
    texts = [normalized(item.output) for item in bank]
    found: dict[str, list[Item]] = {}
    for start in range(0, len(items), _CHUNK):
        chunk = items[start : start + _CHUNK]
        similarity = (
            np.zeros((len(chunk), len(bank)))
            if bank_vectors is None
            else (item_vectors[start : start + _CHUNK] @ bank_vectors.T).toarray()
        )
        for item, scores in zip(chunk, similarity, strict=True):
            others = authors != item.user_id
            allowed = others & (homes == clusters.get(item.user_id, -1))
            rows = np.flatnonzero(allowed if allowed.any() else others)
            ranked = rows[np.argsort(-scores[rows], kind="stable")]
            found[item.item_id] = _alike(item, bank, texts, ranked, nearest)[:per_item]
    return found


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
    return bool(_ROUGE.score(other, text)["rougeL"].fmeasure >= threshold)


def overlap(text: str, source: str) -> float:
    """Share of a text's words that its source holds."""
    words = normalized(text).split()
    known = set(normalized(source).split())
    return sum(word in known for word in words) / len(words) if words else 0.0


_ROUGE = rouge_scorer.RougeScorer(["rougeL"])


def _alike(item: Item, bank: Sequence[Item], texts: Sequence[str], ranked: np.ndarray, nearest: int) -> list[Item]:
    own = normalized(item.output)
    seen, near = {own}, []
    for row in ranked:
        if texts[row] not in seen:
            seen.add(texts[row])
            near.append(bank[row])
        if len(near) == nearest:
            break
    wanted = overlap(item.output, item.source)
    return sorted(near, key=lambda other: abs(overlap(other.output, item.source) - wanted))


def _topic(item: Item) -> str:
    return item.source or item.output
