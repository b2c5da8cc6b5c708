"""Image-text shards read by their index: what they hold, and what happens when they are not what was indexed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import toy_shards as toy
import toy_training
from palate import artifacts
from palate.corpora.pictures import decode_image
from palate.distributed.launch import is_final
from palate.training import shards, stream
from palate.training.loading import Ahead
from palate.training.loop import LoopConfig, OtherRankFailed, train
from palate.training.parallel import World
from palate.training.shards import Cache, CacheTooSmall, IndexMismatch, ShardSource, Unreachable
from palate.training.stream import CorruptSample, Cursor, Stream


def raw(sample, seed):
    return sample


def source(tmp_path, index, decode=raw, max_bytes=1 << 30, **options):
    return ShardSource(index, decode, Cache(tmp_path / "cache", max_bytes), **options)


def unpacked_size(images):
    return [shards._unpacked_size(shard, images._columns, time.sleep) for shard in images._shards]


def cached(tmp_path):
    return sorted(path for path in (tmp_path / "cache" / shards.OWN).iterdir() if path.is_file())


def test_each_format_gives_its_samples(tmp_path):
    index, items = toy.mixed(tmp_path / "data")
    images = source(tmp_path, index)
    assert len(images) == len(items)
    assert images.blocks.tolist() == [5, 4, 6]
    numbers = [0] * 5 + [1] * 4 + [2] * 6
    for place, (number, (key, image, text)) in enumerate(zip(numbers, items, strict=True)):
        found = images.load(place, 0)
        assert images.id(place) == f"{number:05d}/{place - (0, 5, 9)[number]}/{key}"
        assert (found.key, found.image) == (key, image)
        assert found.text == (None if number == 2 else text)
    assert images.load(0, 0).record == {"key": "000000"}
    assert images.load(6, 0).record is None
    assert images.load(9, 0).record["conversations"] == [{"from": "human", "value": "caption 9"}]
    assert images.lengths(lambda characters: characters + 1).take(np.array([14, 0, 10, 7])).tolist() == [1, 10, 11, 10]
    assert images.lengths(lambda characters: 2 * characters)[9] == 18


def test_decode_gets_the_seed_and_its_value_errors_are_corrupt_samples(tmp_path):
    def decode(sample, seed):
        if sample.key == "000001":
            raise ValueError("one pixel is no image")
        return seed

    index, _ = toy.mixed(tmp_path / "data")
    images = source(tmp_path, index, decode)
    assert images.load(0, 71) == 71
    with pytest.raises(CorruptSample, match="one pixel is no image"):
        images.load(1, 71)


def test_what_cannot_be_read_is_a_corrupt_sample(tmp_path):
    bad = [("a", b"\xff\xd8 broken", "text"), ("b", toy.jpeg(1), "text"), ("c", toy.jpeg(2), "text")]
    (tmp_path / "images").mkdir()
    rows = toy.write_llava(tmp_path / "0.json", bad, tmp_path / "images")
    (tmp_path / "images/c.jpg").unlink()
    toy.write_parquet(tmp_path / "1.parquet", [("d", None, "text"), ("e", toy.jpeg(3), None)])
    more = [toy.index_row("d", row=0), toy.index_row("e", row=1)]
    places = toy.write_tar(tmp_path / "2.tar", [("f", toy.jpeg(4), "text")])
    without = [toy.index_row("f", text=(places[0]["text_offset"], places[0]["text_size"]))]
    index = toy.write_index(
        tmp_path / "index",
        [
            (tmp_path / "0.json", "llava", rows, "", str(tmp_path / "images")),
            (tmp_path / "1.parquet", "parquet", more),
            (tmp_path / "2.tar", "tar", without),
        ],
    )
    images = source(tmp_path, index, lambda sample, seed: decode_image(sample.image).size)
    assert [images.load(place, 0) for place in (1, 4)] == [(12, 12)] * 2
    for place, reason in (
        (0, "not an image that can be decoded"),
        (2, "No such file"),
        (3, "no image"),
        (5, "no image"),
    ):
        with pytest.raises(CorruptSample, match=reason):
            images.load(place, 0)


def test_an_image_path_does_not_lead_out_of_the_root(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    content = json.dumps({"id": "a", "image": "../secret.jpg", "conversations": []}).encode()
    (tmp_path / "0.json").write_bytes(content)
    rows = [toy.index_row("a", json=(0, len(content)))]
    index = toy.write_index(tmp_path / "index", [(tmp_path / "0.json", "llava", rows, "", str(tmp_path / "images"))])
    with pytest.raises(CorruptSample, match="not a path below"):
        source(tmp_path, index).load(0, 0)


def test_shards_that_are_not_those_indexed_are_errors(tmp_path):
    index, _ = toy.mixed(tmp_path / "data")
    tar, parquet, llava = (tmp_path / "data" / name for name in ("0.tar", "1.parquet", "2.json"))
    whole = {path: path.read_bytes() for path in (tar, parquet, llava)}

    def fails(place, message):
        with pytest.raises(IndexMismatch, match=message) as caught:
            source(tmp_path, index).load(place, 0)
        assert "jobs/prepare.py captions" in str(caught.value)

    tar.write_bytes(whole[tar][:-512])
    fails(0, r"shard 0 .*0.tar.* has \d+ bytes, but had")
    # As long, but with one sample's members in another order: what lies at the image's place is another file.
    swapped = whole[tar].replace(b"000000.jpg", b"000099.jpg")
    tar.write_bytes(swapped)
    fails(0, "no member of '000000'")
    tar.unlink()
    fails(0, "cannot be opened")
    parquet.write_bytes(whole[parquet][:40] + bytes([whole[parquet][40] ^ 1]) + whole[parquet][41:])
    fails(5, "sha256 is")
    llava.write_bytes(b" " + whole[llava][:-1])
    fails(10, "there is no record")


def test_an_index_that_does_not_fit_itself_is_an_error(tmp_path):
    rows = toy.write_tar(tmp_path / "0.tar", toy.samples(0, 3))
    index = toy.write_index(tmp_path / "index", [(tmp_path / "0.tar", "zip", rows)])
    with pytest.raises(IndexMismatch, match="format is 'zip'"):
        source(tmp_path, index).load(0, 0)
    with pytest.raises(artifacts.ArtifactMissing):
        source(tmp_path, tmp_path / "nothing")
    other = source(tmp_path, toy.write_index(tmp_path / "other", [(tmp_path / "0.tar", "tar", rows)]))
    other._shards[0] = other._shards[0]._replace(samples=2)
    with pytest.raises(IndexMismatch, match=r"00000.arrow has 3 samples, but shards.parquet says 2"):
        other.load(0, 0)


def test_fingerprint_says_what_was_indexed_not_where_it_is(tmp_path):
    index, _ = toy.mixed(tmp_path / "data")
    base = source(tmp_path, index).fingerprint
    rows = toy.write_tar(tmp_path / "0.tar", toy.samples(0, 5))
    (tmp_path / "moved.tar").write_bytes((tmp_path / "0.tar").read_bytes())

    def fingerprint(name, path, rows):
        return source(tmp_path, toy.write_index(tmp_path / name, [(path, "tar", rows)])).fingerprint

    first = fingerprint("a", tmp_path / "0.tar", rows)
    assert fingerprint("b", tmp_path / "moved.tar", rows) == first != base
    assert fingerprint("c", tmp_path / "0.tar", rows[:4]) != first


def test_parquet_images_in_structs_and_row_groups_of_any_size(tmp_path):
    items = toy.samples(0, 150)
    for nested, group in ((True, 7), (False, 1000)):
        path = tmp_path / f"{nested}.parquet"
        index = toy.write_index(
            tmp_path / f"index-{nested}", [(path, "parquet", toy.write_parquet(path, items, nested, group))]
        )
        images = source(tmp_path, index)
        for place in (149, 0, 64, 63, 128, 6, 7):
            assert images.load(place, 0).image == items[place][1]
            assert images.load(place, 0).text == items[place][2]


def test_of_a_damaged_parquet_shard_the_rows_that_were_indexed_are_there(tmp_path):
    path, items = tmp_path / "0.parquet", [(f"{n:06d}", toy.jpeg(n, size=60), "é") for n in range(96)]
    rows = toy.write_parquet(path, items, group=32)
    last = pq.read_metadata(path).row_group(2).column(1)
    content = bytearray(path.read_bytes())
    content[last.data_page_offset : last.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    images = source(tmp_path, toy.write_index(tmp_path / "index", [(path, "parquet", rows[:64])]))
    assert (images.load(63, 0).image, images.load(63, 0).text) == (items[63][1], "é")
    beyond = source(tmp_path, toy.write_index(tmp_path / "beyond", [(path, "parquet", rows)]))
    for place in (64, 0):
        with pytest.raises(IndexMismatch, match="it has no row 95"):
            beyond.load(place, 0)


@pytest.mark.parametrize("error", [pa.ArrowMemoryError("malloc of size 64 failed"), OSError(5, "Input/output error")])
def test_what_cannot_be_read_now_is_no_end_of_a_shard(tmp_path, monkeypatch, error):
    """Else a short file would be kept under the hash of the whole one."""
    path, items = tmp_path / "0.parquet", toy.samples(0, 96)
    rows = toy.write_parquet(path, items, group=32)
    whole = toy.write_index(tmp_path / "index", [(path, "parquet", rows)])
    first = toy.write_index(tmp_path / "first", [(path, "parquet", rows[:32])])
    read, failing = pq.ParquetFile.iter_batches, [True]

    def iter_batches(file, *arguments, **options):
        for number, batch in enumerate(read(file, *arguments, **options)):
            if number == 1 and failing:
                raise error
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    with pytest.raises(type(error), match=r"malloc|Input"):
        source(tmp_path, whole).load(0, 0)
    assert cached(tmp_path) == []
    assert source(tmp_path, first).load(31, 0).image == items[31][1]  # all that this index needs
    failing.clear()
    again = source(tmp_path, whole)
    assert [again.load(place, 0).image for place in (95, 0)] == [items[95][1], items[0][1]]


def test_an_unpacked_file_that_is_shorter_than_the_shard_is_not_kept(tmp_path, monkeypatch):
    path, items = tmp_path / "0.parquet", toy.samples(0, 96)
    index = toy.write_index(tmp_path / "index", [(path, "parquet", toy.write_parquet(path, items))])
    read = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *given, **options: iter([next(read(*given, **options))]))
    with pytest.raises(IndexMismatch, match="it has no row 95, but 32 rows"):
        source(tmp_path, index).load(0, 0)
    assert cached(tmp_path) == []


def test_a_caption_that_is_not_utf8_is_a_corrupt_sample_and_no_more(tmp_path):
    path = tmp_path / "0.parquet"
    table = pa.table({"jpg": [toy.jpeg(0), toy.jpeg(1)], "caption": pa.array([b"\xff", "ö".encode()], pa.binary())})
    pq.write_table(table, path)
    index = toy.write_index(
        tmp_path / "index", [(path, "parquet", [toy.index_row("a", row=0), toy.index_row("b", row=1)])]
    )
    images = source(tmp_path, index)
    assert images.load(1, 0).text == "ö"
    with pytest.raises(CorruptSample, match="utf-8"):
        images.load(0, 0)


def test_only_the_kept_rows_of_a_parquet_shard_are_samples(tmp_path):
    path, items = tmp_path / "0.parquet", toy.samples(0, 10)
    rows = toy.write_parquet(path, items)
    images = source(tmp_path, toy.write_index(tmp_path / "index", [(path, "parquet", rows[2::3])]))
    assert [images.load(place, 0).key for place in range(len(images))] == ["000002", "000005", "000008"]
    assert images.load(1, 0).image == items[5][1]


def test_equal_fingerprints_and_values_on_1_and_3_ranks(tmp_path):
    """On real tar, Parquet and LLaVA shards; the batch of a step is the same however many ranks share it."""
    index, _ = toy.mixed(tmp_path / "data", counts=(11, 13, 9))

    def run(ranks):
        batches = [
            Stream([source(tmp_path, index, lambda s, seed: (s.key, s.image, seed))], 7, window=12)
            for _ in range(ranks)
        ]
        cursors, found = batches[0].start(), []
        for _ in range(12):
            plans = [batch.plan(cursors) for batch in batches]
            parts = [stream.part(units, rank, ranks) for rank, (units, _) in enumerate(plans)]
            values = [b.load(unit).value for b, units in zip(batches, parts, strict=True) for unit in units]
            found.append(({b.fingerprint(u) for b, (u, _) in zip(batches, plans, strict=True)}, values))
            cursors = plans[0][1]
        return found

    one, three = run(1), run(3)
    assert one == three
    assert all(len(fingerprints) == 1 and len(values) == 7 for fingerprints, values in one)
    epoch = [value[0] for _, values in one for value in values][:33]
    assert sorted(epoch) == [f"{n:06d}" for n in range(33)]


class Rank(World):
    """One of two ranks in threads; ``met`` and ``slots`` are shared."""

    def __init__(self, rank, met, slots):
        super().__init__(rank, 2)
        object.__setattr__(self, "met", met)
        object.__setattr__(self, "slots", slots)

    def gather(self, value):
        self.slots[self.rank] = value
        self.met.wait(20)
        found = list(self.slots)
        self.met.wait(20)
        return found

    def barrier(self):
        self.gather(None)

    def sum_(self, tensors):
        for tensor, *all_ in zip(tensors, *self.gather([tensor.clone() for tensor in tensors]), strict=True):
            tensor.copy_(sum(all_))


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_a_shard_that_one_rank_cannot_read_ends_the_step_on_all_ranks(tmp_path, read_ahead):
    """Else the others would wait a day for it."""
    index, _ = toy.mixed(tmp_path / "data", counts=(11, 13, 9))
    samples = toy_training.source().samples
    met, slots, errors = threading.Barrier(2), [None, None], {}

    def work(rank):
        def decode(sample, seed):
            if rank == 1 and int(sample.key) > 20:
                raise IndexMismatch("another file")
            return samples[int(sample.key)]

        model = toy_training.Toy(0.0)
        batches = Stream([source(tmp_path, index, decode)], 4)
        config = LoopConfig(12, tensorboard=False, read_ahead=read_ahead)
        try:
            world = Rank(rank, met, slots)
            groups = toy_training.groups(model)
            train(model, groups, batches, toy_training.weigh, toy_training.loss, config, tmp_path / "run", world)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert isinstance(errors[1], IndexMismatch)
    assert isinstance(errors[0], OtherRankFailed)
    assert "rank 1: IndexMismatch: another file" in str(errors[0])


def test_remote_shards_are_fetched_once_and_bounded(tmp_path, s3_url, caplog):
    index, items = toy.remote(tmp_path, s3_url)
    images = source(tmp_path, index)
    assert [images.load(place, 0).image for place in range(18)] == [item[1] for item in items]
    assert len(cached(tmp_path)) == 3
    assert not [path for path in cached(tmp_path) if ".parquet" in path.name]  # only its unpacked form is kept
    artifacts.locate(s3_url)[0].rm(s3_url, recursive=True)
    again = source(tmp_path, index)
    assert [again.load(place, 0).image for place in range(18)] == [item[1] for item in items]
    sizes = [path.stat().st_size for path in cached(tmp_path)]
    assert source(tmp_path, index, max_bytes=10**6).fetchable([2, 0, 1]) == [2, 0, 1]
    assert source(tmp_path, index, max_bytes=max(sizes)).fetchable([2, 0, 1]) == [2]
    assert "raise --cache-gb, or lower the window" in caplog.text.lower()


def test_the_bound_holds_and_what_was_used_last_stays(tmp_path, s3_url):
    index, items = toy.remote(tmp_path, s3_url, formats=("tar",) * 4)
    size = (tmp_path / "0.tar").stat().st_size
    images = source(tmp_path, index, max_bytes=2 * size + 100)
    order = [0, 6, 0, 12, 0, 18, 6, 1, 13, 19, 7]
    for place in order:
        assert images.load(place, 0).image == items[place][1]
        assert sum(path.stat().st_size for path in cached(tmp_path)) <= 2 * size + 100
    assert {path.name[:8] for path in cached(tmp_path)} == {
        hashlib.sha256((tmp_path / f"{n}.tar").read_bytes()).hexdigest()[:8] for n in (1, 3)
    }


def test_a_shard_larger_than_the_cache_names_the_flag(tmp_path, s3_url):
    index, _ = toy.remote(tmp_path, s3_url)
    with pytest.raises(CacheTooSmall, match=r"shard s3://.*0.tar takes .* raise --cache-gb"):
        source(tmp_path, index, max_bytes=100).load(0, 0)
    with pytest.raises(CacheTooSmall, match=r"shard s3://.*1.parquet"):
        source(tmp_path, index, max_bytes=100).load(6, 0)


def test_a_remote_shard_that_changed_or_went_is_an_error(tmp_path, s3_url, monkeypatch):
    index, _ = toy.remote(tmp_path, s3_url)
    filesystem, bucket = artifacts.locate(s3_url)
    content = (tmp_path / "0.tar").read_bytes()
    filesystem.pipe_file(f"{bucket}/0.tar", content[:-1] + b"x")
    with pytest.raises(IndexMismatch, match="sha256 is"):
        source(tmp_path, index).load(0, 0)
    filesystem.pipe_file(f"{bucket}/0.tar", content[:100])
    with pytest.raises(IndexMismatch, match="has 100 bytes"):
        source(tmp_path, index).load(0, 0)
    filesystem.rm_file(f"{bucket}/0.tar")
    with pytest.raises(IndexMismatch, match="it is gone"):
        source(tmp_path, index).load(0, 0)
    assert cached(tmp_path) == []
    pauses = []
    monkeypatch.setattr(Cache, "pause", lambda self, seconds: pauses.append(seconds))
    monkeypatch.setattr(filesystem, "get_file", lambda *_: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(Unreachable, match=r"s3://.*2.tar cannot be read: no route"):
        source(tmp_path, index).load(12, 0)
    assert sum(pauses) > 240  # a service that is started again, or a route, needs minutes


def test_storage_that_does_not_answer_is_no_error_that_would_come_again():
    assert not is_final(Unreachable("no route"))
    assert is_final(IndexMismatch("another shard"))
    assert is_final(CacheTooSmall("too small"))
    assert not is_final(OSError(errno.EMFILE, "Too many open files"))


def test_a_full_disk_is_not_the_storages_fault(tmp_path, s3_url, monkeypatch):
    index, _ = toy.remote(tmp_path, s3_url, formats=("tar",))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(artifacts.locate(s3_url)[0], "get_file", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        source(tmp_path, index).load(0, 0)


def test_a_run_that_ends_waits_neither_for_room_nor_for_storage(tmp_path, s3_url, monkeypatch):
    """The machine may be taken away 30 s after its notice."""
    index, items = toy.remote(tmp_path, s3_url, formats=("tar", "tar"))
    filesystem, asked = artifacts.locate(s3_url)[0], threading.Event()

    def fail(*_):
        asked.set()
        raise ConnectionError("no route")

    images = source(tmp_path, index)
    with monkeypatch.context() as patched:
        patched.setattr(filesystem, "get_file", fail)
        ahead = Ahead(Stream([images], 4), (Cursor(),), 0, 1, steps=2, readers=2)
        assert asked.wait(20)
        started = time.monotonic()
        ahead.close()
    assert time.monotonic() - started < 20
    images._cache.max_bytes = (tmp_path / "0.tar").stat().st_size
    with images._cache._locked("others"):
        half = images._cache.folder / f"others.{images._cache.max_bytes}.part"
        half.touch()
        ahead = Ahead(Stream([images], 4), (Cursor(),), 0, 1, steps=2, readers=2)
        time.sleep(0.2)
        ahead.close()
    assert images.load(0, 0).image == items[0][1]  # a source that is used again waits again


def open_below(folder: Path) -> int:
    """How many of this process's descriptors are of files in a folder: other threads open and close others."""
    targets = []
    for link in Path("/dev/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own, and what another thread closed
            targets.append(link.readlink())
    return sum(folder in target.parents for target in targets)


def test_all_sources_that_share_a_cache_hold_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (24, 24))
    cache, sources = Cache(tmp_path / "cache", 1 << 30), []
    for name in "abcd":
        (tmp_path / name).mkdir()
        made = []
        for number in range(4):
            path = tmp_path / name / f"{number}.tar"
            made.append((path, "tar", toy.write_tar(path, toy.samples(4 * number, 2))))
        sources.append(ShardSource(toy.write_index(tmp_path / name / "index", made), raw, cache))
    assert cache.handles.most == 6
    largest = 0
    for place in (0, 2, 4, 6, 7, 5, 3, 1):
        for images in sources:
            images.load(place, 0)
            largest = max(largest, open_below(tmp_path))
    assert largest == 6
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert Cache(tmp_path / "cache", 1 << 30).handles.most == shards.HANDLES


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_what_the_machine_lacks_is_neither_another_shard_nor_a_corrupt_sample(tmp_path, monkeypatch, number):
    index, items = toy.mixed(tmp_path / "data")
    failing = OSError(number, os.strerror(number))

    def fail(*_, **__):
        raise failing

    with monkeypatch.context() as patched:
        patched.setattr(shards, "Descriptor", fail)
        for place in (0, 5, 10):
            with pytest.raises(OSError) as caught:
                source(tmp_path, index).load(place, 0)
            assert caught.value is failing
    images = source(tmp_path, index)
    images.load(10, 0)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)  # of an image beside LLaVA's records
        with pytest.raises(OSError) as caught:
            images.load(11, 0)
        assert caught.value is failing
    fresh = source(tmp_path, index)
    with monkeypatch.context() as patched:
        patched.setattr(pa, "memory_map", fail)  # of an index
        with pytest.raises(OSError) as caught:
            fresh.load(0, 0)
        assert caught.value is failing
    assert fresh.load(0, 0).image == items[0][1]


def test_headers_of_tars_by_other_programs(tmp_path):
    """Sizes padded by spaces, in front too, are good; a key that begins another is another."""
    path, items = tmp_path / "0.tar", [("10", toy.jpeg(1), "text"), ("11", toy.jpeg(2), "text")]
    rows = toy.write_tar(path, items)
    content = bytearray(path.read_bytes())
    for row, form in zip(rows, (b"%11o ", b" %o \0"), strict=True):
        for kind in ("image", "text", "json"):
            start = row[f"{kind}_offset"] - 512 + 124
            content[start : start + 12] = (form % row[f"{kind}_size"]).ljust(12, b"\0")[:12]
    path.write_bytes(content)
    images = source(tmp_path, toy.write_index(tmp_path / "index", [(path, "tar", rows)]))
    assert [images.load(place, 0).image for place in range(2)] == [image for _, image, _ in items]
    shorter = toy.write_index(tmp_path / "shorter", [(path, "tar", [{**rows[0], "key": "1"}])])
    with pytest.raises(IndexMismatch, match="no member of '1'"):
        source(tmp_path, shorter).load(0, 0)


def test_ids_are_unique_where_keys_are_not(tmp_path):
    path, items = tmp_path / "0.parquet", toy.samples(0, 3)
    rows = [{**row, "key": "same"} for row in toy.write_parquet(path, items)]
    images = source(tmp_path, toy.write_index(tmp_path / "index", [(path, "parquet", rows)]))
    assert [images.id(place) for place in range(3)] == ["00000/0/same", "00000/1/same", "00000/2/same"]


def test_many_threads_make_a_file_once_and_stay_below_the_bound(tmp_path):
    cache, made, failures = Cache(tmp_path / "cache", 1000), [], []

    def make(name):
        def write(path):
            made.append(name)
            path.write_bytes(name.encode() * 300)

        return write

    def work(seed):
        generator = np.random.default_rng(seed)
        for number in generator.integers(0, 6, 60):
            name = "abcdef"[number]
            found = cache.open(name, 300, name, make(name))
            if found.read(0, 300) != name.encode() * 300:
                failures.append(name)
            if len(there := [path for path in cached(tmp_path) if path.suffix == ".shard"]) > 3:
                failures.append(str(there))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(made) > 6  # some were made again, after others had taken their room
    once = Cache(tmp_path / "other", 1000)
    together = [threading.Thread(target=once.open, args=("z", 300, "z", make("z"))) for _ in range(8)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert made.count("z") == 1


KILLED = """
import sys, time
from pathlib import Path
from palate.training.shards import Cache
def make(path):
    path.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
Cache(Path(sys.argv[1]), 1000).open("name", 900, "it", make)
"""


@pytest.mark.parametrize("name", ["name", "other"])
def test_what_a_killed_process_left_is_neither_read_nor_counted(tmp_path, name):
    worker = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout.readline() == "writing\n"
    assert [path.name for path in cached(tmp_path)] == ["name.900.part"]
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    found = Cache(tmp_path / "cache", 1000).open(name, 800, "it", lambda path: path.write_bytes(b"whole" * 160))
    assert found.read(0, 800) == b"whole" * 160
    assert [path.name for path in cached(tmp_path)] == [f"{name}.shard"]


def test_a_file_that_another_process_is_writing_is_waited_for(tmp_path):
    cache = Cache(tmp_path / "cache", 1000)
    with (cache.folder / "locks/name").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the other process would
        found = []
        thread = threading.Thread(
            target=lambda: found.append(cache.open("name", 4, "it", lambda p: p.write_bytes(b"mine")))
        )
        thread.start()
        (cache.folder / "name.shard").write_bytes(b"hers")
    thread.join()
    assert found[0].read(0, 4) in (b"hers",)


def test_failure_leaves_nothing_in_the_cache(tmp_path):
    def make(path: Path) -> None:
        path.write_bytes(b"half")
        raise ConnectionError("lost")

    with pytest.raises(ConnectionError):
        Cache(tmp_path / "cache", 1000).open("name", 10, "it", make)
    assert cached(tmp_path) == []


def test_a_file_made_while_another_is_has_a_lock_of_its_own(tmp_path):
    """Of 300 names some would share one of 256 locks, and wait for themselves."""
    cache = Cache(tmp_path / "cache", 1 << 20)

    def nested(names):
        if names:
            with cache._locked(names[0], wait=False) as mine:
                assert mine
                nested(names[1:])

    nested([f"{number:03d}" for number in range(300)])


def test_a_remote_parquet_shard_needs_room_for_both_its_forms_at_once(tmp_path, s3_url):
    index, items = toy.remote(tmp_path, s3_url, formats=("parquet",))
    bytes_ = (tmp_path / "0.parquet").stat().st_size
    images = source(tmp_path, index)
    unpacked = unpacked_size(images)[0]
    with pytest.raises(CacheTooSmall, match="raise --cache-gb"):  # each alone would fit
        source(tmp_path, index, max_bytes=bytes_ + unpacked - 1).load(0, 0)
    assert source(tmp_path, index, max_bytes=bytes_ + unpacked).load(0, 0).image == items[0][1]
    assert len(cached(tmp_path)) == 1


def test_many_threads_unpack_remote_parquet_shards_in_a_cache_with_room_for_one(tmp_path, s3_url):
    index, items = toy.remote(tmp_path, s3_url, formats=("parquet",) * 3)
    images = source(tmp_path, index)
    room = max(size + shard.bytes for size, shard in zip(unpacked_size(images), images._shards, strict=True))
    images = source(tmp_path, index, max_bytes=room)
    found = {}
    threads = [
        threading.Thread(target=lambda place=place: found.update({place: images.load(place, 0).image}), daemon=True)
        for place in (0, 6, 12, 1, 7, 13)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == {place: items[place][1] for place in (0, 6, 12, 1, 7, 13)}


def test_a_wait_for_room_ends_when_those_who_write_do_not_get_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PATIENCE", 0.1)
    cache = Cache(tmp_path / "cache", 1000)
    with cache._locked("hung"):
        (cache.folder / "hung.900.part").touch()
        with pytest.raises(TimeoutError, match=r"it takes .* has no room: .* \(hung.900.part\)"):
            cache.open("name", 200, "it", lambda path: path.write_bytes(b"mine"))
    assert cache.open("name", 200, "it", lambda path: path.write_bytes(b"mine")).read(0, 4) == b"mine"


def test_what_became_larger_than_there_is_room_for_is_made_again_in_its_turn(tmp_path):
    cache, sizes = Cache(tmp_path / "cache", 1000), []
    with cache._locked("other"):
        other = cache.folder / "other.700.part"
        other.touch()

        def make(path):
            sizes.append(path.name)
            path.write_bytes(b"x" * 400)
            if len(sizes) == 1:
                threading.Timer(0.2, other.unlink).start()

        assert cache.open("name", 100, "it", make).size == 400
    assert sizes == ["name.100.part", "name.400.part"]
    assert [path.name for path in cached(tmp_path)] == ["name.shard"]


def test_files_of_others_in_the_folder_stay_and_do_not_count(tmp_path):
    (tmp_path / "cache").mkdir()
    for name in ("photograph.jpg", "film.part", "x.900.part", "old.shard"):
        (tmp_path / "cache" / name).write_bytes(b"precious" * 100)
    cache = Cache(tmp_path / "cache", 1000)
    (cache.folder / "notes.txt").write_bytes(b"precious")
    for name in "abc":
        cache.open(name, 900, name, lambda path: path.write_bytes(b"x" * 900))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_file()) == [
        "film.part",
        "old.shard",
        "photograph.jpg",
        "x.900.part",
    ]
    assert [path.name for path in cached(tmp_path)] == ["c.shard", "notes.txt"]


def test_the_room_of_an_unpacked_shard_is_known_before(tmp_path):
    """Compressed much, as metadata say; the file's own size says little."""
    path, items = tmp_path / "0.parquet", [(f"{n}", b"\0" * 9_000 + bytes([n]), "é" * n) for n in range(100)]
    for nested in (True, False):
        index = toy.write_index(
            tmp_path / f"index{nested}", [(path, "parquet", toy.write_parquet(path, items, nested, 40))]
        )
        images = source(tmp_path / str(nested), index)
        assert images.load(99, 0).image == items[99][1]
        size = cached(tmp_path / str(nested))[0].stat().st_size
        assert path.stat().st_size * 5 < size
        assert size <= unpacked_size(images)[0] <= 1.1 * size


def test_an_index_in_object_storage_is_read_shard_by_shard(tmp_path, s3_url):
    path = tmp_path / "0.parquet"
    items = toy.samples(0, 4)
    index = toy.write_index(f"{s3_url}/index", [(path, "parquet", toy.write_parquet(path, items))])
    assert source(tmp_path, index.url).load(2, 0).image == items[2][1]
    assert pq.read_metadata(path).num_rows == 4
