"""From raw records to a text corpus, in steps that a plain loop or Ray Data may run with the same result.

A reader (lamp, longlamp, git, jsonl) turns a *unit* of input, usually a file, into chunks of ``ENTRIES``. Then:

    read     unit -> its entries, as Parquet                            a task a unit
    link     rows that carry no user id -> users                        the driver, over a few columns
    assign   unit -> its entries by bucket of users                     a task a unit
    finish   bucket -> items, questions, quarantined records, counts    a task a bucket

Each task reads and writes files in a work folder beside the corpus and holds one chunk or one bucket of text at a
time: a LaMP_4 file of 1 GB took 0.73 GB of resident memory at its peak. On retry: a task writes an artifact of its own, so running it again, after a kill too, does nothing or starts it
anew; a killed preparation goes on after the tasks that are finished. Positions, not arrival, decide every order, so the
rows do not depend on the number of units, buckets or workers.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from palate import artifacts
from palate import config as configs
from palate.config import scale
from palate.corpora.schema import ITEMS, QUESTIONS, TEXT_CORPUS, Task, normalized
from palate.corpora.streams import CorpusError
from palate.progress import track

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
class Chunk:
    """A part of what a reader found: a table of ``ENTRIES``, and what was left out on purpose since the last chunk."""

    entries: pa.Table
    counts: Counter[str]


@dataclass(frozen=True)
class Recipe:
    """A corpus to make: what is read, by which function, under which rules.

    ``inputs`` are content digests, ``expected`` the ids of the questions that there must be.
    """

    rules: Rules
    units: Sequence[Any]
    names: Sequence[str]  # of the units, for messages and the quarantine file
    read: Callable[[Any], Iterator[Chunk]]
    inputs: Mapping[str, str]
    expected: frozenset[str] = frozenset()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What every preparation takes."""

    out: str = scale()  # folder or URL of the corpus
    launcher: Literal["local", "ray"] = scale("local")  # a plain loop, or Ray Data on a cluster
    fresh: bool = scale(False)  # discard what is at --out, finished or not
    buckets: int = scale(16)  # files that people are spread over; one bucket's text must fit in a worker's memory
    max_quarantined: float = scale(0.05)  # stop when a larger share of the records cannot be used


@dataclass(frozen=True)
class Finished:
    """What one bucket of users gives: tables of ``ITEMS`` and ``QUESTIONS``, and counts by name."""

    items: pa.Table
    questions: pa.Table
    counts: Counter[str]


# ---- what readers use


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
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.encode(errors="replace").decode().strip()


# ---- pure functions on entries


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


def bucket_of(user_id: str, buckets: int) -> int:
    return int.from_bytes(hashlib.sha256(user_id.encode()).digest()[:8], "big") % buckets


def with_users(entries: pa.Table, users: Mapping[int, str]) -> pa.Table:
    """The entries with recovered users where the data names none."""
    named = entries["user_id"].to_pylist()
    filled = [
        users.get(row) if user is None else user for row, user in zip(entries["row"].to_pylist(), named, strict=True)
    ]
    return entries.set_column(entries.schema.get_field_index("user_id"), ENTRIES.field("user_id"), [filled])


def split_by_bucket(entries: pa.Table, buckets: int) -> dict[int, pa.Table]:
    """The usable entries of each bucket of users."""
    usable = entries.filter(pc.is_null(entries["reason"]))
    numbers = np.array([bucket_of(user, buckets) for user in usable["user_id"].to_pylist()], dtype=np.int64)
    return {int(b): usable.filter(pa.array(numbers == b)) for b in np.unique(numbers)}


def finish(entries: pa.Table, rules: Rules) -> Finished:
    """The items and questions of whole users: deduplicated, ordered in time, without the questions' own texts."""
    rows = entries.sort_by([("user_id", "ascending"), ("row", "ascending"), ("place", "ascending")]).to_pylist()
    items: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for user_id, group in itertools.groupby(rows, key=lambda one: one["user_id"]):
        _finish_user(user_id, list(group), rules, items, questions, counts)
    return Finished(
        pa.Table.from_pylist(items, schema=ITEMS), pa.Table.from_pylist(questions, schema=QUESTIONS), counts
    )


def date_key(date: str) -> tuple[int, ...]:
    """The numbers of a date or time, to sort by: LaMP's official rule, and right for ISO 8601 in one time zone."""
    return tuple(int(number) for number in re.findall(r"\d+", date))


def _finish_user(
    user_id: str,
    entries: list[dict[str, Any]],
    rules: Rules,
    items: list[dict[str, Any]],
    questions: list[dict[str, Any]],
    counts: Counter[str],
) -> None:
    texts, profiles = _distinct_texts([one for one in entries if one["place"] != QUESTION], counts)
    if len(texts) < rules.min_texts:
        counts["users_below_min_texts"] += 1
        counts["texts_of_dropped_users"] += len(texts)
        return
    if rules.chronological and all(one["date"] and date_key(one["date"]) for one in texts):
        texts.sort(key=lambda one: (date_key(one["date"]), one["row"], one["place"]))
    if rules.max_texts and len(texts) > rules.max_texts:
        counts["texts_over_max_texts"] += len(texts) - rules.max_texts
        texts = texts[-rules.max_texts :]
    asked = [one for one in entries if one["place"] == QUESTION]
    if rules.hold_out:
        kept = max(1, len(texts) - rules.hold_out)
        texts, asked = texts[:kept], texts[kept:]
        profiles = {one["row"]: {id(text) for text in texts} for one in asked}
    texts = _without_own(texts, asked, rules, counts)
    names = _item_ids(user_id, texts, counts)
    for order, one in enumerate(texts):
        items.append(
            {
                "user_id": user_id,
                "item_id": names[id(one)],
                "order": order,
                "source": one["source"],
                "input": _input(one, rules),
                "output": one["output"],
                "date": one["date"],
            }
        )
    for one in asked:
        profile = profiles.get(one["row"], set())
        counts["questions_without_gold"] += one["output"] is None
        questions.append(
            {
                "question_id": one["id"],
                "user_id": user_id,
                "source": one["source"],
                "input": _input(one, rules),
                "output": one["output"],
                "date": one["date"],
                "profile": [names[id(text)] for text in texts if id(text) in profile],
            }
        )
    counts["users"] += 1
    counts["items"] += len(texts)
    counts["questions"] += len(asked)
    counts["users_without_items"] += not texts


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


def _without_own(
    texts: list[dict[str, Any]], asked: list[dict[str, Any]], rules: Rules, counts: Counter[str]
) -> list[dict[str, Any]]:
    """The texts that are no question's gold. An equal label on another text stays and is counted."""
    ids = {one["id"] for one in asked}
    sources = {normalized(one["source"]) for one in asked} - {""}
    golds = {normalized(one["output"]) for one in asked if one["output"]} - {""}
    kept = []
    for one in texts:
        equal_output = normalized(one["output"]) in golds
        if one["id"] in ids:
            counts["leaked_items_same_id"] += 1
        elif normalized(one["source"]) in sources:
            counts["leaked_items_same_source"] += 1
        elif rules.own_output and equal_output:
            counts["leaked_items_same_output"] += 1
        else:
            counts["items_with_an_equal_label"] += equal_output
            kept.append(one)
    return kept


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


# ---- the steps


@dataclass(frozen=True)
class Step:
    """One task of a stage: ``run(task)`` returns small JSON values."""

    label: str
    run: Callable[[Any], dict[str, Any]]
    tasks: Sequence[Any]


Runner = Callable[[Step], list[dict[str, Any]]]


def run_local(step: Step) -> list[dict[str, Any]]:
    """The results of the tasks, one after another."""
    return [step.run(task) for task in track(step.tasks, step.label)]


def prepare(recipe: Recipe, config: PrepareConfig, runner: Runner = run_local) -> artifacts.Artifact:
    """The corpus at ``config.out``, made from ``recipe`` unless it is there.

    Raises:
        CorpusError: the input is not what the command says, or too much of it cannot be used.
        ArtifactMismatch: another corpus is there.
    """
    identity = {**configs.identity(config), "inputs": dict(recipe.inputs)}
    if config.fresh:
        _remove_work(config.out)
    with artifacts.writing(config.out, kind=TEXT_CORPUS, config=identity, fresh=config.fresh) as writer:
        if writer is not None:
            _Preparation(recipe, config, identity, runner).write(writer)
    _remove_work(config.out)
    return artifacts.open_artifact(config.out, TEXT_CORPUS)


@dataclass(frozen=True)
class _Preparation:
    recipe: Recipe
    config: PrepareConfig
    identity: dict[str, Any]
    runner: Runner

    @property
    def work(self) -> str:
        return work_folder(self.config.out)

    def write(self, writer: artifacts.Writer) -> None:
        recipe, config = self.recipe, self.config
        indices = range(len(recipe.units))
        read = partial(_read_unit, recipe=recipe, work=self.work, identity=self.identity)
        summaries = self.runner(Step("read", read, indices))
        records = sum(summary["records"] for summary in summaries)
        reasons = sum((Counter(summary["reasons"]) for summary in summaries), Counter[str]())
        left_out = sum((Counter(summary["counts"]) for summary in summaries), Counter[str]())
        quarantined = sum(reasons.values())
        if quarantined > config.max_quarantined * records:
            raise CorpusError(
                f"{quarantined} of {records} records cannot be used, more than --max-quarantined "
                f"{config.max_quarantined:g}: {_most_common(reasons)}. Check the file, or raise the limit"
            )
        if records == quarantined:
            raise CorpusError(f"{', '.join(recipe.names[:3])}: found no usable record; left out: {dict(left_out)}")
        users, unknown = _link(self.work, recipe)
        if len(unknown) > config.max_quarantined * len(recipe.expected):
            raise CorpusError(
                f"{len(unknown)} of {len(recipe.expected)} golds (such as {min(unknown)!r}) are for questions that "
                f"{', '.join(recipe.names)} do not ask: these files do not belong together"
            )
        assign = partial(_assign_unit, users=users, work=self.work, identity=self.identity, buckets=config.buckets)
        written = self.runner(Step("assign", assign, indices))
        buckets = sorted({bucket for summary in written for bucket in summary["buckets"]})
        finish_one = partial(
            _finish_bucket, rules=recipe.rules, units=len(recipe.units), work=self.work, out=writer.url
        )
        finished = self.runner(Step("finish", finish_one, buckets))
        counts = sum((Counter(result) for result in finished), Counter[str]())
        if not counts["users"]:
            raise CorpusError(f"no person is left: {dict(counts)}. Lower --min-texts or check the input")
        _write_quarantine(writer.folder / "quarantine.jsonl", self.work, recipe)
        report = {
            **dict.fromkeys(COUNTS, 0),
            **recipe.counts,
            **left_out,
            **counts,
            "records": records,
            "golds_without_question": len(unknown),
            "quarantined": quarantined,
            "quarantined_by_reason": dict(sorted(reasons.items())),
            "users_recovered": len(set(users.values())),
        }
        writer.write_json("report.json", report)
        writer.write_json("task.json", dataclasses.asdict(recipe.rules.task))
        writer.summary.update(report)


# Always in the report, so that a zero is seen.
COUNTS = (
    "users",
    "items",
    "questions",
    "questions_without_gold",
    "users_without_items",
    "users_below_min_texts",
    "texts_of_dropped_users",
    "texts_over_max_texts",
    "duplicate_items",
    "item_ids_used_again",
    "leaked_items_same_id",
    "leaked_items_same_source",
    "leaked_items_same_output",
    "items_with_an_equal_label",
)


def work_folder(out: str) -> str:
    """Where the steps of the corpus at ``out`` leave their files; removed when the corpus is finished."""
    return f"{out.rstrip('/')}.work"


def _read_unit(index: int, *, recipe: Recipe, work: str, identity: dict[str, Any]) -> dict[str, Any]:
    """Read one unit into ``work/read``; gives the number of records and of unusable ones by reason."""

    def produce(writer: artifacts.Writer) -> None:
        records, reasons, counts = 0, Counter[str](), Counter[str]()
        with pq.ParquetWriter(writer.folder / "entries.parquet", ENTRIES, compression="zstd") as file:
            for chunk in recipe.read(recipe.units[index]):
                records += chunk.entries.num_rows
                reasons.update(reason for reason in chunk.entries["reason"].to_pylist() if reason)
                counts.update(chunk.counts)
                if sum(reasons.values()) > max(100, records / 2):
                    raise CorpusError(
                        f"{recipe.names[index]}: most of the first {records} records cannot be used "
                        f"({_most_common(reasons)}): check that the file and the command belong together"
                    )
                file.write_table(chunk.entries)
        writer.summary.update(records=records, reasons=dict(reasons), counts=dict(counts))

    config = {**identity, "unit": recipe.names[index]}
    return _made(_unit_url(work, "read", index), produce, config)


def _link(work: str, recipe: Recipe) -> tuple[dict[int, str], set[str]]:
    """The users of rows that carry no id, and the expected questions that there are not.

    Raises:
        CorpusError: two questions have one id; answers are matched by it.
    """
    rows, links = [], []
    positions: dict[str, int] = {}
    for index in range(len(recipe.units)):
        for table in _entries(work, "read", index, ["row", "place", "user_id", "link", "id", "reason"]):
            asked = table.filter(pc.equal(table["place"], QUESTION))
            for identity, row in zip(asked["id"].to_pylist(), asked["row"].to_pylist(), strict=True):
                other = positions.setdefault(identity, row)
                if other != row and identity:
                    raise CorpusError(
                        f"question id {identity!r} occurs twice: in {_place(recipe, other)} and in "
                        f"{_place(recipe, row)}. Prepare them as two corpora"
                    )
            usable = table.filter(pc.is_null(table["reason"]))
            nameless = usable.filter(pc.and_(pc.is_null(usable["user_id"]), pc.is_valid(usable["link"])))
            rows.append(nameless["row"].to_numpy())
            links.append(nameless["link"].to_numpy())
    users = recover_users(np.concatenate(rows), np.concatenate(links)) if rows else {}
    return users, set(recipe.expected - positions.keys())


def _assign_unit(
    index: int, *, users: Mapping[int, str], work: str, identity: dict[str, Any], buckets: int
) -> dict[str, Any]:
    """Spread one unit's entries over the buckets, in ``work/assigned``; gives the buckets that got any."""

    def produce(writer: artifacts.Writer) -> None:
        with ExitStack() as stack:
            files: dict[int, pq.ParquetWriter] = {}
            for batch in _entries(work, "read", index):
                for bucket, table in split_by_bucket(with_users(batch, users), buckets).items():
                    if bucket not in files:
                        path = writer.folder / _bucket_file(bucket)
                        files[bucket] = stack.enter_context(pq.ParquetWriter(path, ENTRIES, compression="zstd"))
                    files[bucket].write_table(table)
            writer.summary["buckets"] = sorted(files)

    config = {**identity, "buckets": buckets}
    return _made(_unit_url(work, "assigned", index), produce, config)


def _finish_bucket(bucket: int, *, rules: Rules, units: int, work: str, out: str) -> dict[str, int]:
    """Write the items and questions of one bucket's users into the corpus; gives the counts."""
    name = _bucket_file(bucket)
    opened = (artifacts.open_artifact(_unit_url(work, "assigned", index)) for index in range(units))
    tables = [pq.read_table(one.local(name), schema=ENTRIES) for one in opened if name in one.paths()]
    finished = finish(pa.concat_tables(tables), rules)
    filesystem, root = artifacts.locate(out)
    for folder, table in [("items", finished.items), ("questions", finished.questions)]:
        if table.num_rows:
            filesystem.makedirs(f"{root}/{folder}", exist_ok=True)
            with filesystem.open(f"{root}/{folder}/{name}", "wb") as stream:
                pq.write_table(table, stream, compression="zstd")
    return dict(finished.counts)


def _write_quarantine(path: Path, work: str, recipe: Recipe) -> None:
    with path.open("w") as stream:
        for index in range(len(recipe.units)):
            for batch in _entries(work, "read", index, ["row", "place", "id", "source", "reason"]):
                for one in batch.filter(pc.is_valid(batch["reason"])).to_pylist():
                    record = {
                        "input": recipe.names[index],
                        "record": one["row"] & ((1 << ROW_BITS) - 1),
                        "item": None if one["place"] == QUESTION else one["place"],
                        "id": one["id"],
                        "reason": one["reason"],
                        "found": one["source"],
                    }
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _entries(work: str, stage: str, index: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The tables of one unit, a row group at a time."""
    file = artifacts.open_artifact(_unit_url(work, stage, index)).local("entries.parquet")
    with pq.ParquetFile(file) as parquet:
        for group in track(range(parquet.num_row_groups), f"{stage} {index}"):
            yield parquet.read_row_group(group, columns=columns)


def _remove_work(out: str) -> None:
    filesystem, root = artifacts.locate(work_folder(out))
    for stage in ("read", "assigned"):
        for folder in filesystem.glob(f"{root}/{stage}/*"):
            artifacts.discard(filesystem.unstrip_protocol(folder))
            if artifacts.is_local(filesystem):
                filesystem.rmdir(folder)
    if artifacts.is_local(filesystem) and filesystem.exists(root):
        for folder in (f"{root}/read", f"{root}/assigned", root):
            if filesystem.exists(folder):
                filesystem.rmdir(folder)


def _made(url: str, produce: Callable[[artifacts.Writer], None], config: dict[str, Any]) -> dict[str, Any]:
    """The summary of the step's artifact, made unless it is there; what another preparation left there is discarded."""
    try:
        return artifacts.ensure(url, produce, kind="text-entries", config=config).summary
    except artifacts.ArtifactMismatch:
        return artifacts.ensure(url, produce, kind="text-entries", config=config, fresh=True).summary


def _unit_url(work: str, stage: str, index: int) -> str:
    return artifacts.join(work, stage, f"{index:05d}")


def _bucket_file(bucket: int) -> str:
    return f"part-{bucket:05d}.parquet"


def _place(recipe: Recipe, row: int) -> str:
    return f"{recipe.names[row >> ROW_BITS]} (record {row & ((1 << ROW_BITS) - 1)})"


def _most_common(reasons: Counter[str]) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
