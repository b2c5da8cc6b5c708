"""Plain JSON Lines of anybody's own data: one text a line, ``{"user_id", "input", "output", "date"?}``.

``input`` is what the person wrote about, ``output`` what the person wrote. People's latest texts become the questions.
Where every text of a person has a ``date`` (ISO 8601, one time zone) it decides the order, else the lines do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from palate.config import scale
from palate.corpora.entries import ROW_BITS, Chunk, chunked, entry, text_of, unusable
from palate.corpora.people import Rules
from palate.corpora.preparation import PrepareConfig, Recipe
from palate.corpora.schema import Task
from palate.corpora.streams import CorpusError, absolute, json_lines, sha256_of


@dataclass(frozen=True, kw_only=True)
class JsonlConfig(PrepareConfig):
    """JSON Lines of {"user_id", "input", "output", "date"?}."""

    input: tuple[str, ...] = scale()  # files, read in the order given
    instruction: str = "{source}"  # what the model is asked; {source} stands for the line's input
    questions_per_user: int = 4  # a person's latest texts, asked as questions instead of kept as history
    min_texts: int = 1  # people with fewer texts are dropped and counted


def recipe(config: JsonlConfig) -> Recipe:
    """What to read for ``config``."""
    if not config.input:
        raise CorpusError("--input: no file is given")
    if "{source}" not in config.instruction:
        raise CorpusError(f"--instruction {config.instruction!r} must hold {{source}}, where the line's input goes")
    task = Task("jsonl", "text", title_template='"{output}" was written for "{source}"')
    return Recipe(
        rules=Rules(task, config.instruction, hold_out=config.questions_per_user, min_texts=config.min_texts),
        units=list(enumerate(map(absolute, config.input))),
        names=list(config.input),
        read=read,
        inputs={f"input {index}": sha256_of(path) for index, path in enumerate(config.input)},
    )


def read(unit: tuple[int, str]) -> Iterator[Chunk]:
    """The entries of one file, in chunks."""
    index, path = unit
    positioned = enumerate(json_lines(path), start=index << ROW_BITS)
    return chunked(record_entry(record, row) for row, record in positioned)


def record_entry(record: Any, row: int) -> dict[str, Any]:
    """The entry of one line; ``record`` is its value, or the error that reading it gave."""
    if isinstance(record, ValueError):
        return unusable(row, 0, None, "the line is no JSON", str(record))
    if not isinstance(record, dict):
        return unusable(row, 0, None, "the line is no object", record)
    fields = {name: text_of(record.get(name)) for name in ("user_id", "input", "output")}
    if missing := [name for name, text in fields.items() if not text]:
        return unusable(row, 0, record.get("user_id"), f"the line has no {missing[0]}", record)
    return entry(
        row,
        0,
        f"{row:x}",
        fields["input"],
        user_id=fields["user_id"],
        output=fields["output"],
        date=text_of(record.get("date")) or None,
    )
