"""The global batches: pure, exact, and the same for every number of ranks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.training import stream
from palate.training.stream import Cursor, ListSource, Packing, Stream


def source(name, count):
    return ListSource(name, list(range(count)), [f"{name}{i}" for i in range(count)])


def take(batches, steps, cursors=None):
    cursors, found = cursors or batches.start(), []
    for _ in range(steps):
        units, cursors = batches.plan(cursors)
        found.append(units)
    return found, cursors


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), batch=st.integers(1, 17), window=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_epoch_has_each_sample_exactly_once(count, batch, window, seed):
    batches = Stream([source("s", count)], batch, seed=seed, window=window)
    steps = -(-3 * count // batch)
    order = [unit for units in take(batches, steps)[0] for unit in units]
    for epoch in range(3):
        part = order[epoch * count : (epoch + 1) * count]
        assert sorted(unit.indices[0] for unit in part) == list(range(count))
        assert {unit.epoch for unit in part} == {epoch}


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 9), cut=st.integers(0, 30), window=st.integers(1, 12))
def test_going_on_from_any_cursor_gives_the_same_batches(batch, cut, window):
    def make():
        return Stream([source("s", 23), source("t", 5)], batch, seed=1, window=window)

    whole, end = take(make(), 31)
    _, middle = take(make(), cut)
    rest, rest_end = take(make(), 31 - cut, middle)
    assert rest == whole[cut:]
    assert rest_end == end


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    def orders(seed):
        found, _ = take(Stream([source("s", 50)], 50, seed=seed), 2)
        return [[unit.indices[0] for unit in units] for units in found]

    assert orders(0) == orders(0)
    first, second = orders(0)
    assert first != second
    assert first != orders(1)[0]
    # Pinned: a run that began with another numpy, or on another machine, goes on with the same order.
    assert stream.shuffled(10, "pinned", 3).tolist() == [7, 1, 5, 9, 6, 3, 8, 4, 0, 2]


def test_shuffling_is_uniform():
    """Each place sees each of 5 samples equally often: chi-squared of 25 cells, 16 degrees of freedom."""
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[range(5), stream.shuffled(5, seed)] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 39.3  # the 0.999 quantile


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_take_contiguous_near_equal_parts(size):
    units, _ = Stream([source("s", 23)], 13).plan((Cursor(),))
    parts = [stream.part(units, rank, size) for rank in range(size)]
    assert [unit for part in parts for unit in part] == units
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert max(map(len, parts)) == -(-13 // size)


def test_a_mixture_keeps_its_shares_at_every_moment():
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    batches = Stream([source("a", 11), source("b", 1000), source("c", 3)], 10, weights=weights)
    found, cursors = take(batches, 30)
    for units in found:
        assert Counter(unit.source for unit in units) == {0: 6, 1: 3, 2: 1}
    assert [cursor.taken for cursor in cursors] == [180, 90, 30]
    assert [cursor.epoch for cursor in cursors] == [180 // 11, 0, 10]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=40), window=st.integers(1, 40))
def test_packs_keep_the_capacity_and_lose_nothing(lengths, window):
    packing = Packing(20, {"s": lengths}, "tokenizer")
    batches = Stream([source("s", len(lengths))], 1, window=window, packing=packing)
    cursors, packs = batches.start(), []
    while cursors[0].epoch == 0:
        units, cursors = batches.plan(cursors)
        packs += [unit.indices for unit in units]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[i] for i in pack) <= 20 or len(pack) == 1
        assert len({i // window for i in pack}) == 1  # no pack crosses a window


def test_best_fit_fills_packs():
    assert stream.best_fit([0, 1, 2, 3, 4], [4, 6, 5, 5, 10], 10) == [[4], [1, 0], [2, 3]]


def test_a_corrupt_sample_keeps_its_place_alone_and_in_a_pack():
    class Partly(ListSource):
        def load(self, index, seed):
            if index == 1:
                raise stream.CorruptSample("cut off")
            return index

    samples = Partly("s", [0, 1, 2], ["a", "b", "c"])
    single = Stream([samples], 3)
    units, _ = single.plan(single.start())
    loaded = {unit.indices[0]: single.load(unit) for unit in units}
    assert loaded[1] == stream.Loaded(None, ({"source": "s", "id": "b", "reason": "cut off"},))
    assert loaded[2].value == 2
    packed = Stream([samples], 1, packing=Packing(9, {"s": [3, 3, 3]}, "t"))
    (pack,), _ = packed.plan(packed.start())
    assert sorted(packed.load(pack).value) == [0, 2]
    assert packed.load(pack).corrupt[0]["id"] == "b"


def test_the_seed_of_a_sample_is_its_own_in_each_epoch():
    class Random(ListSource):
        def load(self, index, seed):
            return seed

    batches = Stream([Random("s", [0, 1, 2], ["a", "b", "c"])], 6)
    units, _ = batches.plan(batches.start())
    seeds = [batches.load(unit).value for unit in units]
    assert len(set(seeds)) == 6
    again = Stream([Random("s", [0, 1, 2], ["a", "b", "c"])], 2)
    assert [again.load(unit).value for unit in units] == seeds


class Sharded:
    """Numbered samples in blocks of the given lengths; nothing is kept of a sample."""

    name = fingerprint = "sharded"

    def __init__(self, blocks):
        self.blocks = np.asarray(blocks)
        self.ends = np.cumsum(self.blocks)

    def __len__(self):
        return int(self.ends[-1])

    def id(self, index):
        return f"{np.searchsorted(self.ends, index, side='right')}/{index}"

    def load(self, index, seed):
        return index


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum),
    batch=st.integers(1, 17),
    window=st.integers(1, 50),
    cut=st.integers(0, 20),
)
def test_blocks_lose_nothing_and_go_on_from_any_cursor(blocks, batch, window, cut):
    def make():
        return Stream([Sharded(blocks)], batch, seed=2, window=window)

    count, steps = sum(blocks), -(-2 * sum(blocks) // batch)
    whole, end = take(make(), steps)
    order = [unit.indices[0] for units in whole for unit in units]
    for epoch in range(2):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))
    first, middle = take(make(), min(cut, steps))
    rest, rest_end = take(make(), steps - min(cut, steps), middle)
    assert (first + rest, rest_end) == (whole, end)


def test_one_block_is_the_order_without_blocks():
    class Plain(Sharded):
        blocks = None

        def __getattribute__(self, name):
            if name == "blocks":
                raise AttributeError(name)
            return super().__getattribute__(name)

        def __init__(self, count):
            self.ends = np.array([count])

    for window in (7, 100):
        one, plain = (Stream([source], 4, seed=3, window=window) for source in (Sharded([40]), Plain(40)))
        assert take(one, 25) == take(plain, 25)
        assert one.identity() == plain.identity()
    # Pinned: checkpoints of runs that began before there were blocks stay valid.
    assert [unit.indices[0] for unit in take(Stream([source("s", 9)], 9, seed=1, window=4), 1)[0][0]] == [
        8,
        0,
        1,
        2,
        3,
        5,
        6,
        7,
        4,
    ]


def test_windows_cut_few_blocks_and_each_epoch_orders_them_anew():
    blocks = Sharded(np.random.default_rng(0).integers(5, 15, 60))
    batches = Stream([blocks], 50, window=50)
    windows, epochs = -(-len(blocks) // 50), []
    for epoch in range(2):
        planned = [batches._plan_window(0, epoch, window) for window in range(windows)]
        touched = [set(np.searchsorted(blocks.ends, indices, side="right").tolist()) for indices in planned]
        assert sum(map(len, touched)) <= 60 + windows - 1  # a block is cut where two windows meet, and nowhere else
        epochs.append(touched)
    assert not [window for window in epochs[0] if window in epochs[1]]


def test_coming_blocks_are_those_of_this_window_and_the_next():
    blocks = Sharded([4, 4, 4, 4, 4])
    batches = Stream([blocks, source("one", 3)], 1, window=8, weights={"sharded": 1.0, "one": 1.0})
    for window in range(3):
        here, there = (Cursor(window=window), Cursor(epoch=(window + 1) // 3, window=(window + 1) % 3))
        touched = []
        for cursor in (here, there):
            planned = batches._plan_window(0, cursor.epoch, cursor.window)
            touched.append({index // 4 for index in planned.tolist()})
        coming = batches.coming((here, Cursor()))
        assert set(coming[0]) == touched[0] | touched[1]
        assert set(coming[0][: len(touched[0])]) == touched[0]
        assert coming[1] == [0]


def test_lazy_lengths_pack_as_a_list_does():
    class Lazy:
        def __len__(self):
            return 60

        def __getitem__(self, index):
            raise AssertionError("asked for one at a time")

        def take(self, indices):
            assert len(indices) <= 16  # a window
            return np.array(known)[indices]

    known = np.random.default_rng(1).integers(1, 20, 60).tolist()
    lazy, plain = (
        Stream([Sharded([11, 9, 25, 15])], 3, window=16, packing=Packing(20, {"sharded": lengths}, "t"))
        for lengths in (Lazy(), known)
    )
    assert take(lazy, 20) == take(plain, 20)


def test_fingerprints_tell_batches_apart_and_identity_the_streams():
    batches = Stream([source("s", 40)], 4)
    found, _ = take(batches, 10)
    assert len({batches.fingerprint(units) for units in found}) == 10
    base = batches.identity()
    assert Stream([source("s", 40)], 4).identity() == base
    changed = [
        Stream([source("s", 40)], 5),
        Stream([source("s", 40)], 4, seed=1),
        Stream([source("s", 40)], 4, window=7),
        Stream([source("s", 41)], 4),
        Stream([ListSource("s", list(range(40)), [f"x{i}" for i in range(40)])], 4),
        Stream([source("s", 40)], 4, packing=Packing(9, {"s": [1] * 40}, "t")),
    ]
    assert Stream([Sharded([20, 20])], 4).identity() != Stream([Sharded([10, 30])], 4).identity()
    assert all(other.identity() != base for other in changed)


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(ValueError, match="source 'empty' has no samples"):
        Stream([source("empty", 0)], 4)
    with pytest.raises(ValueError, match="name of its own"):
        Stream([source("s", 3), source("s", 3)], 4)
    with pytest.raises(ValueError, match="a weight above 0"):
        Stream([source("s", 3)], 4, weights={"t": 1.0})
    with pytest.raises(ValueError, match="global_batch=0"):
        Stream([source("s", 3)], 0)
    with pytest.raises(ValueError, match="3 samples but 1 ids"):
        ListSource("s", [1, 2, 3], ["a"])
    wrong = Sharded([2, 3])
    wrong.blocks = [2, 2]
    with pytest.raises(ValueError, match="5 samples, but blocks of 4"):
        Stream([wrong], 4)


def test_200_000_samples_in_2_000_shards_are_each_seen_once_through_kills_on_8_then_48_then_20_ranks():
    """The small form of ``benchmarks/streaming.py --proof``: every process knows the last checkpoint alone."""
    sizes = np.random.default_rng(0).integers(1, 200, 2000)
    ends = np.rint(np.cumsum(sizes) / sizes.sum() * 200_000).astype(np.int64)
    shards = Sharded(np.diff(ends, prepend=0))
    batch, every, steps = 1000, 8, 200
    kills = {(int(step), bool(late)) for step, late in np.random.default_rng(1).integers((1, 0), (steps, 2), (12, 2))}
    seen, batches_seen = np.zeros(len(shards), np.int64), {}
    saved, pending, restarts = (0, Stream([shards], 1).start()), [], 0
    while saved[0] < steps:
        step, cursors = saved[0], tuple(Cursor(**vars(cursor)) for cursor in saved[1])
        batches, pending, restarts = Stream([shards], batch, window=4096), [], restarts + 1
        while step < steps:
            units, cursors = batches.plan(cursors)
            ranks = (8, 48, 20)[step * 3 // steps]
            taken = [unit.indices[0] for rank in range(ranks) for unit in stream.part(units, rank, ranks)]
            step += 1
            assert batches_seen.setdefault(step, taken) == taken
            pending += taken
            if (step, False) in kills:  # before the checkpoint
                kills.discard((step, False))
                break
            if step % every == 0 or step == steps:
                np.add.at(seen, pending, 1)
                saved, pending = (step, cursors), []
            if (step, True) in kills:
                kills.discard((step, True))
                break
    assert restarts > 10
    assert (seen == 1).all()
    assert cursors == (Cursor(epoch=1, taken=200_000),)


def test_windows_of_200_million_samples_hold_what_the_whole_order_says():
    """Some windows of a corpus of full size, against its order written out position by position."""
    sizes = np.random.default_rng(0).lognormal(0.0, 0.5, 20_000)
    ends = np.rint(np.cumsum(sizes) / sizes.sum() * 200_000_000).astype(np.int64)
    shards = Sharded(np.diff(ends, prepend=0))
    big = Stream([shards], 64, seed=5, window=1 << 16)  # smaller than the benchmark's: milliseconds
    windows = -(-200_000_000 // (1 << 16))
    places = stream.shuffled(windows, 5, "sharded", 3, "windows")
    order = stream.shuffled(20_000, 5, "sharded", 3, "blocks")
    met: set[int] = set()
    for window in sorted({0, 1, 777, windows - 1, int(np.argmax(places))}):  # the last: the one that is not full
        first = int(places[window]) << 16
        found = np.sort(big._plan_window(0, 3, window))
        # The same positions, walking over the shards in the epoch's order.
        expected, position = [], 0
        for shard in order.tolist():
            length = int(shards.blocks[shard])
            low, high = max(first, position), min(first + (1 << 16), position + length)
            if low < high:
                begin = int(shards.ends[shard]) - length
                expected.append(np.arange(begin + low - position, begin + high - position))
            position += length
        assert np.array_equal(found, np.sort(np.concatenate(expected)))
        assert met.isdisjoint(found.tolist())
        met.update(found.tolist())
    _, cursors = big.plan((Cursor(epoch=3, window=777, offset=40_000, taken=3 * 200_000_000),))
    assert cursors[0].offset == 40_064
