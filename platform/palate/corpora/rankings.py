"""People's comparisons of images, from the formats that publish them, as one table of annotations.

    pickapic            Pick-a-Pic v1 and v2: pairs, with or without the images
    pickapic-rankings   PickaPic-rankings: the best of four
    imagereward         ImageRewardDB's rows, or its test.json of rankings
    hpdv2               train.json of pairs, test.json with every annotator's ranks
    hpdv3               pairs with the votes for each
    scores              a score per image: {caption, image, score, user_id?}
    thumbs              up or down per image: {caption, image, label, user_id?}; Diffusion-KTO's CSV
    folders             ranked images in folders
    jsonl               {caption, items best first, user_id?, ties?}

A ranking of m images becomes all its pairs under one ``source_id``; equal ranks are ties. Scores and thumbs of one
caption may lie in many files, so they pass as ``POINT`` rows and are paired where a caption's rows meet. Nothing is
left out silently: a row that cannot be used, or is none of a comparison, carries the reason.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from palate.artifacts import locate
from palate.corpora.entries import ROW_BITS, text_of
from palate.corpora.streams import CorpusError, first_byte, json_lines, json_records

WIN, TIE, POINT = range(3)

ANNOTATIONS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # file above ROW_BITS, record in the file below
        pa.field("place", pa.int32(), nullable=False),  # of the pair in the record
        pa.field("time", pa.int64(), nullable=False),  # microseconds since 1970; 0 where unknown
        pa.field("caption", pa.string()),
        pa.field("user_id", pa.string()),
        pa.field("winner", pa.string()),  # image uids; of a tie, either may be the winner
        pa.field("loser", pa.string()),  # null for a point
        pa.field("label", pa.int8(), nullable=False),  # WIN, TIE or POINT
        pa.field("votes", pa.float64(), nullable=False),
        pa.field("value", pa.float64()),  # of a point: the higher the better, compared within a session
        pa.field("session", pa.string()),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("winner_model", pa.string()),
        pa.field("loser_model", pa.string()),
        pa.field("winner_score", pa.float64()),
        pa.field("loser_score", pa.float64()),
        pa.field("source_image", pa.string()),
        pa.field("instruction", pa.string()),
        pa.field("reason", pa.string()),  # why it is no usable comparison
    ]
)

# Left out on purpose; other reasons mean that the record is broken and are quarantined.
NO_LABEL, SAME_IMAGES, LIST_OF_ONE = "no label", "the images are not different", "a list of one"
JUDGED_TWICE = "a second judgement of one image"
DROPPED = frozenset({NO_LABEL, SAME_IMAGES, LIST_OF_ONE, JUDGED_TWICE})

FormatName = Literal[
    "pickapic", "pickapic-rankings", "imagereward", "hpdv2", "hpdv3", "scores", "thumbs", "folders", "jsonl"
]
CHUNK_ROWS = 65_536
CHUNK_ROWS_WITH_IMAGES = 256
UNIT_ROWS, UNIT_BYTES = 250_000, 1 << 28  # about what one task reads of a Parquet file
LONGEST = 100  # images of one ranking; it has m (m - 1) / 2 pairs
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TABLES = (".parquet", ".csv", ".tsv", ".json", ".jsonl")


@dataclass(frozen=True)
class Unit:
    """What one task reads: a file, or some row groups of a Parquet file, whose first record has number ``start``; with
    the ``images`` in its records or without."""

    path: str
    file: int
    groups: tuple[int, ...] = ()
    start: int = 0
    images: bool = True


@dataclass(frozen=True)
class Found:
    """A table of ``ANNOTATIONS``, and the encoded images where they lie in the records: binary arrays, or None."""

    annotations: pa.Table
    winner_bytes: pa.Array | None = None
    loser_bytes: pa.Array | None = None


@dataclass(frozen=True)
class Format:
    """How a source is read. ``keys`` tell it from the others: a record has one of these sets of fields. ``ties`` and
    ``kind`` are what suits its lists: see ``palate.lpo.lists.Rules``."""

    read: Callable[[Unit], Iterator[Found]]
    keys: tuple[frozenset[str], ...]
    kind: Literal["full", "topk"] = "full"
    ties: Literal["table", "group"] = "table"


def expand(inputs: Sequence[str], keep_folders: bool = False) -> list[str]:
    """Files for paths, patterns and folders of tables, in sorted order; a folder without tables stays a folder, all do
    with ``keep_folders``.

    Raises:
        CorpusError: nothing is there.
    """
    found: list[str] = []
    for given in inputs:
        filesystem, path = locate(given)
        one = filesystem.glob(path) if any(sign in given for sign in "*?[") else [path]
        for name in sorted(one):
            if filesystem.isdir(name):
                inside = sorted(file for file in filesystem.find(name) if file.lower().endswith(TABLES))
                listed = [name] if keep_folders or not inside else inside
                found += [str(filesystem.unstrip_protocol(file)) for file in listed]
            elif filesystem.exists(name):
                found.append(str(filesystem.unstrip_protocol(name)))
        if not one or not filesystem.exists(one[0]):
            raise CorpusError(f"--input {given}: there is no such file")
    return [path.removeprefix("file://") for path in dict.fromkeys(found)]


def detect(path: str) -> FormatName:
    """The format of a file or folder, from the fields of its first record.

    Raises:
        CorpusError: the fields are none of a known format; the message names them.
    """
    filesystem, inside = locate(path)
    if filesystem.isdir(inside):
        return "folders"
    names = _fields(path)
    for name, known in FORMATS.items():
        if any(keys <= names for keys in known.keys):
            return name
    raise CorpusError(
        f"{path}: found the fields {sorted(names)[:20]}, which are of no known format: say which with --format"
    )


def units(paths: Sequence[str], images: bool = True) -> list[Unit]:
    """What the tasks read. Records keep their numbers however a file is cut."""
    return [unit for number, path in enumerate(paths) for unit in _units(path, number, images)]


def _units(path: str, number: int, images: bool) -> Iterator[Unit]:
    if not path.lower().endswith(".parquet"):
        yield Unit(path, number, images=images)
        return
    with _parquet(path) as file:
        groups: list[int] = []
        start = rows = size = 0
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            groups.append(index)
            rows, size = rows + group.num_rows, size + group.total_byte_size
            if rows >= UNIT_ROWS or size >= UNIT_BYTES:
                yield Unit(path, number, tuple(groups), start, images)
                groups, start, rows, size = [], start + rows, 0, 0
        if groups:
            yield Unit(path, number, tuple(groups), start, images)


def _parquet(path: str) -> pq.ParquetFile:
    filesystem, inside = locate(path)
    try:
        return pq.ParquetFile(filesystem.open(inside, "rb"), pre_buffer=False)
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise CorpusError(f"{path}: no Parquet file that can be read ({error})") from None


def _fields(path: str) -> frozenset[str]:
    if path.lower().endswith(".parquet"):
        with _parquet(path) as file:
            return frozenset(file.schema_arrow.names)
    first = next((record for _, record in records(Unit(path, 0)) if isinstance(record, dict)), None)
    if first is None:
        raise CorpusError(f"{path}: found no record, expected objects with the fields of one of {sorted(FORMATS)}")
    return frozenset(first)


# Reading files


def records(unit: Unit) -> Iterator[tuple[int, Any]]:
    """Number and value of each record; the value of a line that is no JSON is its error."""
    if unit.path.lower().endswith((".parquet", ".csv", ".tsv")):
        for start, table in tables(unit, CHUNK_ROWS_WITH_IMAGES):  # there may be images in them
            yield from enumerate(table.to_pylist(), start)
    elif unit.path.lower().endswith(".jsonl") or first_byte(unit.path) == b"{":
        yield from enumerate(json_lines(unit.path))
    else:
        yield from enumerate(json_records(unit.path))


def tables(unit: Unit, rows: int = CHUNK_ROWS, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
    """The records in tables, each with the number of its first record; ``columns`` are those wanted, where present."""
    start, path = unit.start, unit.path.lower()
    if path.endswith(".parquet"):
        with _parquet(unit.path) as file:
            wanted = [name for name in file.schema_arrow.names if columns is None or name in columns]
            for batch in file.iter_batches(rows, row_groups=list(unit.groups), columns=wanted):
                yield start, pa.Table.from_batches([batch])
                start += batch.num_rows
    elif path.endswith((".csv", ".tsv")):
        for batch in _csv(unit.path, "\t" if path.endswith(".tsv") else ","):
            yield start, pa.Table.from_batches([batch])
            start += batch.num_rows
    else:
        for chunk in _batched((record for _, record in records(unit)), rows):
            yield start, _table(chunk, unit)
            start += len(chunk)


def _csv(path: str, delimiter: str) -> Iterator[pa.RecordBatch]:
    """The rows as texts; empty fields are null."""
    filesystem, inside = locate(path)
    options = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        with filesystem.open(inside, "rb") as stream, pa.csv.open_csv(stream, parse_options=options) as reader:
            names = reader.schema.names
        # Types are not guessed: a uid of digits in the first rows may be none in the last.
        types = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True)
        with filesystem.open(inside, "rb") as stream:
            yield from pa.csv.open_csv(stream, parse_options=options, convert_options=types)
    except pa.ArrowInvalid as error:
        raise CorpusError(f"{path}: no table that can be read ({error})") from None


def _table(chunk: list[Any], unit: Unit) -> pa.Table:
    """Records as a table; what is no object is an empty row."""
    try:
        return pa.Table.from_pylist([one if isinstance(one, dict) else {} for one in chunk])
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
        raise CorpusError(f"{unit.path}: no table can be made of its records ({error})") from None


def _batched(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    values = iter(values)
    while chunk := list(itertools.islice(values, size)):
        yield chunk


# Pairs in tables: a column at a time


def column(table: pa.Table, name: str, kind: pa.DataType) -> pa.Array:
    """A column as ``kind``, nulls where there is none."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows, kind)
    found = table[name].combine_chunks()
    if isinstance(found, pa.ChunkedArray):
        found = pa.concat_arrays(found.chunks) if found.num_chunks else pa.nulls(0, found.type)
    if pa.types.is_floating(found.type) and pa.types.is_string(kind):  # a user id beside nulls
        found = pc.if_else(pc.is_nan(found), None, found)
        found = found.cast(pa.int64(), safe=False) if pc.all(pc.equal(pc.floor(found), found)).as_py() else found
    return found if found.type == kind else found.cast(kind, safe=False)


def _blank(texts: pa.Array) -> pa.Array:
    return pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), True)


def _microseconds(table: pa.Table, name: str) -> pa.Array:
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.int64()).fill_null(0)
    found = column(table, name, table.schema.field(name).type)
    if pa.types.is_timestamp(found.type):
        return found.cast(pa.timestamp("us", found.type.tz), safe=False).cast(pa.int64()).fill_null(0)
    return pa.array([_time(value) for value in found.to_pylist()], pa.int64())


def _time(value: Any) -> int:
    """Microseconds since 1970 of an ISO 8601 text, in UTC where it names no zone; 0 for anything else."""
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)
    except (ValueError, OverflowError):
        return 0


def annotations(unit: Unit, start: int, count: int, **columns: Any) -> pa.Table:
    """A table of ``ANNOTATIONS`` for ``count`` records from number ``start``; columns that are not given are null.

    Finds what no annotation may have, whatever the format; a reason that is given stays.
    """
    given = {
        "row": np.arange(start, start + count) + (unit.file << ROW_BITS),
        "place": np.zeros(count, np.int32),
        "time": np.zeros(count, np.int64),
        "votes": np.ones(count),
        **columns,
    }
    table = pa.table(
        [
            pa.nulls(count, field.type) if name not in given else _as(given[name], field.type)
            for name, field in zip(ANNOTATIONS.names, ANNOTATIONS, strict=True)
        ],
        schema=pa.schema([field.with_nullable(True) for field in ANNOTATIONS]),
    )
    point = pc.equal(table["label"], POINT)
    votes = table["votes"]
    checks = [
        ("an empty caption", _blank(table["caption"])),
        ("no image uid", pc.or_(_blank(table["winner"]), pc.and_(pc.invert(point), _blank(table["loser"])))),
        ("an image against itself", pc.fill_null(pc.equal(table["winner"], table["loser"]), False)),
        ("votes that are no positive number", pc.invert(pc.and_(pc.is_finite(votes), pc.greater(votes, 0)))),
        ("no value", pc.and_(point, pc.invert(pc.fill_null(pc.is_finite(table["value"]), False)))),
    ]
    reason = table["reason"]
    for text, failed in checks:
        reason = pc.if_else(pc.and_(pc.is_null(reason), failed), text, reason)
    label = pc.fill_null(table["label"], TIE)
    source = pc.if_else(_blank(table["source_id"]), _source_ids(unit, table["row"].to_numpy()), table["source_id"])
    for name, values in (("reason", reason), ("label", label), ("source_id", source)):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return table.cast(ANNOTATIONS)


def _as(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.cast(kind)
    return pa.array(values, kind)


def _source_ids(unit: Unit, row: np.ndarray) -> pa.Array:
    """Which record of which file, for records without an id."""
    name = PurePosixPath(unit.path).name
    numbers = pa.array(row & ((1 << ROW_BITS) - 1)).cast(pa.string())
    return pc.binary_join_element_wise(name, numbers, ":")


_PICKAPIC = (
    "caption", "user_id", "created_at", "image_0_uid", "image_1_uid", "label_0", "label_1", "has_label",
    "are_different", "model_0", "model_1", "ranking_id", "jpg_0", "jpg_1",
)  # fmt: skip


def read_pickapic(unit: Unit) -> Iterator[Found]:
    """Pairs with labels (1, 0), (0, 1) or (0.5, 0.5); others' scripts take the last for a win of image 0."""
    with_images = unit.images and "jpg_0" in _fields(unit.path)
    rows = CHUNK_ROWS_WITH_IMAGES if with_images else CHUNK_ROWS
    for start, table in tables(unit, rows, _PICKAPIC if with_images else _PICKAPIC[:-2]):
        first, second = (column(table, f"label_{side}", pa.float64()) for side in (0, 1))
        wins = pc.fill_null(pc.greater_equal(first, second), True)
        total = pc.add(first, second)
        known = pc.and_(
            pc.equal(total, 1.0), pc.or_(pc.equal(first, 0.5), pc.equal(pc.abs(pc.subtract(first, second)), 1))
        )
        reason = pc.if_else(
            pc.fill_null(pc.invert(column(table, "has_label", pa.bool_())), False),
            NO_LABEL,
            pc.if_else(
                pc.fill_null(pc.invert(column(table, "are_different", pa.bool_())), False),
                SAME_IMAGES,
                pc.if_else(pc.fill_null(known, False), pa.scalar(None, pa.string()), "labels that are no win or draw"),
            ),
        )
        sides: dict[str, list[pa.Array]] = {
            "uid": [column(table, f"image_{side}_uid", pa.string()) for side in (0, 1)],
            "model": [column(table, f"model_{side}", pa.string()) for side in (0, 1)],
        }
        if with_images:
            sides["jpg"] = [column(table, f"jpg_{side}", pa.binary()) for side in (0, 1)]
        winner = {name: pc.if_else(wins, zero, one) for name, (zero, one) in sides.items()}
        loser = {name: pc.if_else(wins, one, zero) for name, (zero, one) in sides.items()}
        found = annotations(
            unit,
            start,
            table.num_rows,
            time=_microseconds(table, "created_at"),
            caption=column(table, "caption", pa.string()),
            user_id=column(table, "user_id", pa.string()),
            winner=winner["uid"],
            loser=loser["uid"],
            label=pc.if_else(pc.fill_null(pc.equal(first, second), True), TIE, WIN),
            source_id=column(table, "ranking_id", pa.string()),
            winner_model=winner["model"],
            loser_model=loser["model"],
            reason=reason,
        )
        yield Found(found, winner.get("jpg"), loser.get("jpg"))


# Rankings in records


@dataclass(frozen=True)
class Ranking:
    """One ranking: ``ranks`` of ``images``, lower is better, equal is a tie. ``best_only``: the rest is not ordered."""

    caption: str
    images: Sequence[str]
    ranks: Sequence[float]
    user_id: str = ""
    source_id: str = ""
    votes: float = 1.0
    best_only: bool = False
    time: int = 0
    models: Sequence[str] = ()
    scores: Sequence[float | None] = ()
    source_image: str = ""
    instruction: str = ""


@dataclass
class _Columns:
    """Columns of ``ANNOTATIONS`` being filled."""

    values: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in ANNOTATIONS.names})

    def __len__(self) -> int:
        return len(self.values["row"])

    def add(self, row: int, **given: Any) -> None:
        one = {"place": 0, "time": 0, "votes": 1.0, "label": TIE, **given, "row": row}
        for name, values in self.values.items():
            values.append(one.get(name))

    def add_ranking(self, row: int, ranking: Ranking) -> None:
        shared = {
            "caption": ranking.caption,
            "user_id": ranking.user_id or None,
            "source_id": ranking.source_id or None,
            "votes": ranking.votes,
            "time": ranking.time,
            "source_image": ranking.source_image or None,
            "instruction": ranking.instruction or None,
        }
        if problem := _problem(ranking):
            self.add(row, **shared, reason=problem)
            return
        best = min(ranking.ranks)
        pairs = itertools.combinations(range(len(ranking.images)), 2)
        for place, (left, right) in enumerate(pairs):
            ranks = ranking.ranks[left], ranking.ranks[right]
            if ranking.best_only and best not in ranks:
                continue
            winner, loser = (right, left) if ranks[1] < ranks[0] else (left, right)
            self.add(
                row,
                **shared,
                place=place,
                winner=ranking.images[winner],
                loser=ranking.images[loser],
                label=TIE if ranks[0] == ranks[1] else WIN,
                winner_model=ranking.models[winner] if ranking.models else None,
                loser_model=ranking.models[loser] if ranking.models else None,
                winner_score=ranking.scores[winner] if ranking.scores else None,
                loser_score=ranking.scores[loser] if ranking.scores else None,
            )

    def table(self, unit: Unit) -> pa.Table:
        made = annotations(unit, 0, len(self), **self.values)
        self.values = {name: [] for name in ANNOTATIONS.names}
        return made


def _problem(ranking: Ranking) -> str | None:
    images, ranks = ranking.images, ranking.ranks
    if len(images) == 1:
        return LIST_OF_ONE
    if not images:
        return "no images"
    if len(images) > LONGEST:
        return f"a ranking of more than {LONGEST} images"
    if len(ranks) != len(images):
        return "not one rank for each image"
    if not all(math.isfinite(rank) for rank in ranks):
        return "a rank that is no number"
    return "an image twice in a ranking" if len(set(images)) < len(images) else None


class Unusable(ValueError):
    """A record that no ranking can be made of; the message is the reason."""


Reader = Callable[[Unit], Iterator[Found]]


def _ranked(rankings: Callable[[Mapping[str, Any]], Iterable[Ranking]]) -> Reader:
    """A reader of records that hold rankings."""

    def read(unit: Unit) -> Iterator[Found]:
        columns = _Columns()
        for number, record in records(unit):
            row = number + (unit.file << ROW_BITS)
            try:
                for place, one in enumerate(rankings(_object(record))):
                    before = len(columns)
                    columns.add_ranking(row, one)
                    # Pairs of several annotators of one record stay apart.
                    for index in range(before, len(columns)):
                        columns.values["place"][index] += place * LONGEST**2
            except Unusable as error:
                columns.add(row, caption=_excerpt(record), reason=str(error))
            if len(columns) >= CHUNK_ROWS:
                yield Found(columns.table(unit))
        if len(columns):
            yield Found(columns.table(unit))

    return read


def _pointed(point: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Reader:
    """A reader of records that judge one image each: ``point`` gives caption, winner, value and what else is known."""

    def read(unit: Unit) -> Iterator[Found]:
        columns, images = _Columns(), list[bytes | None]()

        def chunk() -> Found:
            found = Found(columns.table(unit), pa.array(images, pa.binary()) if any(images) else None)
            images.clear()
            return found

        for number, record in records(unit):
            row = number + (unit.file << ROW_BITS)
            try:
                given = point(_object(record))
                images.append(given.pop("bytes", None))
                columns.add(row, **{"label": POINT, **given})
            except Unusable as error:
                images.append(None)
                columns.add(row, label=POINT, caption=_excerpt(record), reason=str(error))
            if len(columns) >= (CHUNK_ROWS_WITH_IMAGES if images[-1] else CHUNK_ROWS):
                yield chunk()
        if len(columns):
            yield chunk()

    return read


def _object(record: Any) -> Mapping[str, Any]:
    if isinstance(record, ValueError):
        raise Unusable("the line is no JSON")
    if not isinstance(record, Mapping):
        raise Unusable("the record is no object")
    return record


def _excerpt(record: Any) -> str:
    caption = record.get("prompt", record.get("caption")) if isinstance(record, Mapping) else str(record)
    return text_of(caption)[:60]


def _texts(values: Any, what: str) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise Unusable(f"{what} is no list")
    return [text_of(value) for value in values]


def _numbers(values: Any, what: str) -> list[float]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise Unusable(f"{what} is no list")
    return [_number(value) for value in values]


def _number(value: Any) -> float:
    """A number; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _first(record: Mapping[str, Any], *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def pickapic_rankings(record: Mapping[str, Any]) -> Iterator[Ranking]:
    """The best of four images."""
    images = [text_of(record.get(f"image_{side}_uid")) for side in range(1, 5)]
    images = [image for image in images if image]
    best = text_of(record.get("best_image_uid"))
    if not best:
        raise Unusable(NO_LABEL)
    if best not in images:
        raise Unusable("the best image is none of the images")
    yield Ranking(
        caption=text_of(_first(record, "prompt", "caption")),
        images=images,
        ranks=[float(image != best) for image in images],
        user_id=text_of(record.get("user_id")),
        source_id=text_of(record.get("ranking_id")),
        best_only=True,
        time=_time(record.get("created_at")),
    )


def imagereward_rankings(record: Mapping[str, Any]) -> Iterator[Ranking]:
    """test.json: ``ranking[i]`` is the rank of ``generations[i]``; ranks may skip."""
    yield Ranking(
        caption=text_of(record.get("prompt")),
        images=_texts(record.get("generations"), "generations"),
        ranks=_numbers(record.get("ranking"), "ranking"),
        source_id=text_of(record.get("id")),
    )


def imagereward_point(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ImageRewardDB: rank 1 is the best of its ``prompt_id``; ranks may repeat."""
    image = record.get("image")
    path = text_of(_first(record, "image_path") or (image.get("path") if isinstance(image, Mapping) else image))
    score = _number(record.get("overall_rating"))
    return {
        "caption": text_of(record.get("prompt")),
        "winner": path,
        "value": -_number(record.get("rank")),
        "session": text_of(record.get("prompt_id")),
        "source_id": text_of(record.get("prompt_id")) or None,
        "winner_score": None if math.isnan(score) else score,
        "bytes": image.get("bytes") if isinstance(image, Mapping) else None,
    }


def read_imagereward(unit: Unit) -> Iterator[Found]:
    """Rows, or the test.json form."""
    if "generations" in _fields(unit.path):
        return _ranked(imagereward_rankings)(unit)
    return _pointed(imagereward_point)(unit)


def hpdv2_rankings(record: Mapping[str, Any]) -> Iterator[Ranking]:
    """train.json: ``human_preference`` 1 marks the better of ``file_path``. test.json: the rank of each image, 1 the
    best, by every annotator; the averaged ``rank`` where there are no annotators."""
    caption = text_of(record.get("prompt"))
    source = text_of(record.get("id"))
    if "human_preference" in record:
        chosen = _numbers(record["human_preference"], "human_preference")
        images = _texts(_first(record, "file_path", "image_path"), "file_path")
        yield Ranking(caption, images, [-one for one in chosen], source_id=source)
        return
    images = _texts(_first(record, "image_path", "file_path"), "image_path")
    annotators = record.get("raw_annotations")
    if not annotators:
        yield Ranking(caption, images, _numbers(record.get("rank"), "rank"), source_id=source)
        return
    for one in annotators:
        given = _object(one)
        ranks, user = _numbers(given.get("rank"), "rank"), text_of(given.get("user_hash"))
        yield Ranking(caption, images, ranks, user_id=user, source_id=f"{source}/{user}" if source else "")


def hpdv3_rankings(record: Mapping[str, Any]) -> Iterator[Ranking]:
    """``path1`` is preferred; ``choice_dist`` says by how many, and its difference is the vote's weight."""
    chosen = record.get("choice_dist")
    difference = 1.0
    if isinstance(chosen, Sequence) and len(chosen) == 2:
        counts = _numbers(chosen, "choice_dist")
        difference = abs(counts[0] - counts[1])
    yield Ranking(
        caption=text_of(record.get("prompt")),
        images=[text_of(record.get("path1")), text_of(record.get("path2"))],
        ranks=[0.0, 0.0] if difference == 0 else [0.0, 1.0],
        votes=difference or 1.0,
        models=[text_of(record.get("model1")), text_of(record.get("model2"))],
    )


def score_point(record: Mapping[str, Any]) -> dict[str, Any]:
    """A score of one image; higher is better, also where models or raters gave it."""
    value = _number(_first(record, "score", "overall_score"))
    return {**_judged(record), "value": value, "winner_score": None if math.isnan(value) else value}


_UP = {"up", "like", "liked", "true", "1", "good", "exclusive_win", "win"}
_DOWN = {"down", "dislike", "disliked", "false", "0", "-1", "bad", "exclusive_lose", "lose"}


def thumb_point(record: Mapping[str, Any]) -> dict[str, Any]:
    """Up or down for one image, in any of the usual words."""
    found = str(_first(record, "label", "liked", "thumb")).strip().lower().removesuffix(".0")
    if found not in _UP | _DOWN:
        raise Unusable("a label that is neither up nor down")
    return {**_judged(record), "value": float(found in _UP)}


def _judged(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "caption": text_of(_first(record, "caption", "prompt")),
        "user_id": text_of(record.get("user_id")) or None,
        "winner": text_of(_first(record, "image", "image_uid", "path", "file_path", "filename")),
        "winner_model": text_of(record.get("model")) or None,
        "time": _time(_first(record, "date", "created_at")),
        "source_image": text_of(record.get("source_image")) or None,
        "instruction": text_of(record.get("instruction")) or None,
        "source_id": text_of(record.get("id")) or None,
    }


def jsonl_rankings(record: Mapping[str, Any]) -> Iterator[Ranking]:
    """Items best first, each a uid, a path, or {"image_uid" or "path", "model"?, "score"?}; an item that is a list of
    them is a tie. ``ties`` names further groups of items that are equally good; they must be neighbours."""
    items = record.get("items")
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise Unusable("items is no list")
    groups = [list(item) if isinstance(item, list | tuple) else [item] for item in items]
    ranks = [float(number) for number, group in enumerate(groups) for _ in group]
    flat = [_item(item) for group in groups for item in group]
    images = [text_of(_first(item, "image_uid", "path", "image")) for item in flat]
    for tie in record.get("ties") or ():
        names = set(_texts(tie, "a tie"))
        places = [place for place, image in enumerate(images) if image in names]
        if len(places) != len(names) or places != list(range(places[0], places[-1] + 1)):
            raise Unusable("a tie of items that are no neighbours of the list")
        for place in places:
            ranks[place] = ranks[places[0]]
    votes = record.get("votes")
    scores = [_number(item.get("score")) for item in flat]
    yield Ranking(
        caption=text_of(_first(record, "caption", "prompt")),
        images=images,
        ranks=ranks,
        user_id=text_of(record.get("user_id")),
        source_id=text_of(record.get("id")),
        votes=1.0 if votes is None else _number(votes),
        best_only=record.get("best_only") is True,
        time=_time(_first(record, "date", "created_at")),
        models=[text_of(item.get("model")) for item in flat],
        scores=[None if math.isnan(score) else score for score in scores],
        source_image=text_of(record.get("source_image")),
        instruction=text_of(record.get("instruction")),
    )


def _item(item: Any) -> Mapping[str, Any]:
    return item if isinstance(item, Mapping) else {"image_uid": item}


def read_folders(unit: Unit) -> Iterator[Found]:
    """Images ranked by where they lie. Uids are paths inside the folder.

    Either a folder a caption, whose images begin with their rank (``1_cat.png``; equal ranks are ties) and whose
    ``caption.txt``, or else its name, is the caption; or, as trainers of LoRAs have it, a folder with ``w`` and ``l``:
    equally named images, winner and loser, and the caption beside the winner (``.caption`` or ``.txt``).
    """
    filesystem, root = locate(unit.path)
    files = sorted(name.removeprefix(f"{root}/") for name in filesystem.find(root))
    present = set(files)

    def text(name: str) -> str:
        return str(filesystem.cat_file(f"{root}/{name}").decode(errors="replace").strip()) if name in present else ""

    columns = _Columns()
    folders: dict[PurePosixPath, list[PurePosixPath]] = {}
    for file in map(PurePosixPath, files):
        if file.suffix.lower() in SUFFIXES:
            folders.setdefault(file.parent, []).append(file)
    rankings: list[Ranking] = []
    for folder, images in folders.items():
        if folder.name == "l" and folder.with_name("w") in folders:
            continue
        if folder.name == "w" and folder.with_name("l") in folders:
            losers = {image.stem: image for image in folders[folder.with_name("l")]}
            for image in images:
                pair = [str(image), *(str(losers[image.stem]) for _ in range(image.stem in losers))]
                caption = text(f"{image.with_suffix('.caption')}") or text(f"{image.with_suffix('.txt')}")
                rankings.append(Ranking(caption, pair, [0.0, 1.0][: len(pair)], source_id=str(image)))
            continue
        ranks = [_number(image.name.split("_")[0].split(".")[0]) for image in images]
        caption = text(f"{folder / 'caption.txt'}") or folder.name
        rankings.append(Ranking(caption, [str(image) for image in images], ranks, source_id=str(folder)))
    for number, ranking in enumerate(rankings):
        columns.add_ranking(number + (unit.file << ROW_BITS), ranking)
    if len(columns):
        yield Found(columns.table(unit))


FORMATS: dict[FormatName, Format] = {
    "pickapic": Format(read_pickapic, (frozenset({"label_0", "label_1", "image_0_uid", "image_1_uid"}),)),
    "pickapic-rankings": Format(
        _ranked(pickapic_rankings), (frozenset({"best_image_uid", "image_1_uid", "image_4_uid"}),), kind="topk"
    ),
    "imagereward": Format(
        read_imagereward,
        (frozenset({"generations", "ranking"}), frozenset({"prompt_id", "rank"})),
        ties="group",
    ),
    "hpdv2": Format(
        _ranked(hpdv2_rankings),
        (frozenset({"human_preference"}), frozenset({"raw_annotations"}), frozenset({"image_path", "rank"})),
        ties="group",
    ),
    "hpdv3": Format(_ranked(hpdv3_rankings), (frozenset({"path1", "path2"}),)),
    "scores": Format(_pointed(score_point), (frozenset({"score"}), frozenset({"overall_score"})), ties="group"),
    "thumbs": Format(
        _pointed(thumb_point), (frozenset({"label"}), frozenset({"liked"}), frozenset({"thumb"})), ties="group"
    ),
    "folders": Format(read_folders, (), ties="group"),
    "jsonl": Format(_ranked(jsonl_rankings), (frozenset({"items"}),), ties="group"),
}


def pair_points(table: pa.Table, margin: float, size: int) -> pa.Table:
    """Points of one place compared in pairs: those of one (caption, user, session, edited image, instruction).

    Many points are dealt, by value and uid, into sets of at most ``size`` that each span the whole range; a set's
    images are compared with one another. Values that differ by at most ``margin`` are a tie. A single one becomes a
    row with the reason ``LIST_OF_ONE``. Rows that are no points pass as they are.
    """
    points = table.filter(pc.equal(table["label"], POINT))
    if not points.num_rows:
        return table
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    doubles: list[dict[str, Any]] = []
    for one in points.sort_by([("row", "ascending"), ("place", "ascending")]).to_pylist():
        key = tuple(one[name] for name in ("caption", "user_id", "session", "source_image", "instruction"))
        same = groups.setdefault(key, {})
        if one["winner"] in same:
            doubles.append({**one, "label": TIE, "reason": JUDGED_TWICE})
        else:
            same[one["winner"]] = one
    made = [*doubles]
    for same in groups.values():
        ordered = sorted(same.values(), key=lambda one: (-one["value"], one["winner"]))
        sets = -(-len(ordered) // size)
        for part in range(sets):
            made += _compared(ordered[part::sets], margin)
    others = table.filter(pc.not_equal(table["label"], POINT))
    return pa.concat_tables([others, pa.Table.from_pylist(made, schema=ANNOTATIONS)])


def _compared(points: list[dict[str, Any]], margin: float) -> Iterator[dict[str, Any]]:
    if len(points) == 1:
        yield {**points[0], "label": TIE, "reason": LIST_OF_ONE}
    for (_, better), (place, worse) in itertools.combinations(enumerate(points), 2):
        yield {
            **better,
            "place": place,
            "time": max(better["time"], worse["time"]),
            "source_id": points[0]["source_id"],
            "loser": worse["winner"],
            "label": TIE if better["value"] - worse["value"] <= margin else WIN,
            "loser_model": worse["winner_model"],
            "loser_score": worse["winner_score"],
        }
