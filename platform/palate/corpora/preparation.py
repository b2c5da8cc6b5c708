"""From raw records to a text corpus, in steps that a plain loop or Ray Data may run with the same result.

A reader (lamp, longlamp, git, jsonl) turns a *unit* of input, usually a file, into chunks of ``ENTRIES``. Then:

    read     unit -> its entries, as Parquet                            a task a unit
    link     rows that carry no user id -> users                        the driver, over a few columns
    assign   unit -> its entries by bucket of users                     a task a unit
    ask      bucket -> which texts are some question's gold             a task a bucket
    finish   bucket -> items, questions, quarantined records, counts    a task a bucket

Each task reads and writes files in a work folder beside the corpus and holds one chunk or one bucket of text at a
time: a LaMP_4 file of 1 GB took 0.73 GB of resident memory at its peak. Positions, not arrival, decide every order, so
the rows do not depend on the number of units, buckets or workers.

On retry: a task writes an artifact of its own, or files of the corpus under a name that depends on the task alone, so
running it again, after a kill too, does nothing or starts it anew; a killed preparation goes on after the tasks that
are finished.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from palate import artifacts
from palate import config as configs
from palate.config import scale
from palate.corpora import people
from palate.corpora.entries import ENTRIES, QUESTION, ROW_BITS, Chunk
from palate.corpora.people import Rules
from palate.corpora.schema import TEXT_CORPUS
from palate.corpora.streams import CorpusError, absolute
from palate.progress import track


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
    if not 0 <= config.max_quarantined <= 1:  # NaN, too
        raise CorpusError(f"--max-quarantined is a share from 0 to 1, got {config.max_quarantined}")
    identity = {**configs.identity(config), "inputs": dict(recipe.inputs)}
    config = dataclasses.replace(config, out=absolute(config.out))
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
        entries_of = partial(_bucket, work=self.work, units=len(recipe.units))
        ask = partial(_ask_bucket, rules=recipe.rules, entries_of=entries_of)
        golds = frozenset(pair for result in self.runner(Step("ask", ask, buckets)) for pair in result["golds"])
        finish_one = partial(_finish_bucket, rules=recipe.rules, golds=golds, entries_of=entries_of, out=writer.url)
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
    "leaked_items_of_another_person",
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
    users = people.recover_users(np.concatenate(rows), np.concatenate(links)) if rows else {}
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


def _bucket(bucket: int, *, work: str, units: int) -> pa.Table:
    """All entries of one bucket's users."""
    name = _bucket_file(bucket)
    opened = (artifacts.open_artifact(_unit_url(work, "assigned", index)) for index in range(units))
    tables = [pq.read_table(one.local(name), schema=ENTRIES) for one in opened if name in one.paths()]
    return pa.concat_tables(tables)


def _ask_bucket(bucket: int, *, rules: Rules, entries_of: Callable[[int], pa.Table]) -> dict[str, Any]:
    """What the questions of one bucket's users ask for."""
    return {"golds": sorted(people.gold_pairs(entries_of(bucket), rules))}


def _finish_bucket(
    bucket: int, *, rules: Rules, golds: frozenset[int], entries_of: Callable[[int], pa.Table], out: str
) -> dict[str, int]:
    """Write the items and questions of one bucket's users into the corpus; gives the counts."""
    name = _bucket_file(bucket)
    finished = people.finish(entries_of(bucket), rules, golds)
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
