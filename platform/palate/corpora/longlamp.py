"""LongLaMP's six public configurations: abstracts, product reviews and topic posts; JSON, JSON Lines or Parquet.

Rows name their user in a field that differs by task, carry no id (an answer is matched by file name and row number),
and hold whole texts: an item with the gold's text is the question's own, whatever its source. A history item becomes a
pair by the task's instruction, as far as the item knows it (abstracts' items lack the key points that questions list).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow.parquet as pq

from palate.artifacts import locate
from palate.config import scale
from palate.corpora.entries import QUESTION, ROW_BITS, Chunk, chunked, entry, link_of, text_of, unusable
from palate.corpora.people import Rules
from palate.corpora.preparation import PrepareConfig, Recipe
from palate.corpora.schema import Task
from palate.corpora.streams import CorpusError, absolute, first_byte, json_lines, json_records, sha256_of

_PARQUET_ROWS = 8  # read at once; a single row may hold hundreds of megabytes

_REVIEW = 'overall rating of "{0}" for a product with description "{1}". The summary of the review text is "{2}"'


@dataclass(frozen=True)
class LongTask:
    """One of the three tasks. ``pair`` gives an item's (source, output), ``source`` finds a question's source."""

    name: str
    user: str
    fields: tuple[tuple[str, ...], ...]  # which profile fields make an item, in the published spellings
    item_template: str
    title_template: str
    source: Callable[[str], str]
    pair: Callable[[dict[str, Any]], tuple[str, str]]


def _found(pattern: re.Pattern[str], text: str, form: str = "{0}") -> str:
    """The groups of ``pattern`` in ``form``; the whole text where the instruction is phrased otherwise."""
    match = pattern.search(text)
    return form.format(*(group.strip() for group in match.groups())) if match else text


_TITLE_IN = re.compile(r'abstract for the title:?\s*"?(.*?)"?\s*(?:using the following items|$)', re.I | re.S)
_REVIEW_IN = re.compile(
    r'overall rating of "?(.*?)"? for a product with description "?(.*?)"?\. '
    r'The summary of the review text is "?(.*?)"?\.?\s*$',
    re.I | re.S,
)
_TOPIC_IN = re.compile(r'content for a reddit post:?\s*"?(.*?)"?\.?\s*$', re.I | re.S)


def _rating(value: Any) -> str:
    """As LongLaMP's instructions write it: 5.0."""
    return f"{float(value):.1f}" if isinstance(value, (int, float)) else text_of(value)


def _abstract_pair(item: dict[str, Any]) -> tuple[str, str]:
    return text_of(item.get("title")), text_of(item.get("abstract"))


def _review_pair(item: dict[str, Any]) -> tuple[str, str]:
    overall, description, summary = _rating(item.get("overall")), text_of(item.get("description")), item.get("summary")
    return _REVIEW.format(overall, description, text_of(summary)), text_of(item.get("reviewText"))


def _topic_pair(item: dict[str, Any]) -> tuple[str, str]:
    if "content" in item:
        return text_of(item.get("summary")), text_of(item["content"])
    return _found(_TOPIC_IN, text_of(item.get("input"))), text_of(item.get("output"))


TASKS = {
    "abstract_generation": LongTask(
        "LongLaMP_abstract",
        "name",
        (("title", "abstract"),),
        'Generate an abstract for the title "{source}"',
        '"{output}" is the abstract for the title "{source}"',
        partial(_found, _TITLE_IN),
        _abstract_pair,
    ),
    "product_review": LongTask(
        "LongLaMP_review",
        "reviewerId",
        (("overall", "summary", "description", "reviewText"),),
        "Generate the review text written by a reviewer who has a given an {source}.",
        '"{output}" is the review with an {source}',
        partial(_found, _REVIEW_IN, form=_REVIEW),
        _review_pair,
    ),
    "topic_writing": LongTask(
        "LongLaMP_topic",
        "author",
        (("summary", "content"), ("input", "output")),
        'Generate the content for a reddit post "{source}".',
        '"{output}" is the post with the summary "{source}"',
        partial(_found, _TOPIC_IN),
        _topic_pair,
    ),
}
ConfigName = Literal[
    "abstract_generation_user",
    "abstract_generation_temporal",
    "product_review_user",
    "product_review_temporal",
    "topic_writing_user",
    "topic_writing_temporal",
]


@dataclass(frozen=True, kw_only=True)
class LongLampConfig(PrepareConfig):
    """LongLaMP's files, one or more splits of one configuration."""

    config: ConfigName  # which of LongLaMP's configurations the files are of
    input: tuple[str, ...] = scale()  # .json (a list), .jsonl or .parquet files, named by their split
    max_characters: int = 1_000_000  # longer texts are quarantined


def recipe(config: LongLampConfig) -> Recipe:
    """What to read for ``config``.

    Raises:
        CorpusError: no file, or two files of one name, which question ids are made from.
    """
    task = TASKS[config.config.rpartition("_")[0]]
    stems = [PurePosixPath(path).stem for path in config.input]
    if not stems or len(set(stems)) < len(stems):
        raise CorpusError(f"--input {' '.join(config.input)}: give files with different names, such as train and val")
    rules = Rules(Task(task.name, "text", title_template=task.title_template), task.item_template, own_output=True)
    return Recipe(
        rules=rules,
        units=list(enumerate(map(absolute, config.input))),
        names=list(config.input),
        read=partial(read, task=task, max_characters=config.max_characters),
        inputs={f"input {index}": sha256_of(path) for index, path in enumerate(config.input)},
    )


def read(unit: tuple[int, str], *, task: LongTask, max_characters: int) -> Iterator[Chunk]:
    """The entries of one file, in chunks."""
    index, path = unit
    stem = PurePosixPath(path).stem

    def entries() -> Iterator[dict[str, Any]]:
        for number, record in enumerate(records(path)):
            yield from record_entries(record, (index << ROW_BITS) + number, f"{stem}-{number}", task, max_characters)

    return chunked(entries())


def records(path: str) -> Iterator[Any]:
    """The rows of a JSON list, JSON Lines (errors in place of broken lines) or Parquet file, told apart by content."""
    if path.endswith(".parquet"):
        filesystem, inside = locate(path)
        with filesystem.open(inside, "rb") as stream, pq.ParquetFile(stream) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                yield from batch.to_pylist()
    elif first_byte(path) == b"{":
        yield from json_lines(path)
    else:
        yield from json_records(path)


def record_entries(record: Any, row: int, identity: str, task: LongTask, max_characters: int) -> list[dict[str, Any]]:
    """The entries of one row: its question and its profile's items."""
    if not isinstance(record, dict):
        return [unusable(row, QUESTION, identity, "the row is no JSON object", str(record))]
    if not (user := text_of(record.get(task.user))):
        return [unusable(row, QUESTION, identity, f"the row has no {task.user}", sorted(record))]
    text, output = text_of(record.get("input")), text_of(record.get("output"))
    if not text:
        return [unusable(row, QUESTION, identity, "the row has no input", record)]
    profile = _profile(record.get("profile"))
    if profile is None:
        return [unusable(row, QUESTION, identity, "the row has no profile list", record)]
    if max(len(text), len(output)) > max_characters:
        return [unusable(row, QUESTION, identity, "the text is longer than --max-characters", text)]
    question = entry(row, QUESTION, identity, task.source(text), user_id=user, input=text, output=output or None)
    items = (_item(item, row, place, user, task, max_characters) for place, item in enumerate(profile))
    return [question, *items]


def _profile(value: Any) -> list[Any] | None:
    """The items; a mapping of columns, as some Parquet conversions leave it, is turned into rows."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=False)]
    return value if isinstance(value, list) else None


def _item(item: Any, row: int, place: int, user: str, task: LongTask, max_characters: int) -> dict[str, Any]:
    if not isinstance(item, dict):
        return unusable(row, place, None, "the profile item is no object", item)
    if not any(all(name in item for name in names) for names in task.fields):
        expected = " or ".join("+".join(names) for names in task.fields)
        return unusable(row, place, item.get("id"), f"the profile item lacks {expected}", sorted(item))
    source, output = task.pair(item)
    if not source or not output:
        return unusable(row, place, item.get("id"), "the profile item is empty", item)
    if max(len(source), len(output)) > max_characters:
        return unusable(row, place, item.get("id"), "the text is longer than --max-characters", output)
    identity = text_of(item.get("id")) or f"{link_of('item', source, output) & (2**64 - 1):016x}"
    date = text_of(item.get("date")) or text_of(item.get("year")) or None
    return entry(row, place, identity, source, user_id=user, output=output, date=date)
