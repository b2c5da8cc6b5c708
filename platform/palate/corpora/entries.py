"""What readers hand over: one row for every question and every profile item that a record of raw data holds."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

CHUNK_CHARACTERS = 8_000_000  # of text that a reader gathers before it writes
ROW_BITS = 40  # a position is the unit's index above, the record's index in the unit below
QUESTION = -1  # the place of a question; profile items count from 0
EXCERPT = 200

ENTRIES = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # position of the record in all input
        pa.field("place", pa.int32(), nullable=False),  # QUESTION, or the item's place in the record's profile
        pa.field("user_id", pa.string()),  # null: to be recovered from shared items
        pa.field("link", pa.int64()),  # equal for equal items; what users are recovered from
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.large_string(), nullable=False),
        pa.field("input", pa.large_string()),  # null: the rules' template around the source
        pa.field("output", pa.large_string()),
        pa.field("date", pa.string()),
        pa.field("reason", pa.string()),  # why the record cannot be used; then ``source`` is an excerpt of it
    ]
)


@dataclass(frozen=True)
class Chunk:
    """A part of what a reader found: a table of ``ENTRIES``, and what was left out on purpose since the last chunk."""

    entries: pa.Table
    counts: Counter[str]


def entry(row: int, place: int, identity: str, source: str, **fields: Any) -> dict[str, Any]:
    """One row of ``ENTRIES``; fields that are not given are null."""
    empty = dict.fromkeys(ENTRIES.names)
    return {**empty, "row": row, "place": place, "id": identity, "source": source, **fields}


def unusable(row: int, place: int, identity: Any, reason: str, found: Any) -> dict[str, Any]:
    """The entry of a record that cannot be used: why, and what it looked like."""
    if isinstance(found, dict):
        # Fields are cut before they are joined: a record may be hundreds of megabytes.
        shown = (f"{name}: {value[:60] if isinstance(value, str) else _brief(value)}" for name, value in found.items())
        found = ", ".join(itertools.islice(shown, 10))
    text = found[:EXCERPT] if isinstance(found, str) else _brief(found)
    return entry(row, place, text_of(identity), text_of(text), reason=reason)


def _brief(value: Any) -> str:
    return str(value) if isinstance(value, (int, float, type(None))) else type(value).__name__


def chunked(entries: Iterable[dict[str, Any]], counts: Counter[str] | None = None) -> Iterator[Chunk]:
    """Chunks of about ``CHUNK_CHARACTERS``; ``counts`` may be added to while ``entries`` are drawn."""
    counts = Counter() if counts is None else counts
    gathered: list[dict[str, Any]] = []
    size = 0

    def chunk() -> Chunk:
        table = pa.Table.from_pylist(gathered, schema=ENTRIES)
        found = Counter(counts)
        gathered.clear()
        counts.clear()
        return Chunk(table, found)

    for one in entries:
        gathered.append(one)
        size += 100 + len(one["source"]) + len(one["input"] or "") + len(one["output"] or "")
        if size >= CHUNK_CHARACTERS:
            yield chunk()
            size = 0
    if gathered or counts:
        yield chunk()


def link_of(*parts: str) -> int:
    """A 64-bit hash of the parts, equal for equal items everywhere."""
    digest = hashlib.sha256("\x1f".join(parts).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def text_of(value: Any) -> str:
    """A field as text, stripped; "" for what is no text or number. Lone surrogates are replaced."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:  # NaN, from tables
        return ""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.encode(errors="replace").decode().strip()
