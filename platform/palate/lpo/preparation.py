"""From people's comparisons of images to ranked lists on disk, by a plain loop or Ray Data with the same result.

    read     unit of input -> its annotations by bucket of groups, links, images by bucket of uids    a task a unit
    link     captions and images that hang together -> splits                                          the driver
    finish   bucket of groups -> lists, ties, what became of every annotation                          a task a bucket
    images   bucket of uids -> the images of the lists, each once                                      a task a bucket

A group is a caption, or a caption and a user (and the edited image and instruction where there are any). Buckets are
ranges of hashes and rows inside are sorted, so the lists, and their order, depend on neither the number of buckets nor
how the input is cut. The driver holds the hashed links, 24 bytes each; a task holds a chunk or a bucket.

On retry: as in ``palate.corpora.preparation``. Images are on the disk twice until the work folder is removed.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from palate import artifacts
from palate import config as configs
from palate.config import scale
from palate.corpora import pictures, rankings
from palate.corpora.entries import ROW_BITS
from palate.corpora.preparation import PrepareConfig, Runner, Step, run_local, work_folder
from palate.corpora.rankings import ANNOTATIONS, DROPPED, FORMATS, FormatName, Unit
from palate.corpora.schema import IMAGES, LISTS, RANKED_LISTS
from palate.corpora.splits import MANY_CAPTIONS, SPLITS, Components, Hashes, combine, components, hash64, mix
from palate.corpora.streams import CorpusError, absolute, sha256_of
from palate.lpo import lists
from palate.lpo.lists import Built, Rules, Votes

log = logging.getLogger(__name__)

WORK = "ranking-work"
EXAMPLES = "examples"  # the split of lists that show a person's taste
IMAGE_CHUNK = 64 << 20  # bytes of images that a task gathers before it writes
IMAGE_ROWS = 64  # of a row group

TIES = pa.schema(
    [
        pa.field("caption", pa.string(), nullable=False),
        pa.field("user_id", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("first", pa.string(), nullable=False),
        pa.field("second", pa.string(), nullable=False),
        pa.field("source_ids", pa.list_(pa.string()), nullable=False),
    ]
)
_KEYED = pa.schema([*ANNOTATIONS, pa.field("group", pa.uint64()), pa.field("caption_hash", pa.uint64())])
_LINKS = pa.schema([pa.field(name, pa.uint64()) for name in ("caption", "image")] + [pa.field("count", pa.int64())])
_SPLITS = pa.schema([pa.field("caption", pa.uint64()), pa.field("split", pa.int8())])


@dataclass(frozen=True, kw_only=True)
class ListsConfig(PrepareConfig):
    """How comparisons become lists, wherever they come from."""

    group_by: Literal["caption", "caption-user"] = "caption"
    """Whose votes are one graph: all people's on a caption, or each person's."""
    kind: Literal["auto", "full", "topk", "dominance"] = "auto"
    """full: paths. topk: an image over all that lost to it. dominance: the graph itself. auto: by format."""
    cycles: Literal["break", "collapse"] = "break"
    """Remove the least supported edges of a cycle, or make its images one tie group."""
    ties: Literal["auto", "table", "group"] = "auto"
    """Images that drew: only in the table of ties, or also a tie group in lists. auto: by format."""
    max_length: int = 8
    """Images of a list."""
    validation: float = 0.05
    """Share of components (captions and images that hang together) in the validation split."""
    test: float = 0.05
    """Share of components in the test split."""
    examples: float = 0.0
    """Share of each person's training lists that become examples of their taste instead (split `examples`)."""
    held_out_people: float = 0.0
    """Share of people whom no training list is of: these become examples of their taste, too."""
    split_seed: int = 0
    max_component: float = 0.5
    """Stop when captions that hang together hold a larger share of all annotations: no split would be left."""


@dataclass(frozen=True, kw_only=True)
class RankingsConfig(ListsConfig):
    """People's comparisons, ratings or rankings of images, made into ranked lists."""

    input: tuple[str, ...] = scale()
    """Files, patterns such as 'pickapic/*.parquet', or folders."""
    format: FormatName | Literal["auto"] = "auto"
    """auto tells it from the fields of the first record."""
    margin: float = 0.0
    """Scores that differ by at most this are a tie."""
    images: pictures.Mode = "reference"
    """Files of images stay where they are, are copied into the result, or are not looked at, nor images in records."""
    image_root: str = ""
    """Folder under which an image's uid is its path. Without it only images inside records, or folders, are found."""


@dataclass(frozen=True)
class Settings:
    """What the tasks need to know; all of it decides the result."""

    format: FormatName
    rules: Rules
    group_by: Literal["caption", "caption-user"]
    margin: float
    images: pictures.Mode
    image_root: str
    buckets: int
    examples: float
    held_out_people: float
    split_seed: int


def prepare(config: RankingsConfig, runner: Runner = run_local) -> artifacts.Artifact:
    """The ranked lists at ``config.out``, made unless they are there.

    Raises:
        CorpusError: the input is not what the command says, or too much of it cannot be used.
        ArtifactMismatch: something else is there.
    """
    _check(config)
    paths = rankings.expand([absolute(path) for path in config.input], config.format == "folders")
    inputs = {f"input {number}": _digest(path) for number, path in enumerate(paths)}
    identity = {**configs.identity(config), "inputs": inputs}
    config = dataclasses.replace(config, out=absolute(config.out))
    if config.fresh:
        _remove_work(config.out)
    with artifacts.writing(config.out, kind=RANKED_LISTS, config=identity, fresh=config.fresh) as writer:
        if writer is not None:
            units = rankings.units(paths, images=config.images != "skip")
            _Preparation(config, _settings(config, paths), units, paths, identity, runner).write(writer)
    _remove_work(config.out)
    return artifacts.open_artifact(config.out, RANKED_LISTS)


def _check(config: RankingsConfig) -> None:
    if not config.input:
        raise CorpusError("--input: no file is given")
    for name in ("max_quarantined", "max_component", "validation", "test", "examples", "held_out_people"):
        if not 0 <= getattr(config, name) <= 1:  # NaN, too
            raise CorpusError(f"--{name.replace('_', '-')} is a share from 0 to 1, got {getattr(config, name)}")
    if config.validation + config.test >= 1:
        raise CorpusError("--validation and --test together leave nothing to train on")
    if (config.examples or config.held_out_people) and config.group_by != "caption-user":
        raise CorpusError("--examples and --held-out-people are about single people: add --group-by caption-user")
    if config.max_length < 2:
        raise CorpusError(f"--max-length is at least 2, got {config.max_length}")
    if not config.margin >= 0:
        raise CorpusError(f"--margin is at least 0, got {config.margin}")
    if config.buckets < 1:
        raise CorpusError(f"--buckets is at least 1, got {config.buckets}")


def _settings(config: RankingsConfig, paths: Sequence[str]) -> Settings:
    name = rankings.detect(paths[0]) if config.format == "auto" else config.format
    known = FORMATS[name]
    rules = Rules(
        kind=known.kind if config.kind == "auto" else config.kind,
        cycles=config.cycles,
        ties=known.ties if config.ties == "auto" else config.ties,
        max_length=config.max_length,
    )
    root = absolute(config.image_root) if config.image_root else ""
    people = (config.examples, config.held_out_people, config.split_seed)
    return Settings(name, rules, config.group_by, config.margin, config.images, root, config.buckets, *people)


def _digest(path: str) -> str:
    filesystem, inside = artifacts.locate(path)
    if not filesystem.isdir(inside):
        return sha256_of(path)
    found = sorted(
        (name.removeprefix(inside), info["size"]) for name, info in filesystem.find(inside, detail=True).items()
    )
    return f"{hash64(pa.array([json.dumps(found)]), 'folder')[0]:016x}"


@dataclass(frozen=True)
class _Preparation:
    config: RankingsConfig
    settings: Settings
    units: Sequence[Unit]
    paths: Sequence[str]
    identity: Mapping[str, Any]
    runner: Runner

    def write(self, writer: artifacts.Writer) -> None:
        config, settings = self.config, self.settings
        work = work_folder(config.out)
        read = partial(_read_unit, units=self.units, settings=settings, work=work, identity=self.identity)
        read_units = self.runner(Step("read", read, range(len(self.units))))
        reasons = _total(one["reasons"] for one in read_units)
        records, usable = (sum(one[name] for one in read_units) for name in ("records", "usable"))
        self._require_usable(reasons, usable)
        linked = self._linked(work)
        splits = self._splits(work, linked)
        buckets = sorted({bucket for one in read_units for bucket in one["buckets"]})
        sources = [_unit_url(work, index) for index in range(len(self.units))]
        finish = partial(_finish_bucket, settings=settings, sources=sources, splits=splits, out=writer.url)
        counts = _total(self.runner(Step("finish", finish, buckets)))
        if not counts["lists"]:
            raise CorpusError(f"no list is left: {_readable(reasons + counts)}. Check the input")
        image_buckets = sorted({bucket for one in read_units for bucket in one["image_buckets"]})
        collect = partial(_finish_images, sources=sources, out=writer.url)
        images = _total(self.runner(Step("images", collect, image_buckets)) if image_buckets else [])
        if not images["images"] and settings.images != "skip":
            log.warning(
                "no image was found, so nothing can be tuned on these lists: the input holds none, and %s",
                f"none is under --image-root {config.image_root}" if config.image_root else "--image-root is not given",
            )
        self._write_quarantine(writer, sources)
        report = self._report(records, reasons, counts, images, linked)
        writer.write_json("report.json", report)
        writer.summary.update(report)

    def _require_usable(self, reasons: Counter[str], usable: int) -> None:
        broken = Counter({reason: count for reason, count in reasons.items() if reason not in DROPPED})
        total = sum(reasons.values()) + usable
        if broken.total() > self.config.max_quarantined * total:
            raise CorpusError(
                f"{broken.total()} of {total} annotations cannot be used, more than --max-quarantined "
                f"{self.config.max_quarantined:g}: {_readable(broken)}. Check the file, or raise the limit"
            )
        if not usable:
            raise CorpusError(
                f"{', '.join(self.paths[:3])}: found no usable annotation; left out: {_readable(reasons)}"
            )

    def _linked(self, work: str) -> Components:
        files = (
            artifacts.open_artifact(_unit_url(work, index)).local("links.parquet") for index in range(len(self.units))
        )
        links = pa.concat_tables([pq.read_table(file) for file in files])
        caption, image, count = (links[name].to_numpy() for name in ("caption", "image", "count"))
        found = components(caption, image, count)
        if found.largest_share > self.config.max_component and len(found.captions) >= MANY_CAPTIONS:
            raise CorpusError(
                f"{found.largest_share:.0%} of the annotations hang together by captions that share images, more than "
                f"--max-component {self.config.max_component:g}: a split by caption and image would be lopsided. The "
                f"images that join the most captions: {', '.join(self._uids(work, found.linking_images))}. Remove "
                "them, or raise --max-component"
            )
        return found

    def _uids(self, work: str, hashes: Hashes) -> list[str]:
        """The uids of hashed images, in their order."""
        names: dict[int, str] = {}
        for index in range(len(self.units)):
            unit = artifacts.open_artifact(_unit_url(work, index))
            for path in unit.paths("annotations-"):
                table = pq.read_table(unit.local(path), columns=["winner", "loser", "source_image"])
                for name in table.column_names:
                    unique = table[name].drop_null().unique()
                    known = hash64(unique, "image")
                    for place in np.nonzero(np.isin(known, hashes))[0]:
                        names[int(known[place])] = unique[int(place)].as_py()
        return [repr(names[int(one)]) for one in hashes if int(one) in names]

    def _splits(self, work: str, linked: Components) -> str:
        """URL of the artifact that holds the split of every caption."""
        config = self.config
        table = pa.table(
            [linked.captions, linked.splits(config.validation, config.test, config.split_seed)], schema=_SPLITS
        )

        def produce(writer: artifacts.Writer) -> None:
            pq.write_table(table, writer.folder / "splits.parquet")

        url = artifacts.join(work, "splits", "00000")
        artifacts.ensure(url, produce, kind=WORK, config=dict(self.identity), fresh=True)
        return url

    def _write_quarantine(self, writer: artifacts.Writer, sources: Sequence[str]) -> None:
        with (writer.folder / "quarantine.jsonl").open("w") as stream:
            for source in sources:
                for line in artifacts.open_artifact(source).local("quarantine.jsonl").read_text().splitlines():
                    one = json.loads(line)
                    row = one.pop("row")
                    where = {"input": self.paths[row >> ROW_BITS], "record": row & ((1 << ROW_BITS) - 1)}
                    stream.write(json.dumps({**where, **one}, ensure_ascii=False) + "\n")

    def _report(
        self, records: int, reasons: Counter[str], counts: Counter[str], images: Counter[str], linked: Components
    ) -> dict[str, Any]:
        def part(prefix: str) -> dict[str, int]:
            return {
                name.removeprefix(prefix): count for name, count in sorted(counts.items()) if name.startswith(prefix)
            }

        fates = Counter(part("fate "))
        kept, tied = fates.pop("kept", 0), fates.pop("tied", 0)
        dropped = {reason: count for reason, count in (reasons + fates).items() if reason in DROPPED | fates.keys()}
        quarantined = {reason: count for reason, count in reasons.items() if reason not in DROPPED}
        lengths = {int(length): count for length, count in part("length ").items()}
        won = kept + sum(fates[name] for name in (lists.FATES[lists.OUTVOTED], lists.FATES[lists.CYCLE]))
        return {
            "format": self.settings.format,
            "kind": self.settings.rules.kind,
            "records": records,
            "annotations": kept + tied + sum(dropped.values()) + sum(quarantined.values()),
            "kept": kept,
            "tied": tied,
            "dropped": sum(dropped.values()),
            "dropped_by_reason": dict(sorted(dropped.items())),
            "quarantined": sum(quarantined.values()),
            "quarantined_by_reason": dict(sorted(quarantined.items())),
            "kept_in_lists_longer_than_2": counts["kept in long lists"],
            "share_in_lists_longer_than_2": round(counts["kept in long lists"] / won, 4) if won else 0.0,
            "lists": counts["lists"],
            "lists_by_length": {str(length): lengths[length] for length in sorted(lengths)},
            "lists_by_split": {name: counts[f"split {name}"] for name in (*SPLITS, EXAMPLES)},
            "groups": counts["groups"],
            "cycles": counts["cycles"],
            "images_in_cycles": counts["images in cycles"],
            "tied_pairs": counts["tied pairs"],
            "images": images["images"],
            "captions": len(linked.captions),
            "components": linked.count,
            "largest_component_share": round(linked.largest_share, 4),
        }


def _total(counts: Any) -> Counter[str]:
    return sum((Counter(one) for one in counts), Counter[str]())


def _readable(counts: Counter[str]) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(4)) or "nothing"


# Reading


def _read_unit(
    index: int, *, units: Sequence[Unit], settings: Settings, work: str, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Read one unit into the work folder; gives counts of annotations and of reasons."""
    unit = units[index]

    def produce(writer: artifacts.Writer) -> None:
        with ExitStack() as stack:
            reading = _Reading(settings, writer, stack)
            root = unit.path if settings.format == "folders" else settings.image_root
            gallery = pictures.Gallery(root, settings.images)
            for found in FORMATS[settings.format].read(unit):
                reading.take(gallery.inspect(found))
                if gallery.held > IMAGE_CHUNK:
                    reading.take_images(gallery.take())
            reading.take_images(gallery.take())
            reading.finish()
        writer.summary.update(reading.summary())

    config = {**identity, "unit": dataclasses.asdict(unit), "settings": dataclasses.asdict(settings)}
    url = _unit_url(work, index)
    try:
        return artifacts.ensure(url, produce, kind=WORK, config=config).summary
    except artifacts.ArtifactMismatch:  # of another preparation, that was stopped
        return artifacts.ensure(url, produce, kind=WORK, config=config, fresh=True).summary


class _Reading:
    """What one unit leaves in the work folder."""

    def __init__(self, settings: Settings, writer: artifacts.Writer, stack: ExitStack) -> None:
        self._settings, self._writer, self._stack = settings, writer, stack
        self._files: dict[str, pq.ParquetWriter] = {}
        self._links: list[pa.Table] = []
        self._quarantine = stack.enter_context((writer.folder / "quarantine.jsonl").open("w"))
        self._reasons: Counter[str] = Counter()
        self._usable = 0
        self._records, self._last = 0, -1
        self._buckets: dict[str, set[int]] = {"annotations": set(), "images": set()}

    def take(self, table: pa.Table) -> None:
        rows = table["row"].to_numpy()
        # Records come in order; one may give several rows.
        fresh = np.unique(rows)
        self._records += int((fresh > self._last).sum())
        self._last = max(self._last, int(fresh[-1])) if len(fresh) else self._last
        if self._settings.group_by == "caption-user":
            nameless = pc.and_(pc.is_null(table["reason"]), pc.is_null(table["user_id"]))
            reason = pc.if_else(nameless, "no user id", table["reason"])
            table = table.set_column(table.schema.get_field_index("reason"), ANNOTATIONS.field("reason"), reason)
        self._leave_out(table.filter(pc.is_valid(table["reason"])))
        table = table.filter(pc.is_null(table["reason"]))
        self._usable += table.num_rows
        if not table.num_rows:
            return
        caption, group = keys(table, self._settings.group_by)
        self._link(table, caption)
        keyed = table.append_column(_KEYED.field("group"), pa.array(group))
        keyed = keyed.append_column(_KEYED.field("caption_hash"), pa.array(caption))
        self._spread("annotations", keyed.replace_schema_metadata(None), group, _KEYED)

    def take_images(self, table: pa.Table) -> None:
        if table.num_rows:
            self._spread("images", table, hash64(table["image_uid"], "image"), pictures.COLLECTED)

    def finish(self) -> None:
        links = pa.concat_tables(self._links) if self._links else _LINKS.empty_table()
        links = links.group_by(["caption", "image"]).aggregate([("count", "sum")]).rename_columns(_LINKS.names)
        pq.write_table(links.cast(_LINKS), self._writer.folder / "links.parquet")

    def summary(self) -> dict[str, Any]:
        return {
            "records": self._records,
            "usable": self._usable,
            "reasons": dict(sorted(self._reasons.items())),
            "buckets": sorted(self._buckets["annotations"]),
            "image_buckets": sorted(self._buckets["images"]),
        }

    def _leave_out(self, table: pa.Table) -> None:
        shown = table.select(["row", "place", "caption", "winner", "loser", "reason"])
        self._reasons.update(shown["reason"].to_pylist())
        broken = shown.filter(pc.invert(pc.is_in(shown["reason"], pa.array(sorted(DROPPED)))))
        for one in broken.to_pylist():
            one["caption"] = (one["caption"] or "")[:60]
            self._quarantine.write(json.dumps(one, ensure_ascii=False) + "\n")

    def _link(self, table: pa.Table, caption: Hashes) -> None:
        ends = [(caption, table["winner"])]
        for name in ("loser", "source_image"):
            there = pc.is_valid(table[name])
            ends.append((caption[there.to_numpy(zero_copy_only=False)], table[name].filter(there)))
        captions = np.concatenate([one for one, _ in ends])
        images = np.concatenate([hash64(uids, "image") for _, uids in ends])
        links = pa.table([captions, images, np.ones(len(captions), np.int64)], schema=_LINKS)
        counted = links.group_by(["caption", "image"]).aggregate([("count", "sum")])
        self._links.append(counted.rename_columns(_LINKS.names).cast(_LINKS))

    def _spread(self, kind: str, table: pa.Table, hashes: Hashes, schema: pa.Schema) -> None:
        """Append each row to the file of its bucket, a range of hashes."""
        buckets = bucket_of(hashes, self._settings.buckets)
        order = np.argsort(buckets, kind="stable")
        numbers, starts = np.unique(buckets[order], return_index=True)
        table = table.take(pa.array(order))
        for number, start, stop in zip(numbers.tolist(), starts, [*starts[1:], len(order)], strict=True):
            name = _work_file(kind, number)
            if name not in self._files:
                path = self._writer.folder / name
                self._files[name] = self._stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd"))
                self._buckets[kind].add(number)
            self._files[name].write_table(
                table.slice(start, stop - start).cast(schema), row_group_size=IMAGE_ROWS if kind == "images" else None
            )


def keys(table: pa.Table, group_by: str) -> tuple[Hashes, Hashes]:
    """Of ``ANNOTATIONS``: the hash of each one's caption, and of its group."""
    caption = hash64(table["caption"], "caption")
    parts = [hash64(table[name], name) for name in ("source_image", "instruction")]
    if group_by == "caption-user":
        parts.append(hash64(table["user_id"], "user"))
    return caption, combine(caption, *parts)


def bucket_of(hashes: Hashes, buckets: int) -> np.ndarray:
    """The bucket of each hash: equal ranges, so that buckets in order hold hashes in order."""
    return ((hashes >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


# Finishing


def _finish_bucket(bucket: int, *, settings: Settings, sources: Sequence[str], splits: str, out: str) -> dict[str, int]:
    """Write the lists and ties of one bucket's groups; gives the counts."""
    opened = [artifacts.open_artifact(source) for source in sources]
    name = _work_file("annotations", bucket)
    tables = [pq.read_table(one.local(name)) for one in opened if name in one.paths("annotations-")]
    known = pq.read_table(artifacts.open_artifact(splits).local("splits.parquet"))
    made = make_lists(pa.concat_tables(tables), known["caption"].to_numpy(), known["split"].to_numpy(), settings)
    for folder, table in (("lists", made.lists), ("ties", made.ties)):
        if table.num_rows:
            filesystem, root = artifacts.locate(out)
            filesystem.makedirs(f"{root}/{folder}", exist_ok=True)
            with filesystem.open(f"{root}/{folder}/part-{bucket:05d}.parquet", "wb") as stream:
                pq.write_table(table, stream, compression="zstd")
    return dict(made.counts)


def _finish_images(bucket: int, *, sources: Sequence[str], out: str) -> dict[str, int]:
    """Write the images of one bucket of uids that some list names; gives their number."""
    filesystem, root = artifacts.locate(out)
    wanted: set[str] = set()
    for path in sorted(filesystem.glob(f"{root}/lists/*.parquet")):
        with filesystem.open(path, "rb") as stream:
            table = pq.read_table(stream, columns=["items", "source_image"])
        uids = pa.chunked_array([chunk.flatten().field("image_uid") for chunk in table["items"].chunks], pa.string())
        wanted.update(uids.unique().to_pylist(), table["source_image"].drop_null().unique().to_pylist())
    name = _work_file("images", bucket)
    opened = [artifacts.open_artifact(source) for source in sources]
    files = [one.local(name) for one in opened if name in one.paths("images-")]
    keep = pictures.first_of_each([pq.read_table(file, columns=["image_uid", "row"]) for file in files], wanted)
    count = int(sum(one.sum() for one in keep))
    if not count:
        return {"images": 0}
    filesystem.makedirs(f"{root}/images", exist_ok=True)
    with (
        filesystem.open(f"{root}/images/part-{bucket:05d}.parquet", "wb") as stream,
        pq.ParquetWriter(stream, IMAGES, compression="none") as writer,
    ):
        for file, taken in zip(files, keep, strict=True):
            start = 0
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(IMAGE_ROWS):
                    part = pictures.chosen(batch, taken[start : start + batch.num_rows])
                    start += batch.num_rows
                    if part.num_rows:
                        writer.write_table(part)
    return {"images": count}


@dataclass(frozen=True)
class Made:
    """Tables of ``LISTS`` and ``TIES``, and the counts of the report."""

    lists: pa.Table
    ties: pa.Table
    counts: Counter[str]


def make_lists(table: pa.Table, captions: Hashes, splits: np.ndarray, settings: Settings) -> Made:
    """The lists of some groups, sorted by their hashes.

    Args:
        table: ``ANNOTATIONS`` with ``group`` and ``caption_hash``, all rows of each group, in any order.
        captions: hashes of all captions, sorted; ``splits`` the split of each, as a place in ``SPLITS``.
    """
    if settings.format in ("scores", "thumbs", "imagereward"):
        table = _paired(table, settings)
    counts: Counter[str] = Counter()
    for reason in table["reason"].drop_null().to_pylist():
        counts[f"fate {reason}"] += 1
    table = table.filter(pc.is_null(table["reason"]))
    table = table.sort_by([(name, "ascending") for name in ("time", "row", "place")]).combine_chunks()
    groups, example, group = np.unique(table["group"].to_numpy(), return_index=True, return_inverse=True)
    uids, winner, loser = _numbered(table["winner"], table["loser"])
    tie = table["label"].to_numpy() == rankings.TIE
    votes = Votes(group.astype(np.int64), winner, loser, tie, table["votes"].to_numpy())
    built = lists.build(votes, settings.rules)
    caption_hash = table["caption_hash"].to_numpy()[example]
    place = splits[np.searchsorted(captions, caption_hash)]
    shown = {
        name: table[name].take(pa.array(example)) for name in ("caption", "user_id", "source_image", "instruction")
    }
    if settings.group_by == "caption":
        shown["user_id"] = pa.nulls(len(groups), pa.string())
    else:
        place = np.where((place == 0) & are_examples(shown["user_id"], groups, settings), len(SPLITS), place)
    split = pa.array([*SPLITS, EXAMPLES]).take(pa.array(place))
    writing = _Writing(table, votes, built, uids, groups, split, shown, settings.rules.kind)
    found = writing.lists()
    counts.update(_counts(built, found, writing.ties_of_graph, len(groups)))
    return Made(found, writing.ties(), counts)


def are_examples(users: pa.ChunkedArray, groups: Hashes, settings: Settings) -> np.ndarray:
    """Which groups are examples of a person's taste rather than training: all of people who are held out, and a share
    of everybody's. By hashes of the person and of the group, so that more data moves nobody."""
    seed = np.uint64(settings.split_seed)
    person = combine(hash64(users, "held out"), np.full(len(groups), seed)) / 2.0**64
    drawn = combine(groups, np.full(len(groups), seed)) / 2.0**64
    return (person < settings.held_out_people) | (drawn < settings.examples)


def _paired(table: pa.Table, settings: Settings) -> pa.Table:
    """Points as pairs, with their keys."""
    paired = rankings.pair_points(table.select(ANNOTATIONS.names), settings.margin, settings.rules.max_length)
    caption, group = keys(paired, settings.group_by)
    return paired.append_column("group", pa.array(group)).append_column("caption_hash", pa.array(caption))


def _numbered(winner: pa.ChunkedArray, loser: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """The distinct uids in order, and each side's place among them."""
    both = pa.concat_arrays([*winner.chunks, *loser.chunks]).dictionary_encode()
    order = pc.sort_indices(both.dictionary).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    codes = rank[both.indices.to_numpy()]
    return both.dictionary.take(pa.array(order)), codes[: len(winner)], codes[len(winner) :]


@dataclass(frozen=True)
class _Writing:
    """Lists and ties as Arrow tables."""

    table: pa.Table  # annotations, oldest first
    votes: Votes
    built: Built
    uids: pa.Array
    groups: Hashes
    split: pa.Array  # by group
    shown: Mapping[str, Any]  # caption and so on, by group
    kind: str

    @property
    def ties_of_graph(self) -> int:
        return len(self.built.graph.draw_first)

    def lists(self) -> pa.Table:
        made, graph = self.built.lists, self.built.graph
        image = graph.node_image[made.nodes]
        group = graph.node_group[made.nodes[made.offsets[:-1]]]
        items = pa.StructArray.from_arrays(
            [
                self.uids.take(pa.array(image)),
                self._of_images("model").take(pa.array(made.nodes)),
                self._of_images("score").take(pa.array(made.nodes)),
                pa.array(made.tie_group.astype(np.int32)),
            ],
            fields=list(LISTS.field("items").type.value_type),
        )
        voted = self._sources(np.where(self.built.fate == lists.KEPT, graph.edge, -1), len(graph.winner))
        edges = pa.StructArray.from_arrays(
            [
                pa.array(made.edge_winner.astype(np.int32)),
                pa.array(made.edge_loser.astype(np.int32)),
                pa.array(graph.support[made.edge].astype(np.float32)),
                voted.take(pa.array(made.edge)),
            ],
            fields=list(LISTS.field("edges").type.value_type),
        )
        count = len(group)
        at = pa.array(group)
        columns = {
            "list_id": pa.array([f"{one:016x}" for one in self._ids(group, image).tolist()], pa.string()),
            "split": self.split.take(at),
            "items": pa.ListArray.from_arrays(pa.array(made.offsets.astype(np.int32)), items),
            "edges": pa.ListArray.from_arrays(pa.array(made.edge_offsets.astype(np.int32)), edges),
            "kind": pa.repeat(self.kind, count),
            "top_k": pa.array(np.ones(count, np.int32)) if self.kind == "topk" else pa.nulls(count, pa.int32()),
            "weight": pa.array(np.ones(count, np.float32)),
            **{name: values.take(at) for name, values in self.shown.items()},
        }
        return _table(columns, LISTS)

    def ties(self) -> pa.Table:
        graph = self.built.graph
        at = pa.array(graph.node_group[graph.draw_first])
        columns = {
            "caption": self.shown["caption"].take(at),
            "user_id": self.shown["user_id"].take(at),
            "split": self.split.take(at),
            "first": self.uids.take(pa.array(graph.node_image[graph.draw_first])),
            "second": self.uids.take(pa.array(graph.node_image[graph.draw_second])),
            "source_ids": self._sources(graph.draw, len(graph.draw_first)),
        }
        return _table(columns, TIES)

    def _ids(self, group: np.ndarray, image: np.ndarray) -> Hashes:
        """A hash of each list's group, kind, images and tie groups."""
        made = self.built.lists
        if not len(group):
            return np.array([], dtype=np.uint64)
        lengths = made.lengths
        place = np.arange(len(image)) - np.repeat(made.offsets[:-1], lengths)
        item = combine(hash64(self.uids, "image")[image], place.astype(np.uint64), made.tie_group.astype(np.uint64))
        kind = hash64(pa.array([self.kind]), "kind")
        return combine(self.groups[group], np.add.reduceat(mix(item), made.offsets[:-1]), np.repeat(kind, len(group)))

    def _sources(self, place: np.ndarray, count: int) -> pa.Array:
        """The source ids of the annotations at each of ``count`` places, oldest first; -1 is none."""
        order = np.argsort(place, kind="stable")
        order = order[place[order] >= 0]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(place[order], minlength=count))]).astype(np.int32)
        values = self.table["source_id"].take(pa.array(order))
        return pa.ListArray.from_arrays(
            pa.array(offsets), pa.concat_arrays([*values.chunks, pa.array([], pa.string())])
        )

    def _of_images(self, name: str) -> pa.Array:
        """Model, or mean score, of each node; null where no annotation says it."""
        graph, table = self.built.graph, self.table
        count, kind = len(graph.node_group), ANNOTATIONS.field(f"winner_{name}").type
        columns = [table[f"winner_{name}"], table[f"loser_{name}"]]
        values = pa.concat_arrays([chunk for column in columns for chunk in column.chunks] or [pa.nulls(0, kind)])
        known = np.nonzero(values.is_valid().to_numpy(zero_copy_only=False))[0]
        if not len(known):
            return pa.nulls(count, kind)
        group = np.tile(self.votes.group, 2)[known]
        image = np.concatenate([self.votes.winner, self.votes.loser])[known]
        node = np.searchsorted(graph.node_group << 32 | graph.node_image, group << 32 | image)
        if name == "score":
            total = np.bincount(node, values.take(pa.array(known)).to_numpy(), minlength=count)
            times = np.bincount(node, minlength=count)
            return pa.array(total / np.maximum(times, 1), mask=times == 0)
        found, first = np.unique(node, return_index=True)
        place = np.zeros(count, dtype=np.int64)
        place[found] = known[first]
        return values.take(pa.array(place, mask=~np.isin(np.arange(count), found)))


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)


def _counts(built: Built, table: pa.Table, drawn: int, groups: int) -> Counter[str]:
    made, graph = built.lists, built.graph
    longest = np.zeros(len(graph.winner), dtype=np.int64)
    np.maximum.at(longest, made.edge, np.repeat(made.lengths, np.diff(made.edge_offsets)))
    kept = built.fate == lists.KEPT
    counts = Counter(
        {
            "lists": len(made.lengths),
            "groups": groups,
            "cycles": built.cycles,
            "images in cycles": built.images_in_cycles,
            "tied pairs": drawn,
            "kept in long lists": int((longest[graph.edge[kept]] > 2).sum()),
        }
    )
    for fate, name in enumerate(lists.FATES):
        counts[f"fate {name}"] = int((built.fate == fate).sum())
    for length, count in zip(*np.unique(made.lengths, return_counts=True), strict=True):
        counts[f"length {length}"] = int(count)
    for one in table["split"].value_counts().to_pylist():
        counts[f"split {one['values']}"] = one["counts"]
    return counts


# The work folder


def _unit_url(work: str, index: int) -> str:
    return artifacts.join(work, "read", f"{index:05d}")


def _work_file(kind: str, bucket: int) -> str:
    return f"{kind}-{bucket:05d}.parquet"


def _remove_work(out: str) -> None:
    work = work_folder(out)
    filesystem, root = artifacts.locate(work)
    for stage in ("read", "splits"):
        for folder in artifacts.folders(artifacts.join(work, stage)):
            artifacts.discard(folder)
            if artifacts.is_local(filesystem):
                filesystem.rmdir(artifacts.locate(folder)[1])
    if artifacts.is_local(filesystem) and filesystem.exists(root):
        for folder in (f"{root}/read", f"{root}/splits", root):
            if filesystem.exists(folder):
                filesystem.rmdir(folder)
