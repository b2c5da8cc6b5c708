"""Image-text shards as they are published, curated: an index of the samples that are worth training on.

    hash evaluation images   what must not be trained on                                a task a file
    scan                     shard -> a row a sample: where it is, hashes, a reason     a task a shard
    spread                   hashes of the samples that passed -> parts                 a task a group of shards
    find duplicates          samples that have an earlier duplicate                     a task a part
    finish                   index of the kept samples, reasons of the others, counts   a task a group of shards
    rewrite                  kept samples -> new tar shards, if that is asked for       a task a new shard

A task holds a sample, the hashes of a group or of a part, or the rows of a shard. What is kept depends on the shards,
in the order of their names, and on the filters; on neither groups, parts nor workers.

The result is an artifact of kind ``image-text-index``:

    shards.parquet        ``SHARDS``
    index/*.arrow         ``INDEX``: an Arrow file of one record batch a shard, to be mapped into memory
    columns.json          of Parquet shards, the columns with the image and the caption
    dropped/*.parquet     ``DROPPED``: of each input shard, the samples that are not kept, and why
    data_card.json, DATA_CARD.md, quarantine.jsonl, decontaminated.jsonl

On retry: every task writes an artifact of its own under a name that depends on the task alone; a killed preparation
goes on after the tasks that are finished.
"""

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from palate import artifacts
from palate import config as configs
from palate.artifacts import Artifact
from palate.config import scale
from palate.corpora import contamination, data_card, image_text
from palate.corpora.caption_filters import (
    BOMB,
    BROKEN,
    COLUMNS,
    CONTAMINATED,
    CORRUPT,
    EQUAL,
    NEAR,
    STATUS,
    ColumnFilters,
    Limits,
    caption_reason,
    in_order,
    size_reason,
    wanted_columns,
)
from palate.corpora.contamination import Evaluation
from palate.corpora.duplicates import (
    TooManyPixels,
    band_values,
    bands,
    earliest_equal,
    earliest_near,
    look_at,
    part_of,
)
from palate.corpora.entries import EXCERPT, ROW_BITS
from palate.corpora.image_text import Columns, Damaged, Found, Shard
from palate.corpora.preparation import PrepareConfig, Runner, Step, run_local, work_folder
from palate.corpora.streams import CorpusError, absolute
from palate.corpora.tar_shards import TarWriter, fetch

IMAGE_TEXT_INDEX = "image-text-index"

SHARDS = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("url", pa.string(), nullable=False),  # absolute path or fsspec URL
        pa.field("format", pa.string(), nullable=False),  # tar, parquet or llava
        pa.field("samples", pa.int64(), nullable=False),  # kept
        pa.field("bytes", pa.int64(), nullable=False),  # of the file
        pa.field("sha256", pa.string(), nullable=False),  # of its content
        pa.field("root", pa.string(), nullable=False),  # llava: what image paths are relative to; else ""
    ]
)
INDEX = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        # Byte ranges inside the shard's file; size -1 where there is no such member.
        *(
            pa.field(f"{member}_{what}", pa.int64(), nullable=False)
            for member in ("image", "text", "json")
            for what in ("offset", "size")
        ),
        pa.field("row", pa.int64(), nullable=False),  # parquet: of the whole file; else -1
        pa.field("length", pa.int32(), nullable=False),  # of the caption, in characters
    ]
)


@dataclass(frozen=True)
class RawSample:
    """A sample as its shard holds it: the encoded image, the caption, and the JSON record (LLaVA's conversations, or
    the tar's key.json)."""

    key: str
    image: bytes
    text: str | None
    record: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig(Limits, PrepareConfig):
    """Image-text shards as published, filtered, without duplicates and evaluation images, indexed."""

    input: tuple[str, ...] = scale()
    """WebDataset .tar, .parquet with image bytes, LLaVA's .json or .jsonl: paths, URLs or patterns such as
    'shards/*.tar'."""
    images: str = ""
    """Folder or URL that image paths of LLaVA records are relative to."""
    image_column: str = ""
    """Of Parquet shards; by default the first known name, such as jpg, image or bytes."""
    caption_column: str = ""
    """Of Parquet shards; by default the first known name, such as caption, TEXT or text."""
    duplicate_distance: int | None = 2
    """Images whose pHashes differ in at most so many of 64 bits are near-duplicates. None: equal files only."""
    evaluation: tuple[str, ...] = scale(())
    """Images that must not be trained on: folders of images, Parquet, VLMEvalKit's TSV."""
    evaluation_distance: int = 4
    """Bits by which the pHash of a sample that is left out may differ from an evaluation image's."""
    rewrite: bool = False
    """Write the kept samples to new tar shards, beside --out, and index those."""
    shard_samples: int = 10_000
    """Samples of a new tar shard."""
    group_samples: int = scale(1_000_000)
    """Samples whose hashes are sorted at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.require_shares(self, "max_quarantined")
        configs.require_at_least(self, 1, "buckets", "shard_samples", "group_samples")
        near = ("duplicate_distance", "evaluation_distance")
        configs.require(
            self, lambda bits: bits is None or 0 <= bits <= MAX_DISTANCE, f"from 0 to {MAX_DISTANCE}", *near
        )
        configs.require(self, bool, "a path, a URL or a pattern", "input")


MAX_DISTANCE = 12  # half of what unrelated images differ by at the least; more would call most images duplicates
WORK = "captions-work"
ROWS = 1024  # of a scan, that are compared with the evaluation images and written at once

_PLACES = INDEX.names[1:-1]
_SAMPLES = pa.schema(  # what a scan finds; a row a sample of the shard, in its order
    [
        *INDEX,
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("image_format", pa.string()),
        pa.field("sha256", pa.binary(32)),  # of the image, or of image and conversations: what duplicates share
        pa.field("hash", pa.uint64()),  # null: conversations, or too plain an image to be told by it
        pa.field("licence", pa.string()),
        pa.field("reason", pa.string()),  # why it is dropped
        pa.field("of", pa.string()),  # the evaluation image that it shows
    ]
)
_EQUAL = pa.schema([pa.field("sha256", pa.binary(32)), pa.field("position", pa.int64())])
_NEAR = pa.schema([pa.field("hash", pa.uint64()), pa.field("position", pa.int64())])
_DUPLICATES = pa.schema([pa.field("position", pa.int64()), pa.field("of", pa.int64())])
DROPPED = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),  # its number in the shard
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("of", pa.string()),  # of a duplicate: "shard:sample" of the first; else the evaluation image
    ]
)


def prepare(config: CaptionsConfig, runner: Runner = run_local) -> Artifact:
    """The index at ``config.out``, made unless it is there.

    Raises:
        CorpusError: the input is not what the command says, or too much of it cannot be used.
        ArtifactMismatch: something else is there.
    """
    config = dataclasses.replace(
        config, out=absolute(config.out), images=absolute(config.images) if config.images else ""
    )
    shards = image_text.expand([absolute(path) for path in config.input], config.images)
    evaluation = contamination.expand([absolute(path) for path in config.evaluation])
    settings = configs.identity(config)
    versions = [(url, image_text.version_of(*artifacts.locate(url))) for url in evaluation]
    identity = {
        **settings,
        "inputs": _digest([(shard.url, shard.version) for shard in shards]),
        "evaluation": _digest(versions),
    }
    if config.fresh:
        _remove_work(config.out)
        _remove_from(rewritten_folder(config.out), 0)
    with artifacts.writing(config.out, kind=IMAGE_TEXT_INDEX, config=identity, fresh=config.fresh) as writer:
        if writer is not None:
            columns = _columns(shards, config)
            tasks = _Tasks(config, settings, identity, shards, columns, evaluation, work_folder(config.out))
            _write(tasks, runner, writer)
    _remove_work(config.out)
    return artifacts.open_artifact(config.out, IMAGE_TEXT_INDEX)


def _digest(files: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Of 20,000 files, what tells whether they are others now: the whole content would take hours to read."""
    text = json.dumps(list(files))
    return {"files": len(files), "names and versions": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _columns(shards: Sequence[Shard], config: CaptionsConfig) -> Columns | None:
    """The columns of Parquet shards; those of the first that can be read."""
    parquet = [shard.url for shard in shards if shard.format == "parquet"]
    for url in parquet:
        try:
            return Columns(
                image_text.image_column(url, config.image_column), image_text.caption_column(url, config.caption_column)
            )
        except Damaged:
            continue
    if parquet:
        raise CorpusError(f"{parquet[0]}, and all other Parquet shards: no Parquet file that can be read")
    return None


def _write(tasks: "_Tasks", runner: Runner, writer: artifacts.Writer) -> None:
    config, shards = tasks.config, tasks.shards
    evaluated = runner(Step("hash evaluation images", tasks.hash_evaluation, range(len(tasks.evaluation))))
    scans = runner(Step("scan", tasks.scan, range(len(shards))))
    _require_usable(tasks, scans)
    groups = _groups([scan["candidates"] for scan in scans], config.group_samples)
    candidates = sum(scan["candidates"] for scan in scans)
    parts = max(min(config.buckets, -(-candidates // LEAST_IN_PART)), -(-candidates // MOST_IN_PART), 1)
    runner(Step("spread hashes", partial(tasks.spread, groups=groups, parts=parts), range(len(groups))))
    runner(Step("find duplicates", partial(tasks.find_duplicates, groups=groups, parts=parts), range(parts)))
    finish = partial(tasks.finish, groups=groups, parts=parts)
    finished = runner(Step("finish", finish, range(len(groups))))
    kept = [count for one in finished for count in one["kept"]]
    if not sum(kept):
        reasons = dict(in_order(_total(one["reasons"] for one in finished)))
        raise CorpusError(f"no sample is left: {reasons}. Loosen the filters, or check the input")
    if config.rewrite:
        rewrite = partial(tasks.rewrite, groups=groups, kept=kept)
        count = -(-sum(kept) // config.shard_samples)
        written = runner(Step("rewrite", rewrite, range(count)))
        table = pa.Table.from_pylist(written, schema=SHARDS)
        _remove_from(rewritten_folder(config.out), count)
    else:
        rows = [
            {
                "shard": number,
                "url": shard.url,
                "format": shard.format,
                "samples": kept[number],
                "bytes": scans[number]["bytes"],
                "sha256": scans[number]["sha256"],
                "root": shard.root,
            }
            for number, shard in enumerate(shards)
        ]
        table = pa.Table.from_pylist(rows, schema=SHARDS)
    publish = partial(tasks.publish, groups=groups, out=writer.url)
    runner(Step("publish", publish, range(len(groups))))
    if config.rewrite:
        runner(Step("publish index", partial(tasks.publish_rewritten, out=writer.url), range(table.num_rows)))
    pq.write_table(table, writer.folder / "shards.parquet")
    writer.write_json("columns.json", dataclasses.asdict(tasks.columns) if tasks.columns and not config.rewrite else {})
    for name in ("quarantine.jsonl", "decontaminated.jsonl"):
        _join_lines(tasks, name, writer.folder / name)
    card = data_card.card(
        settings=tasks.settings,
        shards=[
            {"url": shard.url, "format": shard.format, "kept": count, **{name: scan[name] for name in _OF_SHARD}}
            for shard, scan, count in zip(shards, scans, kept, strict=True)
        ],
        evaluation=[{"url": url, **one} for url, one in zip(tasks.evaluation, evaluated, strict=True)],
        counts={name: _total(one[name] for one in finished) for name in COUNTED},
        columns={role: dict(_total(scan["used"].get(role, {}) for scan in scans)) for role in COLUMNS},
    )
    writer.write_json("data_card.json", card)
    (writer.folder / "DATA_CARD.md").write_text(data_card.markdown(card))
    writer.summary.update(card["summary"])


LEAST_IN_PART, MOST_IN_PART = 50_000, 2_000_000  # samples whose hashes are compared in one task
COUNTED = ("reasons", "sides", "lengths", "image_formats", "licences")
_OF_SHARD = ("bytes", "sha256", "seen", "damage")


def rewritten_folder(out: str) -> str:
    """Where the new shards of the index at ``out`` are, an artifact each."""
    return f"{out.rstrip('/')}.shards"


def _require_usable(tasks: "_Tasks", scans: Sequence[dict[str, Any]]) -> None:
    limit = tasks.config.max_quarantined
    seen = sum(scan["seen"] for scan in scans)
    broken = _total({name: n for name, n in scan["reasons"].items() if name in BROKEN} for scan in scans)
    if broken.total() > limit * seen:
        raise CorpusError(
            f"{broken.total()} of {seen} samples cannot be used, more than --max-quarantined {limit:g}: "
            f"{dict(in_order(broken))}. Check the shards, or raise the limit"
        )
    damaged = [
        f"{shard.url}: {scan['damage']}" for shard, scan in zip(tasks.shards, scans, strict=True) if scan["damage"]
    ]
    if len(damaged) > limit * len(scans):
        raise CorpusError(
            f"{len(damaged)} of {len(scans)} shards are damaged, more than --max-quarantined {limit:g}: "
            f"{'; '.join(damaged[:3])}. Fetch them again, or raise the limit to keep what is whole in them"
        )
    if not seen:
        raise CorpusError(f"{', '.join(shard.url for shard in tasks.shards[:3])}: found no sample")


def _groups(samples: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Ranges of consecutive shards with at most ``most`` samples, or one shard."""
    groups, start, count = [], 0, 0
    for number, size in enumerate(samples):
        if count + size > most and number > start:
            groups.append((start, number))
            start, count = number, 0
        count += size
    return [*groups, (start, len(samples))]


@dataclass(frozen=True)
class _Tasks:
    """What each step does in a task; all of them write an artifact of their own in the work folder."""

    config: CaptionsConfig
    settings: Mapping[str, Any]
    identity: Mapping[str, Any]
    shards: Sequence[Shard]
    columns: Columns | None
    evaluation: Sequence[str]
    work: str

    # A task a file of evaluation images

    def hash_evaluation(self, number: int) -> dict[str, Any]:
        """Hash the images of one file."""
        url = self.evaluation[number]

        def produce(writer: artifacts.Writer) -> None:
            table, broken = contamination.hashes(url, self.config.max_pixels, self.config.max_quarantined)
            pq.write_table(table, writer.folder / "hashes.parquet")
            with image_text.local_file(url) as file:
                digest = image_text.sha256_of(file)
            writer.summary.update(images=table.num_rows, broken=broken, sha256=digest)

        return self._made("evaluation", number, produce, {"url": url}).summary

    # A task a shard

    def scan(self, number: int) -> dict[str, Any]:
        """Read a shard, decode and hash its images."""
        shard = self.shards[number]

        def produce(writer: artifacts.Writer) -> None:
            scan = _Scan(
                self.config, shard, _evaluation(self.work, len(self.evaluation), self.config.evaluation_distance)
            )
            with (
                image_text.local_file(shard.url) as file,
                pq.ParquetWriter(writer.folder / "samples.parquet", _SAMPLES, compression="zstd") as samples,
                (writer.folder / "quarantine.jsonl").open("w") as quarantine,
                (writer.folder / "decontaminated.jsonl").open("w") as decontaminated,
            ):
                for table, broken, contaminated in scan.run(file, self.columns):
                    samples.write_table(table)
                    quarantine.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in broken)
                    decontaminated.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in contaminated)
                writer.summary.update(bytes=file.stat().st_size, sha256=image_text.sha256_of(file), **scan.summary())

        return self._made("scan", number, produce, {"url": shard.url, "version": shard.version}).summary

    # A task a group of shards

    def spread(self, number: int, *, groups: Sequence[tuple[int, int]], parts: int) -> dict[str, Any]:
        """Spread the hashes of the samples that passed the filters over parts, a record batch a part."""
        distance = self.config.duplicate_distance

        def produce(writer: artifacts.Writer) -> None:
            tables = [_positioned(self._scanned(shard), shard) for shard in range(*groups[number])]
            table = pa.concat_tables(tables)
            where = part_of(_words(table)[:, 0], parts)
            _write_parts(writer.folder / "equal.arrow", table.select(_EQUAL.names), where, parts)
            if distance is not None:
                told = table.filter(pc.is_valid(table["hash"])).select(_NEAR.names)
                hashes = told["hash"].to_numpy()
                for index, band in enumerate(bands(distance)):
                    where = part_of(band_values(hashes, band), parts)
                    _write_parts(writer.folder / f"near-{index}.arrow", told, where, parts)

        return self._made("spread", number, produce, {"group": groups[number], "parts": parts}).summary

    # A task a part of the hashes

    def find_duplicates(self, part: int, *, groups: Sequence[tuple[int, int]], parts: int) -> dict[str, Any]:
        """Find the samples of a part that have an earlier duplicate; a record batch a group of shards."""
        distance = self.config.duplicate_distance
        spread = [] if distance is None else bands(distance)
        ends = np.array([end for _, end in groups])

        def read(name: str) -> pa.Table:
            opened = (self._open("spread", group) for group in range(len(groups)))
            return pa.Table.from_batches([_read_part(one.local(name), part) for one in opened])

        def write(writer: artifacts.Writer, name: str, positions: np.ndarray, first: np.ndarray) -> None:
            later = first < positions
            found = pa.table([positions[later], first[later]], schema=_DUPLICATES)
            group = np.searchsorted(ends, positions[later] >> ROW_BITS, side="right")
            _write_parts(writer.folder / name, found, group, len(groups))

        def produce(writer: artifacts.Writer) -> None:
            table = read("equal.arrow")
            positions = table["position"].to_numpy()
            write(writer, "equal.arrow", positions, earliest_equal(_words(table), positions))
            for index, band in enumerate(spread):
                table = read(f"near-{index}.arrow")
                positions = table["position"].to_numpy()
                assert distance is not None
                first = earliest_near(table["hash"].to_numpy(), positions, distance, band)
                write(writer, f"near-{index}.arrow", positions, first)

        return self._made("duplicates", part, produce, {"groups": groups, "parts": parts}).summary

    # A task a group of shards

    def finish(self, number: int, *, groups: Sequence[tuple[int, int]], parts: int) -> dict[str, Any]:
        """Write the index of each shard of a group, and why its other samples are dropped; gives the counts."""

        def produce(writer: artifacts.Writer) -> None:
            equal, near = dict[int, int](), dict[int, int]()
            for part in range(parts):
                made = self._open("duplicates", part)
                for name in made.paths():
                    batch = _read_part(made.local(name), number)
                    found = equal if name == "equal.arrow" else near
                    for position, first in zip(batch["position"].to_pylist(), batch["of"].to_pylist(), strict=True):
                        found[position] = min(first, found.get(position, first))
            kept, counts = list[int](), {name: Counter[str]() for name in COUNTED}
            for shard in range(*groups[number]):
                table = _with_duplicates(self._scanned(shard), shard, equal, near)
                good = table.filter(pc.is_null(table["reason"]))
                _write_parts(
                    writer.folder / f"{shard:05d}.arrow",
                    good.select(INDEX.names),
                    np.zeros(len(good), np.int64),
                    1,
                    INDEX,
                )
                dropped = table.filter(pc.is_valid(table["reason"])).select(DROPPED.names).cast(DROPPED)
                pq.write_table(dropped, writer.folder / f"{shard:05d}.parquet", compression="zstd")
                kept.append(len(good))
                counts["reasons"].update(dropped["reason"].to_pylist())
                sides = pc.min_element_wise(good["width"], good["height"]).to_pylist()
                counts["sides"].update(map(data_card.bin_of, sides))
                counts["lengths"].update(map(data_card.bin_of, good["length"].to_pylist()))
                counts["image_formats"].update(good["image_format"].to_pylist())
                counts["licences"].update(data_card.most(Counter(good["licence"].drop_null().to_pylist())))
            writer.summary.update(kept=kept, **counts)

        settings = {"group": groups[number], "groups": groups, "parts": parts}
        return self._made("finish", number, produce, settings).summary

    # A task a new shard

    def rewrite(self, number: int, *, groups: Sequence[tuple[int, int]], kept: Sequence[int]) -> dict[str, Any]:
        """Write one new tar shard; gives its row of ``SHARDS``."""
        size = self.config.shard_samples

        def produce(writer: artifacts.Writer) -> None:
            ends = np.cumsum(kept)
            low, high = number * size, min((number + 1) * size, int(ends[-1]))
            index, origins = list[dict[str, Any]](), list[dict[str, str]]()
            path = writer.folder / f"{number:05d}.tar"
            with path.open("wb") as stream, TarWriter(stream) as tar:
                for shard in range(int(np.searchsorted(ends, low, side="right")), len(kept)):
                    before = int(ends[shard]) - kept[shard]
                    if before >= high:
                        break
                    group = next(place for place, (start, end) in enumerate(groups) if start <= shard < end)
                    chosen = slice(max(low - before, 0), min(high - before, kept[shard]))
                    places = _read_part(self._open("finish", group).local(f"{shard:05d}.arrow"), 0)[chosen].to_pylist()
                    with image_text.local_file(self.shards[shard].url) as file:
                        for place, parts in zip(
                            places, fetch(self.shards[shard], file, places, self.columns), strict=True
                        ):
                            key = f"{low + len(index):09d}"
                            index.append({**place, "key": key, "row": -1, **tar.add(key, parts)})
                            origins.append({"key": key, "url": self.shards[shard].url, "source_key": place["key"]})
            _write_parts(
                writer.folder / "index.arrow",
                pa.Table.from_pylist(index, schema=INDEX),
                np.zeros(len(index), np.int64),
                1,
                INDEX,
            )
            pq.write_table(pa.Table.from_pylist(origins), writer.folder / "origin.parquet", compression="zstd")

        made = _made(artifacts.join(rewritten_folder(self.config.out), f"{number:05d}"), produce, dict(self.identity))
        entry = next(file for file in made.files if file.path.endswith(".tar"))
        return {
            "shard": number,
            "url": artifacts.join(made.url, entry.path),
            "format": "tar",
            "samples": _read_part(made.local("index.arrow"), 0).num_rows,
            "bytes": entry.size,
            "sha256": entry.sha256,
            "root": "",
        }

    def publish(self, number: int, *, groups: Sequence[tuple[int, int]], out: str) -> dict[str, Any]:
        """Copy what ``finish`` wrote into the result."""
        made = self._open("finish", number)
        for shard in range(*groups[number]):
            _copy(made.local(f"{shard:05d}.parquet"), artifacts.join(out, "dropped", f"{shard:05d}.parquet"))
            if not self.config.rewrite:
                _copy(made.local(f"{shard:05d}.arrow"), artifacts.join(out, "index", f"{shard:05d}.arrow"))
        return {}

    def publish_rewritten(self, number: int, *, out: str) -> dict[str, Any]:
        """Copy the index of a new shard into the result."""
        made = artifacts.open_artifact(artifacts.join(rewritten_folder(self.config.out), f"{number:05d}"))
        _copy(made.local("index.arrow"), artifacts.join(out, "index", f"{number:05d}.arrow"))
        return {}

    def _made(
        self, step: str, number: int, produce: Callable[[artifacts.Writer], None], settings: Mapping[str, Any]
    ) -> Artifact:
        # A scan does not depend on the other shards, so one that is there is used when shards are added.
        identity = self.settings if step in ("scan", "evaluation") else self.identity
        if step == "scan":
            identity = {**identity, "evaluation": self.identity["evaluation"]}
        return _made(_url(self.work, step, number), produce, {**identity, "task": dict(settings)})

    def _open(self, step: str, number: int) -> Artifact:
        return artifacts.open_artifact(_url(self.work, step, number), WORK)

    def _scanned(self, shard: int) -> pa.Table:
        return pq.read_table(self._open("scan", shard).local("samples.parquet"), schema=_SAMPLES)


class _Scan:
    """Looks at the samples of one shard, and counts."""

    def __init__(self, config: CaptionsConfig, shard: Shard, evaluation: Evaluation | None) -> None:
        self._config, self._shard, self._evaluation = config, shard, evaluation
        self._filters = ColumnFilters(config, shard.url)
        self._reasons: Counter[str] = Counter()
        self._seen = 0
        self._damage = ""

    def run(
        self, file: Path, columns: Columns | None
    ) -> Iterator[tuple[pa.Table, list[dict[str, Any]], list[dict[str, Any]]]]:
        """Tables of ``_SAMPLES``, with records of the broken samples and of those that show evaluation images.

        Raises:
            CorpusError: a filter's column is not there, or most samples are broken.
        """
        rows: list[dict[str, Any]] = []
        broken: list[dict[str, Any]] = []
        wanted = wanted_columns(self._config)
        if columns is not None and self._config.rewrite:
            # New shards have a Parquet row's other columns in the record, where training would find them.
            wanted += [name for name in image_text.LEARNED if name not in (columns.image, columns.caption)]
        samples = image_text.read(self._shard, file, columns, wanted)
        while True:
            try:
                found = next(samples, None)
            except Damaged as damage:
                self._damage, found = str(damage), None
                broken.append(self._record(None, None, DAMAGED, self._damage))
            if found is not None:
                row, detail = self._row(found)
                if row["reason"] in BROKEN:
                    broken.append(self._record(self._seen, found.key, row["reason"], detail))
                rows.append(row)
                self._seen += 1
            if len(rows) >= ROWS or found is None:
                contaminated = self._decontaminate(rows)
                self._reasons.update(row["reason"] for row in rows if row["reason"])
                self._require_usable()
                yield pa.Table.from_pylist(rows, schema=_SAMPLES), broken, contaminated
                rows, broken = [], []
            if found is None:
                break
        self._filters.finish()

    def summary(self) -> dict[str, Any]:
        used = {role: dict(names) for role, names in self._filters.used.items() if names}
        candidates = self._seen - self._reasons.total()
        counts = {"seen": self._seen, "candidates": candidates, "reasons": dict(self._reasons)}
        return {**counts, "damage": self._damage, "used": used}

    def _row(self, found: Found) -> tuple[dict[str, Any], str]:
        """The row of a sample, with the image's own ``image_sha256`` and ``image_hash``, and what is wrong in words."""
        licence = self._filters.value(found.columns, "licence")
        row = {
            **dict.fromkeys(_SAMPLES.names),
            **dict.fromkeys(_PLACES, -1),
            **found.place,
            "key": found.key,
            "length": found.length,
            "licence": None if licence is None else image_text.storable(str(licence)),
        }
        row["reason"], detail = self._unlooked(found), found.detail
        if row["reason"] is None:
            try:
                look = look_at(found.image, self._config.max_pixels)
            except ValueError as error:
                row["reason"], detail = BOMB if isinstance(error, TooManyPixels) else CORRUPT, str(error)
            else:
                row.update(width=look.width, height=look.height, image_format=look.format)
                digest = hashlib.sha256(found.image).digest()
                row.update(image_sha256=digest, image_hash=look.hash, sha256=digest, hash=look.hash)
                if found.said is not None:  # one image has several conversations: only equal ones are duplicates
                    row.update(sha256=hashlib.sha256(digest + found.said).digest(), hash=None)
                row["reason"] = size_reason(self._config, look.width, look.height)
        return row, detail

    def _unlooked(self, found: Found) -> str | None:
        """Why a sample is dropped before its image is decoded."""
        if self._filters.failed_status(found.columns):
            return STATUS
        if found.reason is not None:
            return found.reason
        return self._filters.reason(found.columns) or caption_reason(self._config, found.length)

    def _decontaminate(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        good = [row for row in rows if row["reason"] is None]
        if self._evaluation is None or not good:
            return []
        matches = self._evaluation.matches([row["image_sha256"] for row in good], [row["image_hash"] for row in good])
        shown = []
        for row, match in zip(good, matches, strict=True):
            if match is not None:
                row["reason"], row["of"] = CONTAMINATED, match
                shown.append({"url": self._shard.url, "key": row["key"], "evaluation": match})
        return shown

    def _record(self, number: int | None, key: str | None, reason: str, found: str) -> dict[str, Any]:
        excerpt = image_text.storable(found[:EXCERPT])
        return {"input": self._shard.url, "record": number, "key": key, "reason": reason, "found": excerpt}

    def _require_usable(self) -> None:
        broken = Counter({name: count for name, count in self._reasons.items() if name in BROKEN})
        # Not at the end of hours: most of the first samples say enough.
        if self._config.max_quarantined < 0.5 and broken.total() > max(100, self._seen / 2):
            raise CorpusError(
                f"{self._shard.url}: most of the first {self._seen} samples cannot be used "
                f"({dict(in_order(broken))}): check that the file and the command belong together"
            )


DAMAGED = "the rest of the shard cannot be read"


@lru_cache(maxsize=1)
def _evaluation(work: str, files: int, distance: int) -> Evaluation | None:
    """The hashes of the evaluation images, read once a process."""
    if not files:
        return None
    opened = (artifacts.open_artifact(_url(work, "evaluation", number)) for number in range(files))
    return Evaluation.of(pa.concat_tables([pq.read_table(one.local("hashes.parquet")) for one in opened]), distance)


def _positioned(table: pa.Table, shard: int) -> pa.Table:
    """The samples that passed the filters, with their positions among all."""
    positions = (np.int64(shard) << ROW_BITS) + np.arange(len(table), dtype=np.int64)
    return table.append_column("position", pa.array(positions)).filter(pc.is_null(table["reason"]))


def _words(table: pa.Table) -> np.ndarray:
    """The digests of a table, (N, 4) uint64."""
    return np.frombuffer(b"".join(table["sha256"].to_pylist()), dtype=np.uint64).reshape(-1, 4)


def _with_duplicates(table: pa.Table, shard: int, equal: Mapping[int, int], near: Mapping[int, int]) -> pa.Table:
    """The samples with the reason ``EQUAL`` or ``NEAR`` where there is an earlier one, and numbered."""
    reasons, of = table["reason"].to_pylist(), table["of"].to_pylist()
    for row in range(len(table)):
        position = (shard << ROW_BITS) + row
        for reason, found in ((EQUAL, equal), (NEAR, near)):
            if reasons[row] is None and position in found:
                first = found[position]
                reasons[row], of[row] = reason, f"{first >> ROW_BITS}:{first & ((1 << ROW_BITS) - 1)}"
    table = table.drop_columns(["reason", "of"])
    for name, values in (("reason", reasons), ("of", of)):
        table = table.append_column(name, pa.array(values, pa.string()))
    return table.append_column("sample", pa.array(np.arange(len(table), dtype=np.int64)))


def _write_parts(path: Path, table: pa.Table, where: np.ndarray, parts: int, schema: pa.Schema | None = None) -> None:
    """Write an Arrow file whose record batch p has the rows with ``where`` p, in their order."""
    order = np.argsort(where, kind="stable")
    ends = np.searchsorted(where[order], np.arange(parts), side="right")
    sorted_table = table.take(pa.array(order)).cast(schema or table.schema)
    with pa.ipc.new_file(str(path), sorted_table.schema) as file:
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            batches = sorted_table.slice(start, end - start).combine_chunks().to_batches()
            file.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema=sorted_table.schema))


def _read_part(path: Path, part: int) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).get_batch(part)


def _join_lines(tasks: _Tasks, name: str, path: Path) -> None:
    with path.open("wb") as target:
        for shard in range(len(tasks.shards)):
            with artifacts.open_artifact(_url(tasks.work, "scan", shard)).local(name).open("rb") as source:
                shutil.copyfileobj(source, target)


def _copy(source: Path, url: str) -> None:
    filesystem, path = artifacts.locate(url)
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    with source.open("rb") as stream, filesystem.open(path, "wb") as target:
        shutil.copyfileobj(stream, target)


def _total(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total = Counter[str]()
    for one in counts:
        total.update(one)
    return total


def _url(work: str, step: str, number: int) -> str:
    return artifacts.join(work, step, f"{number:05d}")


def _made(url: str, produce: Callable[[artifacts.Writer], None], config: dict[str, Any]) -> Artifact:
    """The step's artifact, made unless it is there; what another preparation left there is discarded."""
    try:
        return artifacts.ensure(url, produce, kind=WORK, config=config)
    except artifacts.ArtifactMismatch:
        return artifacts.ensure(url, produce, kind=WORK, config=config, fresh=True)


def _remove_work(out: str) -> None:
    for step in artifacts.folders(work_folder(out)):
        _remove_from(step, 0)
    _remove_folder(work_folder(out))


def _remove_from(url: str, first: int) -> None:
    """Remove the numbered artifacts in a folder from number ``first`` on, and the folder when it is empty."""
    for folder in artifacts.folders(url):
        name = folder.rpartition("/")[2]
        if name.isdecimal() and int(name) >= first:
            artifacts.discard(folder)
            _remove_folder(folder)
    if not first:
        _remove_folder(url)


def _remove_folder(url: str) -> None:
    """Remove an empty folder; object stores have none."""
    filesystem, root = artifacts.locate(url)
    if artifacts.is_local(filesystem) and filesystem.exists(root) and not filesystem.ls(root):
        filesystem.rmdir(root)
