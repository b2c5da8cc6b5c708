"""Image-text shards as a source of the exact stream: tar, Parquet and LLaVA JSON, read where they lie by an index.

The index (``jobs/prepare.py captions``) says where each sample's bytes are; its files are memory-mapped, one a shard,
when they are needed. From a local tar a sample is one read at its offset. A remote shard is fetched whole, and a
Parquet shard, wherever it is, is unpacked once into an Arrow file whose rows can be had alone: both into a cache of
bounded size that the processes of a node share.

Nothing has to be cleaned after a crash: what a killed process left half done is never read, and the next one that
needs room or the same shard removes it.
"""

import bisect
import errno
import fcntl
import hashlib
import json
import logging
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from palate import artifacts
from palate.artifacts import Artifact, ArtifactError
from palate.corpora.captions import IMAGE_TEXT_INDEX, RawSample
from palate.corpora.image_text import PARQUET_ROWS
from palate.training.stream import CorruptSample

HANDLES = 1024  # shards that a process keeps open, where so many files may be
INDEXES = 256  # index files that a source keeps mapped
OWN = "palate-shards"  # the cache's folder inside the one that is named
KEPT, HALF = ".shard", ".part"  # what its files end with, whole and while they are written
PATIENCE = 1800  # seconds that others may fill the cache with files that do not grow
TRIES = 9  # to reach object storage, over 4 minutes, before the run is stopped
# What this machine lacks for now, which says nothing about a file or a sample.
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
# Not the storage's: a file of this machine cannot be written. (s3fs has EIO for what it does not know.)
LOCAL = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)
BLOCK = 512  # of a tar

T = TypeVar("T")
Pause = Callable[[float], None]  # for some seconds; may raise WaitEnded
log = logging.getLogger(__name__)


class IndexMismatch(ArtifactError):
    """The shards are not those that were indexed."""


class CacheTooSmall(ArtifactError):
    """A shard is larger than the whole cache may be."""


class Unreachable(ArtifactError):
    """Object storage does not answer. Not the sample's fault: the run stops, and goes on when it is started again."""


class WaitEnded(Exception):
    """Nobody wants any more what was waited for."""


class Descriptor:
    """A file open for reading, closed when nobody holds it any more: other threads may be reading when it is let go."""

    def __init__(self, path: str | Path) -> None:
        self._number = -1
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._touched = time.monotonic()

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)

    @property
    def path(self) -> str:
        """A path of the open file itself, whatever has become of its name."""
        return f"/dev/fd/{self._number}"

    @property
    def size(self) -> int:
        return os.fstat(self._number).st_size

    @property
    def deleted(self) -> bool:
        return os.fstat(self._number).st_nlink == 0

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``.

        Raises:
            ValueError: the file ends before.
        """
        content = os.pread(self._number, size, offset)
        if len(content) < size:
            raise ValueError(f"cut off: {len(content)} of {size} bytes at offset {offset}")
        return content

    def touch(self, seconds: float = 0.0) -> None:
        """Note that the file is in use, if that was last noted ``seconds`` ago."""
        now = time.monotonic()
        if now - self._touched >= seconds:
            os.utime(self._number)
            self._touched = now


class Cache:
    """Files of at most ``max_bytes`` in all, the least recently used of which make room for new ones.

    Shared by all threads and processes of a node that name the same folder; the locks need a local disk. The files are
    in a folder of their own inside it, and no other is ever deleted.

    Args:
        flag: the option that sets ``max_bytes``, for the message when it is too small.
    """

    def __init__(self, folder: str | Path, max_bytes: int, flag: str = "--cache-gb") -> None:
        self.folder, self.max_bytes, self.flag = Path(folder) / OWN, max_bytes, flag
        self.sources = 0  # that share it
        self.handles: Handles[Any] = Handles(_most_open())
        self._ended = threading.Event()
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)

    def find(self, name: str) -> Descriptor | None:
        """The file called ``name``, if it is there."""
        try:
            found = Descriptor(self.folder / f"{name}{KEPT}")
        except FileNotFoundError:
            return None
        found.touch()
        return found

    def open(self, name: str, size: int, what: str, make: Callable[[Path], None], passing: int = 0) -> Descriptor:
        """The file called ``name``, written by ``make(path)`` unless it is there.

        Args:
            name: says what the content is, such as its hash.
            size: of the file in bytes, or a good estimate. A larger one is let go and made again where it does not fit.
            what: what it is, for messages.
            passing: bytes that ``make`` needs besides, for a file ``beside(path)``. They are reserved together: who
                holds a part of the cache never waits for more of it.

        Raises:
            CacheTooSmall: it cannot fit.
            TimeoutError: others fill the cache with files that do not become whole.
        """
        if found := self.find(name):
            return found
        with self._locked(name):
            made = self.find(name)  # another made it meanwhile
            while made is None:
                made, size = self._make(name, size, what, make, passing)
        return made

    def end_waits(self, ended: bool) -> None:
        """Whether waits in this process, for room or for storage that does not answer, are to raise ``WaitEnded``."""
        (self._ended.set if ended else self._ended.clear)()

    def pause(self, seconds: float) -> None:
        if self._ended.wait(seconds):
            raise WaitEnded

    def drop(self, name: str) -> None:
        """Forget a file before its turn."""
        with self._locked("room"):
            (self.folder / f"{name}{KEPT}").unlink(missing_ok=True)

    def _make(
        self, name: str, size: int, what: str, make: Callable[[Path], None], passing: int
    ) -> tuple[Descriptor | None, int]:
        """The file, or None if it has become too large for the room that there is; and its size."""
        reserved = size + passing
        self._require(reserved, what)
        for left in self.folder.glob(f"{name}.*{HALF}"):  # by a process that was killed
            left.unlink()
        half = self.folder / f"{name}.{reserved}{HALF}"
        self._reserve(reserved, half, what)
        try:
            make(half)
            made = Descriptor(half)
            os.fsync(made._number)
            self._require(made.size, what)
            kept = self._room(made.size - reserved, lambda: half.replace(self.folder / f"{name}{KEPT}"))
            return (made if kept else None), made.size
        finally:
            half.unlink(missing_ok=True)

    def _require(self, size: int, what: str) -> None:
        if size > self.max_bytes:
            raise CacheTooSmall(
                f"{what} takes {size / 1e9:.3g} GB, but the cache {self.folder} may hold "
                f"{self.max_bytes / 1e9:.3g} GB: raise {self.flag}"
            )

    def _reserve(self, size: int, half: Path, what: str) -> None:
        """Take ``size`` bytes by creating ``half``, as soon as they fit."""
        seen, since = self._halves(), time.monotonic()
        while not self._room(size, half.touch):
            self.pause(0.05)  # what others are writing fills the cache
            if (now := self._halves()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                raise TimeoutError(
                    f"{what} takes {size / 1e9:.3g} GB, for which the cache {self.folder} has no room: no file "
                    f"that others write there has grown for {PATIENCE} s ({', '.join(sorted(now))}). End "
                    f"these processes, or raise {self.flag}, and start the run again"
                )

    def _halves(self) -> dict[str, int]:
        """Sizes of the files that are being written."""
        found = {}
        for path in self.folder.glob(f"*{HALF}"):
            with suppress(FileNotFoundError):
                found[path.name] = path.stat().st_size
        return found

    def _room(self, size: int, take: Callable[[], object]) -> bool:
        """Delete until ``size`` more bytes fit, and ``take`` them before others count; whether they fit."""
        with self._locked("room"):
            taken, entries = size, []
            for entry in os.scandir(self.folder):
                if entry.name.endswith(HALF):
                    taken += self._reserved(entry.name)
                elif entry.name.endswith(KEPT):
                    status = entry.stat()
                    taken += status.st_size
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
            for _, freed, path in sorted(entries):
                if taken <= self.max_bytes:
                    break
                Path(path).unlink()  # whoever reads it goes on reading
                taken -= freed
            fits = taken <= self.max_bytes or size <= 0  # no more than was reserved always does
            if fits:
                take()
            return fits

    def _reserved(self, file: str) -> int:
        """The bytes that a half-written file will take; if nobody is writing it, it is removed and takes none."""
        name, size, _ = file.rsplit(".", 2)
        with self._locked(name, wait=False) as mine:
            if mine:
                (self.folder / file).unlink(missing_ok=True)
                return 0
        return int(size)

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock against all threads and processes; or, without ``wait``, say whether it could be had. Each file
        has its own: who makes one and needs another's lock as well would wait for itself where they shared it."""
        number = os.open(self.folder / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(number)  # releases the lock


class Handles(Generic[T]):
    """The open shards of all sources that share a cache, at most ``most``, of which the least recently used go."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: OrderedDict[Hashable, tuple[T, Descriptor]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        with self._lock:
            handle, descriptor = self._open.get(key, (None, None))
            if descriptor is not None and not descriptor.deleted:
                self._open.move_to_end(key)
                return handle
            # Files that the cache has dropped take space on the disk until they are let go.
            for other in [other for other, (_, descriptor) in self._open.items() if descriptor.deleted]:
                del self._open[other]
        return None

    def put(self, key: Hashable, handle: T, descriptor: Descriptor) -> None:
        with self._lock:
            self._open[key] = handle, descriptor
            while len(self._open) > self.most:
                self._open.popitem(last=False)


def _most_open() -> int:
    """A quarter of the files that this process may open, but no more than ``HANDLES``."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return HANDLES if limit == resource.RLIM_INFINITY else max(1, min(HANDLES, limit // 4))


def beside(half: Path) -> Path:
    """Where what is needed to make a file of the cache may lie meanwhile; it goes as that does when a process dies."""
    return half.with_name(f"{half.name.rsplit('.', 2)[0]}.0{HALF}")


class _Shard(NamedTuple):
    """A row of ``shards.parquet``, and where it is."""

    shard: int
    url: str
    format: str
    samples: int
    bytes: int
    sha256: str
    root: str

    @property
    def cached(self) -> int:
        """About how many bytes it takes in the cache; 0 if it is read where it lies."""
        if self.format == "parquet":
            return self.bytes + self.bytes // 8
        return 0 if artifacts.is_local(artifacts.locate(self.url)[0]) else self.bytes

    def stale(self, found: str) -> IndexMismatch:
        return IndexMismatch(
            f"shard {self.shard} ({self.url}) is not the one that was indexed: {found}. Put the old file back, or make "
            "the index again (jobs/prepare.py captions)"
        )


@dataclass
class _Handle:
    """An open shard; of a Parquet shard, the record batches of its unpacked file with the first row of each."""

    descriptor: Descriptor
    cached: bool
    batches: list[pa.RecordBatch] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


class ShardSource:
    """The samples of an index, as a ``stream.Source``; its blocks are the shards, its ids ``shard/row/key``.

    May be used by several threads. Randomness is only in ``decode``, by the seed that it is given.

    Args:
        index: the artifact that ``jobs/prepare.py captions`` made, or its path or URL.
        decode: makes of a ``RawSample`` and a seed what the model wants; raises ``ValueError`` (or ``CorruptSample``)
            for a sample that cannot be used, with the reason.

    Raises:
        ArtifactMissing: there is no finished index.
    """

    def __init__(
        self, index: Artifact | str | Path, decode: Callable[[RawSample, int], Any], cache: Cache, name: str = "images"
    ) -> None:
        self._artifact = index if isinstance(index, Artifact) else artifacts.open_artifact(index, IMAGE_TEXT_INDEX)
        filesystem, root = artifacts.locate(self._artifact.url)
        self._root = Path(root) if artifacts.is_local(filesystem) else None
        self.name, self._decode, self._cache = name, decode, cache
        self._number = cache.sources
        cache.sources += 1
        rows = pq.read_table(self._artifact.local("shards.parquet")).to_pylist()
        self._shards = [_Shard(**row) for row in rows]
        self.blocks = np.array([shard.samples for shard in self._shards], dtype=np.int64)
        self._ends = np.cumsum(self.blocks).tolist()
        columns = self._artifact.paths("columns.json")
        self._columns: Mapping[str, str] = self._artifact.read_json(columns[0]) if columns else {}
        self.fingerprint = self._hash()
        self._index = lru_cache(maxsize=INDEXES)(self._open_index)
        self._warned = False

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def id(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{shard:05d}/{row}/{self._index(shard)['key'][row].as_py()}"  # keys may repeat

    def load(self, index: int, seed: int) -> Any:
        """The decoded sample.

        Raises:
            CorruptSample: it cannot be read or decoded.
            IndexMismatch: its shard is gone, or is another than the one that was indexed.
            CacheTooSmall: its shard does not fit into the cache.
            Unreachable: object storage does not answer.
            OSError: this machine cannot read now, as when too many files are open (``LACKING``).
        """
        shard, row = self._place(index)
        handle, columns = self._handle(shard), self._index(shard)
        try:
            return self._decode(_read(self._shards[shard], columns, row, handle, self._cache.pause), seed)
        except (ValueError, OSError, SyntaxError) as reason:  # SyntaxError: Pillow's, of a broken PNG
            if isinstance(reason, OSError) and reason.errno in LACKING:
                raise
            raise CorruptSample(f"{type(reason).__name__}: {reason}") from None

    def lengths(self, tokens: Callable[[np.ndarray], np.ndarray]) -> "Lengths":
        """What ``Packing`` wants: ``tokens`` of the captions' lengths in characters, both int64 (N,)."""
        return Lengths(self, tokens)

    def fetch(self, block: int) -> None:
        """Bring a shard near; raises what ``load`` does."""
        if self._shards[block].cached:
            self._handle(block)

    def end_waits(self, ended: bool) -> None:
        """Whether threads that wait in ``load`` or ``fetch`` are to give up, as when a run ends."""
        self._cache.end_waits(ended)

    def fetchable(self, blocks: Sequence[int]) -> list[int]:
        """The first of ``blocks``, those of two windows, that have room in the cache together."""
        sizes = np.cumsum([self._shards[block].cached for block in blocks])
        room = self._cache.max_bytes // self._cache.sources
        found = list(blocks[: int(np.searchsorted(sizes, room, side="right"))])
        if 2 * len(found) < len(blocks) and not self._warned:
            self._warned = True
            log.warning(
                "%s: the shards of two windows take %.3g GB, but the cache has %.3g GB for them: many will be fetched "
                "again and again. Raise %s, or lower the window",
                *(self.name, sizes[-1] / 1e9, room / 1e9, self._cache.flag),
            )
        return found

    def characters(self, shard: int) -> np.ndarray:
        """The lengths of a shard's captions in characters, (samples,)."""
        return np.asarray(self._index(shard)["length"])

    def _place(self, index: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _hash(self) -> str:
        """Of what was indexed and how, not of where it lies: a corpus may move."""
        lines = [f"{shard.sha256} {shard.format} {shard.samples}" for shard in self._shards]
        lines += [f"{entry.sha256} {entry.path}" for entry in self._artifact.files if entry.path.startswith("index/")]
        lines.append(json.dumps(dict(self._columns), sort_keys=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def _open_index(self, number: int) -> dict[str, Any]:
        """The columns of a shard's index file, memory-mapped: integers as numpy arrays, keys as an Arrow array."""
        name = f"index/{number:05d}.arrow"
        # Artifact.local looks for the name among all of them.
        path = self._artifact.local(name) if self._root is None else self._root / name
        with pa.memory_map(str(path)) as file:  # the arrays keep the mapping, not the file's descriptor
            reader = pa.ipc.open_file(file)
            batch = reader.get_batch(0) if reader.num_record_batches else pa.RecordBatch.from_pylist([], reader.schema)
        if batch.num_rows != self._shards[number].samples:
            raise IndexMismatch(
                f"{path} has {batch.num_rows} samples, but shards.parquet says {self._shards[number].samples}: make "
                "the index again (jobs/prepare.py captions)"
            )
        names = batch.schema.names
        return {name: batch[name] if name == "key" else batch[name].to_numpy() for name in names}

    def _handle(self, number: int) -> _Handle:
        handle: _Handle | None = self._cache.handles.get((self._number, number))
        if handle is None:
            handle = self._open(self._shards[number])
            self._cache.handles.put((self._number, number), handle, handle.descriptor)
        elif handle.cached:
            handle.descriptor.touch(seconds=5)
        return handle

    def _open(self, shard: _Shard) -> _Handle:
        if shard.format == "parquet":
            return self._open_parquet(shard)
        if shard.format not in ("tar", "llava"):
            raise shard.stale(f"its format is {shard.format!r}, not tar, parquet or llava")
        return _Handle(self._whole(shard), cached=shard.cached > 0)

    def _whole(self, shard: _Shard) -> Descriptor:
        """The shard's file: itself, or a checked copy in the cache."""
        filesystem, path = artifacts.locate(shard.url)
        if not artifacts.is_local(filesystem):
            return self._cache.open(
                f"{shard.sha256}.{shard.format}",
                shard.bytes,
                f"shard {shard.url}",
                lambda copy: _download(shard, copy, self._cache.pause),
            )
        try:
            found = Descriptor(path)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise shard.stale(f"it cannot be opened ({error})") from None
        if found.size != shard.bytes:
            raise shard.stale(f"it has {found.size} bytes, but had {shard.bytes}")
        return found

    def _open_parquet(self, shard: _Shard) -> _Handle:
        columns = hashlib.sha256(json.dumps(dict(self._columns), sort_keys=True).encode()).hexdigest()[:8]
        name, local = f"{shard.sha256}-{columns}.arrow", artifacts.is_local(artifacts.locate(shard.url)[0])
        last = int(self._index(shard.shard)["row"].max(initial=-1))
        if local:
            self._whole(shard)  # its size is what it was

        def make(target: Path) -> None:
            if local:
                whole = self._whole(shard)
                if (found := _sha256(whole.path)) != shard.sha256:
                    raise shard.stale(f"its sha256 is {found[:12]}…, but was {shard.sha256[:12]}…")
                _unpack(shard, whole.path, self._columns, target, last)
                return
            copy = beside(target)
            try:
                _download(shard, copy, self._cache.pause)
                _unpack(shard, copy, self._columns, target, last)
            finally:
                copy.unlink(missing_ok=True)

        for _ in range(2):
            descriptor = self._cache.find(name)
            if descriptor is None:
                size, passing = _unpacked_size(shard, self._columns, self._cache.pause), 0 if local else shard.bytes
                descriptor = self._cache.open(name, size, f"shard {shard.url}", make, passing)
            with pa.memory_map(descriptor.path) as file:
                reader = pa.ipc.open_file(file)
                batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            *starts, rows = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
            if rows > last:
                return _Handle(descriptor, cached=True, batches=batches, starts=starts)
            self._cache.drop(name)  # unpacked as far as another index of the same shard goes
        raise shard.stale(f"it has no row {last}, but {rows} rows")


class Lengths(Sequence[int]):
    """Tokens of each sample of a ``ShardSource``, computed from its index when they are asked for."""

    def __init__(self, source: ShardSource, tokens: Callable[[np.ndarray], np.ndarray]) -> None:
        self._source, self._tokens = source, tokens

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        return int(self.take(np.array([index]))[0])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of the samples at ``indices`` (N,), int64 (N,); each shard's index is opened once."""
        ends = np.cumsum(self._source.blocks)
        shards = np.searchsorted(ends, indices, side="right")
        order = np.argsort(shards, kind="stable")
        characters = np.empty(len(indices), dtype=np.int64)
        for members in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(members):
                shard = int(shards[members[0]])
                first = ends[shard] - self._source.blocks[shard]
                characters[members] = self._source.characters(shard)[indices[members] - first]
        return self._tokens(characters)


def _read(shard: _Shard, index: Mapping[str, Any], row: int, handle: _Handle, pause: Pause) -> RawSample:
    key = index["key"][row].as_py()
    if shard.format == "tar":
        return _read_tar(shard, key, {name: int(index[name][row]) for name in index if name != "key"}, handle)
    if shard.format == "parquet":
        return _read_parquet(shard, key, int(index["row"][row]), handle)
    return _read_llava(shard, key, int(index["json_offset"][row]), int(index["json_size"][row]), handle, pause)


def _read_tar(shard: _Shard, key: str, place: Mapping[str, int], handle: _Handle) -> RawSample:
    def member(kind: str) -> bytes | None:
        offset, size = place[f"{kind}_offset"], place[f"{kind}_size"]
        if size < 0:
            return None
        content = handle.descriptor.read(offset - BLOCK, BLOCK + size)
        if not _is_header(content[:BLOCK], key, size):
            raise shard.stale(f"at offset {offset} there is no member of {key!r} with {size} bytes")
        return content[BLOCK:]

    image, text, record = member("image"), member("text"), member("json")
    if image is None:
        raise ValueError("it has no image")
    return RawSample(
        key,
        image,
        None if text is None else text.decode(),
        None if record is None else _record(record),
    )


def _is_header(header: bytes, key: str, size: int) -> bool:
    """Whether a tar's block is the header of a member of ``key`` with ``size`` bytes of content."""
    try:
        stated = int(header[124:136].rstrip(b"\0").strip() or b"0", 8)  # padded with spaces on either side, or zeros
    except ValueError:
        return False
    if stated != size:
        return False
    name, stem = header[:100].rstrip(b"\0"), PurePosixPath(key).name.encode()
    if len(name) == 100 or not stem.isascii():  # cut off, or replaced: the whole name is in a block before
        return True
    return name.rpartition(b"/")[2].partition(b".")[0] == stem


def _read_parquet(shard: _Shard, key: str, row: int, handle: _Handle) -> RawSample:
    number = bisect.bisect_right(handle.starts, row) - 1
    batch = handle.batches[number]
    place = row - handle.starts[number]
    if place >= batch.num_rows:
        raise shard.stale(f"it has no row {row}")
    image = batch["image"][place].as_py()
    if not image:
        raise ValueError("it has no image")
    caption = batch["caption"][place].as_py()
    return RawSample(key, image, None if caption is None else caption.decode(), None)


def _read_llava(shard: _Shard, key: str, offset: int, size: int, handle: _Handle, pause: Pause) -> RawSample:
    try:
        record = _record(handle.descriptor.read(offset, size))
    except ValueError as error:
        raise shard.stale(f"at offset {offset} there is no record of {size} bytes ({error})") from None
    if "conversations" not in record:
        raise shard.stale(f"at offset {offset} there is no record of {key!r}")
    image = record.get("image")
    if not isinstance(image, str) or ".." in image.split("/"):
        raise ValueError(f"its image is {image!r}, not a path below {shard.root!r}")
    filesystem, path = artifacts.locate(artifacts.join(shard.root, image.lstrip("/")))
    if artifacts.is_local(filesystem):
        return RawSample(key, Path(path).read_bytes(), None, record)
    return RawSample(key, _reached(lambda: bytes(filesystem.cat_file(path)), path, pause), None, record)


def _record(content: bytes) -> dict[str, Any]:
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError(f"its JSON is a {type(record).__name__}, not an object")
    return record


def _download(shard: _Shard, target: Path, pause: Pause) -> None:
    filesystem, path = artifacts.locate(shard.url)
    try:
        _reached(lambda: filesystem.get_file(path, str(target)), shard.url, pause)
    except FileNotFoundError:
        raise shard.stale("it is gone") from None
    if (size := target.stat().st_size) != shard.bytes:
        raise shard.stale(f"it has {size} bytes, but had {shard.bytes}")
    if (found := _sha256(target)) != shard.sha256:
        raise shard.stale(f"its sha256 is {found[:12]}…, but was {shard.sha256[:12]}…")


def _reached(action: Callable[[], T], url: str, pause: Pause) -> T:
    """What ``action`` gives, tried again where object storage fails (each fsspec package has exceptions of its own).

    Raises:
        FileNotFoundError: the object is not there.
        Unreachable: it failed every time.
    """
    for left in reversed(range(TRIES)):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in LOCAL:
                raise
            log.warning("%s cannot be read (%s); %d more tries", url, error, left)
            if not left:
                raise Unreachable(
                    f"{url} cannot be read: {error}. Check the network and the credentials, and start the run again"
                ) from None
            pause(2.0 ** (TRIES - left - 1))
    raise AssertionError("unreachable")


def _unpack(shard: _Shard, parquet: str | Path, columns: Mapping[str, str], target: Path, last: int) -> None:
    """Write images and captions of a Parquet file, in the order of its rows, as an uncompressed Arrow file. Of a
    damaged file, as much as was indexed: up to row ``last`` at least. Memory: ``PARQUET_ROWS`` rows.

    Raises:
        IndexMismatch: it is damaged before that.
        OSError, MemoryError: it cannot be read now, which says nothing about the file.
    """
    schema = pa.schema([("image", pa.binary()), ("caption", pa.binary())])  # whether it is UTF-8, each row says itself
    rows = 0
    with (
        pq.ParquetFile(parquet, memory_map=True, buffer_size=1 << 20, pre_buffer=False) as file,
        pa.OSFile(str(target), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        found = file.iter_batches(PARQUET_ROWS, columns=[columns["image"], columns["caption"]])
        while True:
            try:
                batch = next(found, None)
            except (pa.ArrowException, OSError) as error:
                if rows <= last:
                    if isinstance(error, MemoryError) or getattr(error, "errno", None):
                        raise
                    raise shard.stale(f"it has no row {last} that can be read ({error})") from None
                log.warning("only the first %d rows of %s can be read (%s), as indexed", rows, shard.url, error)
                break
            if batch is None:
                break
            image, caption = batch[columns["image"]], batch[columns["caption"]]
            if pa.types.is_struct(image.type):  # Hugging Face's: {bytes, path}
                image = pc.struct_field(image, "bytes")
            arrays = [image.cast(pa.binary()), caption.cast(pa.binary())]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            rows += batch.num_rows
    if rows <= last:
        raise shard.stale(f"it has no row {last}, but {rows} rows")


def _unpacked_size(shard: _Shard, columns: Mapping[str, str], pause: Pause) -> int:
    """Bytes of what ``_unpack`` writes, by the Parquet file's own metadata. (Cells that repeat may take more.)"""
    filesystem, path = artifacts.locate(shard.url)

    def read() -> pq.FileMetaData:
        with filesystem.open(path, "rb") as file:
            return pq.read_metadata(file)

    try:
        metadata = read() if artifacts.is_local(filesystem) else _reached(read, shard.url, pause)
    except (FileNotFoundError, pa.ArrowException):
        return shard.cached  # what is wrong with it is found, and said, when it is fetched and hashed
    size = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in columns.values()):
                size += column.total_uncompressed_size
    # Each record batch: its description, its rows' offsets and a bit for each that says whether it is there.
    return size + size // 64 + 1024 * (metadata.num_rows // PARQUET_ROWS + 2) + 16 * metadata.num_rows


def _sha256(path: str | Path) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
