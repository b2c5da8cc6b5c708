"""Exact streaming: which samples each step trains on, as a pure function of the seed and a few counters.

A source's order is shuffled in three layers: its blocks (shards) among themselves, the windows that are cut over the
blocks' new order, and the samples inside each window. All of it is computed window by window, so nothing of the size of
the corpus is ever in memory; and a window touches few shards, so few must be at hand.
Step k takes the next ``global_batch`` units from the cursors, whatever the number of ranks or workers; a unit is one
sample, or one pack of samples that fit a token budget together. The whole state is one ``Cursor`` a source, so a run
that starts again goes on with the very same batches. A corrupt sample keeps its place and contributes nothing.
"""

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np


class CorruptSample(Exception):
    """A sample that cannot be read; raised by ``Source.load``, with the reason. The stream goes on without it."""


class Source(Protocol):
    """Random access to samples.

    A source whose samples lie in shards says so by ``blocks``: the lengths of consecutive runs of samples, which are
    kept together and shuffled among themselves. It may also have ``fetch(block)``, which brings a block near, and
    ``fetchable(blocks)``, the first of them that can be near at once (see ``loading``).
    """

    name: str
    fingerprint: str  # equal fingerprints mean equal samples under equal indices

    def __len__(self) -> int: ...

    def id(self, index: int) -> str:
        """The sample's id, without reading the sample."""
        ...

    def load(self, index: int, seed: int) -> Any:
        """The sample. Whatever is random about it (crops, noise) is drawn from ``seed`` alone, which is another in
        each epoch and the same on whatever rank.

        Raises:
            CorruptSample: it cannot be read.
        """
        ...


class ListSource:
    """Samples in memory; ``ids`` are any stable names, and equal ids are taken to mean equal samples."""

    def __init__(self, name: str, samples: Sequence[Any], ids: Sequence[str]) -> None:
        if len(samples) != len(ids):
            raise ValueError(f"source {name!r} has {len(samples)} samples but {len(ids)} ids")
        self.name, self.samples, self.ids = name, samples, ids
        self.fingerprint = _hash("\n".join(ids))

    def __len__(self) -> int:
        return len(self.samples)

    def id(self, index: int) -> str:
        return self.ids[index]

    def load(self, index: int, seed: int) -> Any:
        return self.samples[index]


@dataclass(frozen=True)
class Packing:
    """Samples are put together into packs of at most ``capacity`` tokens; a unit of the stream is then a pack.

    ``lengths`` has the tokens of every sample, by source, or is a lazy sequence of them: one with ``take(indices)`` is
    asked for a window at once. ``fingerprint`` names the tokenizer they were counted with.
    A sample longer than ``capacity`` is a pack of its own, for the loss to cut.
    """

    capacity: int
    lengths: Mapping[str, Sequence[int]]
    fingerprint: str


@dataclass(frozen=True)
class Cursor:
    """Where a source stands: ``offset`` units of ``window`` are done; ``taken`` counts units over all epochs."""

    epoch: int = 0
    window: int = 0
    offset: int = 0
    taken: int = 0


class Unit(NamedTuple):  # cheap: millions are made
    """What a batch counts: one sample of a source, or the samples of one pack."""

    source: int
    epoch: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Loaded:
    """A unit's content: the sample (with packing: the list of samples), or None if nothing of it can be read."""

    value: Any
    corrupt: tuple[dict[str, str], ...] = ()  # id and reason of each sample that could not be read


@dataclass(frozen=True)
class _Layout:
    """The blocks of a source in an epoch's order: block ``order[i]`` holds positions ``ends[i - 1]`` to ``ends[i]``;
    ``shifts[i]`` added to such a position gives the sample's index."""

    order: np.ndarray
    ends: np.ndarray
    shifts: np.ndarray


class Stream:
    """The global batches over one source or a mixture.

    Args:
        global_batch: units per step. It decides what is computed; how it is spread over ranks does not.
        window: samples that are shuffled, and packed, together. As large as memory allows; the default holds small
            corpora whole.
        weights: each source's share of the units, by name; by default in proportion to the sources' lengths.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        global_batch: int,
        *,
        seed: int = 0,
        window: int = 1 << 20,
        weights: Mapping[str, float] | None = None,
        packing: Packing | None = None,
    ) -> None:
        if empty := [source.name for source in sources if len(source) == 0]:
            raise ValueError(f"source {empty[0]!r} has no samples: there is nothing to train on")
        if not sources or global_batch < 1 or window < 1:
            raise ValueError(
                f"a stream needs a source, a batch and a window; got {len(sources)} sources, global_batch="
                f"{global_batch}, window={window}"
            )
        names = [source.name for source in sources]
        shares = weights or {source.name: float(len(source)) for source in sources}
        if len(set(names)) < len(names) or shares.keys() != set(names) or min(shares.values()) <= 0:
            raise ValueError(f"each source needs a name of its own and a weight above 0: sources {names}, {shares=}")
        self.sources, self.global_batch, self.seed = tuple(sources), global_batch, seed
        self.window, self.packing = window, packing
        self.shares = [shares[name] / sum(shares.values()) for name in names]
        self._blocks = [_blocks(source) for source in sources]
        self._layout = lru_cache(maxsize=2 * len(names))(self._plan_layout)
        self._window = lru_cache(maxsize=2 * len(names))(self._plan_window)

    def identity(self) -> dict[str, Any]:
        """What decides the batches, as JSON values."""
        packing = self.packing and {"capacity": self.packing.capacity, "lengths": self.packing.fingerprint}
        sources = {
            source.name: {"samples": len(source), "fingerprint": source.fingerprint, "share": share}
            | ({"blocks": _hash(str(blocks.tolist()))} if len(blocks) > 1 else {})
            for source, share, blocks in zip(self.sources, self.shares, self._blocks, strict=True)
        }
        return {
            "global_batch": self.global_batch,
            "seed": self.seed,
            "window": self.window,
            "packing": packing,
            "sources": sources,
        }

    def start(self) -> tuple[Cursor, ...]:
        return (Cursor(),) * len(self.sources)

    def plan(self, cursors: Sequence[Cursor]) -> tuple[list[Unit], tuple[Cursor, ...]]:
        """The units of the next global batch, and the cursors after it. Reads no sample."""
        if len(self.sources) == 1:
            alone, cursor = self._take(0, cursors[0], self.global_batch)
            return alone, (cursor,)
        after, units = list(cursors), []
        for _ in range(self.global_batch):
            total = sum(cursor.taken for cursor in after)
            # The source that is furthest behind its share: exact proportions, with no state but the cursors.
            behind = [share * (total + 1) - cursor.taken for share, cursor in zip(self.shares, after, strict=True)]
            number = behind.index(max(behind))
            taken, after[number] = self._take(number, after[number], 1)
            units += taken
        return units, tuple(after)

    def coming(self, cursors: Sequence[Cursor]) -> list[list[int]]:
        """By source, the blocks that its present window and the next touch, in the order in which they lie there."""
        found = []
        for number, cursor in enumerate(cursors):
            windows = self._windows(number)
            following = (cursor.epoch + (cursor.window + 1) // windows, (cursor.window + 1) % windows)
            blocks: list[int] = []
            for epoch, window in ((cursor.epoch, cursor.window), following):
                start, size = self._extent(number, epoch, window)
                layout = self._layout(number, epoch)
                first, last = np.searchsorted(layout.ends, (start, start + size - 1), side="right")
                blocks += layout.order[first : last + 1].tolist()
            found.append(list(dict.fromkeys(blocks)))
        return found

    def load(self, unit: Unit) -> Loaded:
        """Read a unit's samples."""
        source, values, corrupt = self.sources[unit.source], [], []
        for index in unit.indices:
            try:
                values.append(source.load(index, _key(self.seed, source.name, unit.epoch, index)))
            except CorruptSample as reason:
                corrupt.append({"source": source.name, "id": source.id(index), "reason": str(reason)})
        value = (values or None) if self.packing else next(iter(values), None)
        return Loaded(value, tuple(corrupt))

    def ids(self, unit: Unit) -> list[str]:
        """``source/id`` of the unit's samples."""
        source = self.sources[unit.source]
        return [f"{source.name}/{source.id(index)}" for index in unit.indices]

    def fingerprint(self, units: Sequence[Unit]) -> str:
        """A hash of a batch's sample ids in their order."""
        return _hash("\n".join(",".join(self.ids(unit)) for unit in units))

    def _take(self, number: int, cursor: Cursor, count: int) -> tuple[list[Unit], Cursor]:
        taken: list[Unit] = []
        while len(taken) < count:
            units = self._window(number, cursor.epoch, cursor.window)
            chosen = units[cursor.offset : cursor.offset + count - len(taken)]
            done = cursor.offset + len(chosen)
            if self.packing is None:
                taken += [Unit(number, cursor.epoch, (index,)) for index in chosen.tolist()]
            else:
                taken += [Unit(number, cursor.epoch, tuple(pack)) for pack in chosen]
            cursor = replace(cursor, offset=done, taken=cursor.taken + len(chosen))
            if done == len(units):
                cursor = replace(cursor, offset=0, window=cursor.window + 1)
            if cursor.window == self._windows(number):
                cursor = replace(cursor, window=0, epoch=cursor.epoch + 1)
        return taken, cursor

    def _windows(self, number: int) -> int:
        return -(-len(self.sources[number]) // self.window)

    def _extent(self, number: int, epoch: int, window: int) -> tuple[int, int]:
        """First position and length of an epoch's ``window``-th window."""
        source = self.sources[number]
        place = int(shuffled(self._windows(number), self.seed, source.name, epoch, "windows")[window])
        return place * self.window, min(self.window, len(source) - place * self.window)

    def _plan_layout(self, number: int, epoch: int) -> _Layout:
        lengths = self._blocks[number]
        order = shuffled(len(lengths), self.seed, self.sources[number].name, epoch, "blocks")
        ends = np.cumsum(lengths[order])
        return _Layout(order, ends, (np.cumsum(lengths) - lengths)[order] - (ends - lengths[order]))

    def _plan_window(self, number: int, epoch: int, window: int) -> Any:
        """The units of an epoch's ``window``-th window: sample indices (an array) or, with packing, lists of them."""
        source = self.sources[number]
        start, size = self._extent(number, epoch, window)
        place = start // self.window
        positions = start + shuffled(size, self.seed, source.name, epoch, place)
        layout = self._layout(number, epoch)
        indices = positions + layout.shifts[np.searchsorted(layout.ends, positions, side="right")]
        if self.packing is None:
            return indices
        lengths = _lengths(self.packing.lengths[source.name], indices)
        packs = best_fit(range(size), lengths, self.packing.capacity)
        known = indices.tolist()
        # Best fit leaves full packs of long samples first: shuffle them again.
        mixed = shuffled(len(packs), self.seed, source.name, epoch, place, "packs")
        return [[known[i] for i in packs[pack]] for pack in mixed]


def part(units: Sequence[Unit], rank: int, size: int) -> Sequence[Unit]:
    """A rank's contiguous share of a global batch; shares differ by one unit at most."""
    return units[rank * len(units) // size : (rank + 1) * len(units) // size]


def shuffled(count: int, *key: object) -> np.ndarray:
    """A permutation of ``range(count)`` that depends on the key alone, not on a library's version.

    Sorts by splitmix64 (Steele, Lea and Flood 2014) of the key and the position.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(_key(*key)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable")


def best_fit(indices: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack samples by best fit, the longest first: each into the fullest pack that still has room for it."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the pack), sorted
    for index in sorted(indices, key=lambda index: -lengths[index]):
        length = int(lengths[index])
        found = bisect.bisect_left(room, (length, -1))
        if found < len(room):
            left, number = room.pop(found)
            packs[number].append(index)
        else:
            left, number = capacity, len(packs)
            packs.append([index])
        if left > length:
            bisect.insort(room, (left - length, number))
    return packs


def _blocks(source: Source) -> np.ndarray:
    """The lengths of a source's blocks.

    Raises:
        ValueError: they do not add up to the source's length.
    """
    lengths = np.asarray(getattr(source, "blocks", (len(source),)), dtype=np.int64)
    if lengths.sum() != len(source) or (lengths < 0).any():
        raise ValueError(f"source {source.name!r} has {len(source)} samples, but blocks of {lengths.sum()} in all")
    return lengths


def _lengths(lengths: Sequence[int], indices: np.ndarray) -> Sequence[int]:
    """The lengths of some samples."""
    if hasattr(lengths, "take"):  # an array, or a lazy sequence that reads many at once
        return list(np.asarray(lengths.take(indices)).tolist())
    return [int(lengths[index]) for index in indices.tolist()]


def _key(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
