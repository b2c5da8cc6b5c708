"""The record types of prepared corpora and their Arrow schemas, in one place.

A text corpus is an artifact of kind ``text-corpus``:

    items/*.parquet        what people wrote before: the history that training and retrieval may use
    questions/*.parquet    what is asked of the system, with the gold output where it is known
    task.json              ``Task``: what kind of text it is and how it is scored
    quarantine.jsonl       records that could not be used, each with its reason
    report.json            counts: users, items, questions, every kind of record dropped, and why

Ranked lists of images are an artifact of kind ``ranked-lists``:

    lists/*.parquet        ``LISTS``: a list of images for a caption, best first
    images/*.parquet       ``IMAGES``: the images themselves, each once, where the source has them
    quarantine.jsonl       records that could not be used, each with its reason
    report.json            annotations kept, tied and dropped, and why; lengths of lists; cycles
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from palate.artifacts import Artifact

TEXT_CORPUS = "text-corpus"
RANKED_LISTS = "ranked-lists"

ITEMS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("order", pa.int64(), nullable=False),  # position in the person's history, oldest first
        pa.field("source", pa.string(), nullable=False),  # what the person wrote about; "" where only the text is known
        pa.field("input", pa.string(), nullable=False),  # the task's instruction with the source in it
        pa.field("output", pa.string(), nullable=False),  # what the person wrote
        pa.field("date", pa.string()),
    ]
)

QUESTIONS = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("output", pa.string()),  # null where the gold is withheld
        pa.field("date", pa.string()),
        pa.field("profile", pa.list_(pa.string()), nullable=False),  # item_ids that this question may look at
    ]
)

RANKED_LISTS = "ranked-lists"

LISTS = pa.schema(
    [
        pa.field("list_id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("user_id", pa.string()),  # null: many people's votes
        pa.field("split", pa.string(), nullable=False),  # train, validation or test
        pa.field(
            "items",  # best first
            pa.list_(
                pa.struct(
                    [
                        pa.field("image_uid", pa.string(), nullable=False),
                        pa.field("model", pa.string()),  # what made the image
                        pa.field("score", pa.float64()),
                        pa.field("tie_group", pa.int32(), nullable=False),  # lower is better; equal: not ordered
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field(
            "edges",  # the votes behind the order; winner and loser are positions in items
            pa.list_(
                pa.struct(
                    [
                        pa.field("winner", pa.int32(), nullable=False),
                        pa.field("loser", pa.int32(), nullable=False),
                        pa.field("votes", pa.float32(), nullable=False),
                        pa.field("source_ids", pa.list_(pa.string()), nullable=False),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("kind", pa.string(), nullable=False),  # full, topk, or dominance: the edges are all that is known
        pa.field("top_k", pa.int32()),  # of topk: how many first choices are known
        pa.field("source_image", pa.string()),  # of edits: the uid of the image that is edited
        pa.field("instruction", pa.string()),  # of edits
        pa.field("weight", pa.float32(), nullable=False),
    ]
)

IMAGES = pa.schema(
    [
        pa.field("image_uid", pa.string(), nullable=False),
        pa.field("bytes", pa.binary()),  # an encoded PNG or JPEG; null: at path
        pa.field("path", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)

LISTS = pa.schema(
    [
        pa.field("list_id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("user_id", pa.string()),  # null where people are pooled
        pa.field("split", pa.string(), nullable=False),  # train, validation, test, or examples (of people's taste)
        pa.field(  # best first
            "items",
            pa.list_(
                pa.struct(
                    [
                        pa.field("image_uid", pa.string(), nullable=False),
                        pa.field("model", pa.string()),
                        pa.field("score", pa.float64()),
                        pa.field("tie_group", pa.int32(), nullable=False),  # ascending; equal: no order is known
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field(
            "edges",
            pa.list_(
                pa.struct(
                    [
                        pa.field("winner", pa.int32(), nullable=False),  # position in the items
                        pa.field("loser", pa.int32(), nullable=False),
                        pa.field("votes", pa.float32(), nullable=False),  # net
                        pa.field("source_ids", pa.list_(pa.string()), nullable=False),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("kind", pa.string(), nullable=False),  # full, topk, or dominance: the edges are all that is known
        pa.field("top_k", pa.int32()),  # of kind topk: how many first places are known
        pa.field("source_image", pa.string()),  # uid of the image that was edited
        pa.field("instruction", pa.string()),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)

IMAGES = pa.schema(
    [
        pa.field("image_uid", pa.string(), nullable=False),
        pa.field("bytes", pa.binary()),  # encoded as it was found; null where ``path`` says where it is
        pa.field("path", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Item:
    """One past text of a person, with what it answers."""

    user_id: str
    item_id: str
    order: int
    source: str
    input: str
    output: str
    date: str | None = None


@dataclass(frozen=True)
class Question:
    """One request, with the person's own answer as gold where it is known."""

    question_id: str
    user_id: str
    source: str
    input: str
    output: str | None
    date: str | None
    profile: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What a corpus asks for. ``labels`` is empty unless the answer is one of them (LaMP-1 and LaMP-2)."""

    name: str
    metric: Literal["classification", "rating", "text"]
    labels: tuple[str, ...] = ()
    title_template: str = "{output}"  # how a history item is phrased in a retrieval prompt: {source}, {output}


def read_items(corpus: Artifact) -> list[Item]:
    """Every history item, sorted by user and time."""
    rows = _read(corpus, "items/", ITEMS)
    return sorted((Item(**row) for row in rows), key=lambda item: (item.user_id, item.order))


def read_questions(corpus: Artifact) -> list[Question]:
    """Every question, sorted by id."""
    rows = _read(corpus, "questions/", QUESTIONS)
    questions = (Question(**{**row, "profile": tuple(row["profile"])}) for row in rows)
    return sorted(questions, key=lambda question: question.question_id)


def read_task(corpus: Artifact) -> Task:
    values = corpus.read_json("task.json")
    return Task(**{**values, "labels": tuple(values["labels"])})


def normalized(text: str) -> str:
    """Text as compared for equality: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def user_split(user_id: str, test_share: float = 0.5) -> Literal["development", "test"]:
    """Which users choose options and which are reported on: fixed by a hash of the id, so it never moves."""
    position = int.from_bytes(hashlib.sha256(f"palate user split {user_id}".encode()).digest()[:8], "big") / 2**64
    return "test" if position < test_share else "development"


def _read(corpus: Artifact, prefix: str, schema: pa.Schema) -> list[dict[str, Any]]:
    tables = [pq.read_table(corpus.local(path), schema=schema) for path in corpus.paths(prefix, ".parquet")]
    return pa.concat_tables(tables).to_pylist() if tables else []
