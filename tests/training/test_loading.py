"""Reading ahead changes when samples are loaded, and nothing else."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import toy_shards
import toy_training as toy
from palate.training import loading, loop
from palate.training.loading import Ahead
from palate.training.logging import read
from palate.training.loop import LoopConfig
from palate.training.shards import Cache, ShardSource
from palate.training.stream import CorruptSample, Cursor, ListSource, Packing, Stream


class Slow(ListSource):
    """Takes another time for each sample, notes how many were asked for, and fails at ``bad``."""

    def __init__(self, count, bad=-1, corrupt=-1):
        super().__init__("slow", list(range(count)), [str(n) for n in range(count)])
        self.bad, self.corrupt, self.loads = bad, corrupt, []

    def load(self, index, seed):
        self.loads.append(index)
        time.sleep(index % 3 * 0.001)
        if index == self.bad:
            raise RuntimeError(f"sample {index} failed")
        if index == self.corrupt:
            raise CorruptSample("cut off")
        return index, seed


def steps(stream, count, cursors=None, **options):
    with Ahead(stream, cursors or stream.start(), options.pop("rank", 0), options.pop("size", 1), **options) as ahead:
        return [ahead.take() for _ in range(count)]


@pytest.mark.parametrize("ahead", [1, 3, 50])
@pytest.mark.parametrize("packing", [None, Packing(20, {"slow": [1 + n % 9 for n in range(37)]}, "t")])
def test_order_and_values_are_those_of_the_plain_loop(ahead, packing):
    def make():
        return Stream([Slow(37, corrupt=5)], 5, window=11, packing=packing)

    for rank, size in ((0, 1), (1, 3)):
        plain = steps(make(), 20, rank=rank, size=size, steps=0, readers=1)
        assert steps(make(), 20, rank=rank, size=size, steps=ahead, readers=3) == plain
        rest = steps(make(), 7, plain[12].cursors, rank=rank, size=size, steps=ahead, readers=3)
        assert rest == plain[13:]
    assert any(item.corrupt for step in steps(make(), 20, steps=ahead, readers=3) for item in step.loaded)


def test_only_so_many_steps_are_loaded_ahead():
    source = Slow(1000)
    with Ahead(Stream([source], 10), Stream([source], 10).start(), 0, 1, steps=3, readers=2) as ahead:
        for taken in range(1, 6):
            ahead.take()
            deadline = time.monotonic() + 10
            while len(source.loads) < 10 * (taken + 3) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert len(source.loads) == 10 * (taken + 3)


def test_a_failure_surfaces_in_its_step_and_ends_the_threads():
    before = threading.active_count()
    stream = Stream([Slow(40, bad=17)], 4)
    units, cursors, place = [], stream.start(), 0
    while all(unit.indices != (17,) for unit in units):
        units, cursors = stream.plan(cursors)
        place += 1
    with Ahead(stream, stream.start(), 0, 1, steps=20, readers=3) as ahead:
        for _ in range(place - 1):
            ahead.take()
        with pytest.raises(RuntimeError, match="sample 17 failed"):
            ahead.take()
    assert threading.active_count() == before


def test_a_failing_plan_is_raised_and_stays_raised():
    stream = Stream([Slow(4)], 2)
    stream._window = lambda *_: 1 / 0
    with Ahead(stream, stream.start(), 0, 1, steps=2, readers=1) as ahead:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                ahead.take()


def test_closing_early_waits_for_nothing_but_what_is_running():
    source = Slow(10_000)
    started = time.monotonic()
    ahead = Ahead(Stream([source], 1000), Stream([source], 1000).start(), 0, 1, steps=8, readers=2)
    ahead.close()
    ahead.close()
    assert time.monotonic() - started < 5
    assert len(source.loads) < 8000


def test_the_blocks_of_this_window_are_fetched_and_then_those_of_the_next(monkeypatch):
    class Far(Slow):
        def __init__(self):
            super().__init__(40)
            self.blocks, self.fetched, self.room = [10] * 4, [], 40

        def fetch(self, block):
            self.fetched.append(block)
            if block == 2:
                raise OSError("no route")

        def fetchable(self, blocks):
            return blocks[: self.room // 10]

    def run(room):
        source = Far()
        source.room = room
        stream = Stream([source], 5, window=10, seed=4)
        orders = [stream.coming((Cursor(window=window),))[0][0] for window in range(4)]
        taken = steps(stream, 7, steps=1, readers=1)
        return orders, source.fetched, taken

    monkeypatch.setattr(loading, "FETCHERS", 1)  # so that the order of fetching can be seen
    orders, fetched, taken = run(room=40)
    assert [{unit.indices[0] // 10 for unit in step.units} for step in taken[::2]] == [{block} for block in orders]
    assert fetched[:4] == orders
    _, fetched, _ = run(room=10)
    assert fetched[:4] == orders  # with room for one, each comes when its window does


def test_remote_shards_are_near_before_they_are_needed(tmp_path, s3_url):
    index, items = toy_shards.remote(tmp_path, s3_url)
    images = ShardSource(index, lambda sample, seed: sample.image, Cache(tmp_path / "cache", 1 << 30))
    stream = Stream([images], 6, window=6)
    taken = steps(stream, 3, steps=2, readers=2)
    assert sorted(item.value for step in taken for item in step.loaded) == sorted(item[1] for item in items)
    assert len(list((tmp_path / "cache").rglob("*.shard"))) == 3


def train(folder, source, pause=0.0, **config):
    def loss(*arguments):
        time.sleep(pause)
        return toy.loss(*arguments)

    torch.manual_seed(0)
    model = toy.Toy(0.2)
    settings = LoopConfig(12, checkpoint_every=4, **{"tensorboard": False, **config})
    loop.train(model, toy.groups(model), Stream([source], 5), toy.weigh, loss, settings, folder)


def test_a_run_that_reads_ahead_is_the_run_that_does_not(tmp_path):
    for name, ahead in (("plain", 0), ("ahead", 3)):
        train(tmp_path / name, toy.source(), read_ahead=ahead, readers=3)
    assert toy.trace(tmp_path / "ahead") == toy.trace(tmp_path / "plain")
    last = "checkpoints/step-00000012/rank-00000.safetensors"
    plain, ahead = (load_file(tmp_path / name / last) for name in ("plain", "ahead"))
    assert plain.keys() == ahead.keys()
    assert all(ahead[key].equal(tensor) for key, tensor in plain.items())
    # Read-ahead is no part of what a run is: the one goes on where the other stopped.
    train(tmp_path / "plain", toy.source(), read_ahead=2)


def test_the_share_of_a_step_that_waited_for_data_is_logged(tmp_path, monkeypatch):
    """By a clock that a load moves by 1 s, and a loss by 3 s."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Late(toy.Source):
        def load(self, index, seed):
            if threading.current_thread() is threading.main_thread():
                now[0] += 1
            return super().load(index, seed)

    def pause(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", pause)
    ready = toy.source()
    for name, ahead in (("plain", 0), ("ahead", 2)):
        train(tmp_path / name, Late("toy", ready.samples, ready.ids), 3.0, read_ahead=ahead, tensorboard=ahead == 0)
    assert {row["data_wait"] for row in read(tmp_path / "plain")} == {0.625}  # 5 loads and a loss
    assert {row["data_wait"] for row in read(tmp_path / "ahead")} == {0.0}
    events = EventAccumulator(str(tmp_path / "plain/tensorboard"))
    events.Reload()
    assert "data_wait" in events.Tags()["scalars"]


def test_read_ahead_is_checked():
    with pytest.raises(ValueError, match="read_ahead must be at least 0, got -1"):
        LoopConfig(3, read_ahead=-1)
    with pytest.raises(ValueError, match="readers must be at least 1, got 0"):
        LoopConfig(3, readers=0)
