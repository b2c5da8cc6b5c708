"""The exact stream at size: each sample once, a restart, and throughput against ``webdataset``.

    python benchmarks/streaming.py --proof           200M samples in 20,000 shards, simulated, one epoch, with kills
    python benchmarks/streaming.py --restart         an index of 20,000 shards opened, the first batch decoded
    python benchmarks/streaming.py --throughput      against webdataset, same shards and decode, local and from S3

With ``grain`` installed (`pip install .[bench]`), it reads the Parquet form of the same shards; tar it does not read.

Variants take turns and a ratio is the median over the turns, so that a machine shared with others slows all alike;
only ratios mean anything there. S3 is a ``moto`` server in another process; the cache is empty before every turn.
"""

import dataclasses
import gc
import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image

from palate import artifacts, progress
from palate.corpora.captions import IMAGE_TEXT_INDEX, INDEX, SHARDS, RawSample
from palate.corpora.image_text import read_tar, sha256_of
from palate.training.loading import Ahead
from palate.training.shards import Cache, ShardSource
from palate.training.stream import Cursor, Stream, part


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure; see the module's text."""

    proof: bool = False
    restart: bool = False
    throughput: bool = False
    samples: int = 200_000_000
    """Of the proof and of the restart."""
    shards: int = 20_000
    window: int = 1 << 20
    global_batch: int = 8192
    """Of the proof."""
    kills: int = 40
    turns: int = 5
    """Of the throughput, each variant."""
    turn_shards: int = 8
    turn_samples: int = 300
    """In each of these shards."""
    shuffled: int = 400
    """Samples in a window of the stream, and in webdataset's buffer."""
    workers: int = 2
    """Threads of the stream, processes of webdataset."""
    folder: Path | None = None
    """For the shards that are made; default: a temporary one."""
    out: Path = Path("benchmarks/out/streaming.json")
    child: str = ""
    """The index that a restarted process opens; set by the script itself."""


# (a) Every sample exactly once


class Simulated:
    """Samples that are only numbers, in shards of unequal sizes."""

    name = fingerprint = "simulated"

    def __init__(self, samples: int, shards: int) -> None:
        sizes = np.random.default_rng(0).lognormal(0.0, 0.5, shards)
        ends = np.rint(np.cumsum(sizes) / sizes.sum() * samples).astype(np.int64)
        self.blocks, self._samples = np.diff(ends, prepend=0), samples

    def __len__(self) -> int:
        return self._samples

    def id(self, index: int) -> str:
        return str(index)

    def load(self, index: int, seed: int) -> int:
        return index


def prove(config: Config, worlds: tuple[int, ...] = (8, 48, 20)) -> dict[str, Any]:
    """One epoch whose processes are killed again and again; each time the run goes on from its last checkpoint, on
    other numbers of ranks. Counts how often each sample was trained on, kept steps only."""
    source = Simulated(config.samples, config.shards)
    steps, every = -(-config.samples // config.global_batch), 50
    generator = np.random.default_rng(1)
    kills = sorted(generator.choice(np.arange(1, steps), min(config.kills, steps - 1), replace=False).tolist())
    seen = np.zeros(config.samples, dtype=np.uint8)
    step, repeated = 0, 0
    checkpoint = json.dumps([0, [dataclasses.asdict(cursor) for cursor in Stream([source], 1).start()]])
    pending: list[np.ndarray] = []
    hashes: dict[int, str] = {}  # of steps since the last checkpoint
    started = time.perf_counter()
    with progress.meter("proof", total=steps, unit="step") as bar:
        while step < steps:
            # A process starts: it knows the checkpoint, and nothing else.
            step, saved = json.loads(checkpoint)
            cursors = tuple(Cursor(**cursor) for cursor in saved)
            stream = Stream([source], config.global_batch, window=config.window)
            pending.clear()
            while step < steps:
                units, cursors = stream.plan(cursors)
                ranks = worlds[min(len(worlds) - 1, step * len(worlds) // steps)]
                taken = [[unit.indices[0] for unit in part(units, rank, ranks)] for rank in range(ranks)]
                step += 1
                batch = np.concatenate([np.array(mine, dtype=np.int64) for mine in taken])
                found = hashlib.sha256(batch.tobytes()).hexdigest()
                if hashes.setdefault(step, found) != found:
                    raise AssertionError(f"step {step} was another batch after the restart")
                repeated += step <= bar.n
                bar.update(max(0, step - bar.n))
                epoch = len(units) if cursors[0].epoch == 0 else sum(unit.epoch == 0 for unit in units)
                pending.append(batch[:epoch])
                if kills and step == kills[0]:
                    kills.pop(0)
                    if step % every:
                        break  # before the step's checkpoint, if it has one
                if step % every == 0 or step == steps:
                    found_now, times = np.unique(np.concatenate(pending), return_counts=True)
                    seen[found_now] += times.astype(np.uint8)
                    pending.clear()
                    hashes.clear()
                    checkpoint = json.dumps([step, [dataclasses.asdict(cursor) for cursor in cursors]])
    return {
        "samples": config.samples,
        "shards": [config.shards, int(source.blocks.min()), int(source.blocks.max())],
        "steps": steps,
        "ranks": worlds,
        "steps_repeated_after_kills": repeated,
        "seen_once": int((seen == 1).sum()),
        "never": int((seen == 0).sum()),
        "more_than_once": int((seen > 1).sum()),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gb": round(peak_memory() / 1e9, 3),
    }


# (b) A restart


def restart(config: Config, folder: Path) -> dict[str, Any]:
    """A fresh process opens an index of many shards in the middle of an epoch and decodes its first batch.

    The shards and their index files are hard links to one of each, so that a corpus of this size fits on any disk.
    """
    per_shard = config.samples // config.shards
    images = [jpeg(number, 128) for number in range(64)]
    tar = folder / "first.tar"
    write_tar(tar, ((f"{number:06d}", images[number % 64], f"caption {number}") for number in range(per_shard)))
    print(f"{config.shards} links to a tar of {tar.stat().st_size / 1e6:.0f} MB", flush=True)
    (folder / "shards").mkdir()
    files = [folder / f"shards/{number:05d}.tar" for number in range(config.shards)]
    for file in files:
        file.hardlink_to(tar)
    index = write_index(folder / "index", [(str(file), file) for file in files], same=True)
    command = [sys.executable, __file__, "--child", index.url, "--window", str(config.window)]
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(
            json.loads(found.stdout.splitlines()[-1]) | {"whole_process_seconds": time.perf_counter() - started}
        )
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def restarted(config: Config) -> None:
    """The fresh process: what it prints is read by ``restart``."""
    started = time.perf_counter()
    with TemporaryDirectory() as cache:
        source = ShardSource(config.child, decode, Cache(cache, 1 << 30))
        opened = time.perf_counter() - started
        stream = Stream([source], 256, window=config.window)
        half = Cursor(epoch=1, window=stream._windows(0) // 2, offset=1000, taken=len(source) * 3 // 2)
        with Ahead(stream, (half,), 0, 1, steps=1, readers=2) as ahead:
            step = ahead.take()
            decoded = time.perf_counter() - started
            assert all(item.value is not None for item in step.loaded)
            fingerprint = stream.fingerprint(step.units)
    figures = {
        "samples": len(source),
        "index_opened_seconds": opened,
        "first_batch_seconds": decoded,
        "whole_process_cpu_seconds": sum(os.times()[:2]),
        "peak_memory_gb": peak_memory() / 1e9,
    }
    print(fingerprint)
    print(json.dumps(figures))


# (d) Throughput


Variant = Callable[[], int]  # reads an epoch; returns the samples


def throughput(config: Config, folder: Path) -> dict[str, Any]:
    """Samples a second of an epoch, from making the loader to its last batch, in turns."""
    files = []
    for number in range(config.turn_shards):
        files.append(folder / f"{number:05d}.tar")
        first = number * config.turn_samples
        write_tar(
            files[-1], ((f"{n:06d}", jpeg(n, 256), f"caption {n}") for n in range(first, first + config.turn_samples))
        )
    found: dict[str, Any] = {"tar_megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1)}
    local = write_index(folder / "local", [(str(file), file) for file in files])
    tables = [parquet_of(file) for file in files]
    parquet = write_index(folder / "parquet", [(str(file), file) for file in tables], "parquet")
    found["local"] = compare(
        config,
        {
            "stream": lambda: read_stream(config, local, folder),
            "stream_parquet_cold": lambda: read_stream(config, parquet, folder),
            "webdataset_processes": lambda: read_webdataset(config, [str(file) for file in files], config.workers),
            "webdataset_one": lambda: read_webdataset(config, [str(file) for file in files], 0),
        },
    )
    if find_spec("grain"):
        found["parquet"] = compare(
            config,
            {"stream": lambda: read_stream(config, parquet, folder), "grain": lambda: read_grain(config, tables)},
        )
    with s3_server() as endpoint:
        urls = [upload(file, "shards") for file in files]
        remote = write_index(folder / "remote", list(zip(urls, files, strict=True)))
        web = [f"pipe:curl -s -f {endpoint}/shards/{file.name}" for file in files]
        found["s3_cold"] = compare(
            config,
            {
                "stream": lambda: read_stream(config, remote, folder),
                "webdataset_processes": lambda: read_webdataset(config, web, config.workers),
                "webdataset_one": lambda: read_webdataset(config, web, 0),
            },
        )
    return found


def compare(config: Config, variants: dict[str, Variant]) -> dict[str, Any]:
    """Rates of each variant in interleaved turns, after one that does not count, and the stream's over each other's;
    by waiting time, and by the CPU time of the process with its workers, which a busy machine changes little."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(config.turns + 1):
        for name, variant in variants.items():
            started, busy = time.perf_counter(), sum(os.times()[:4])
            count = variant()
            seconds = time.perf_counter() - started
            if count != config.turn_shards * config.turn_samples:
                raise AssertionError(f"{name} gave {count} samples")
            if turn:
                rates[name].append(count / seconds)
                cpu[name].append(count / (sum(os.times()[:4]) - busy))
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    ratios = {}
    for name, values in rates.items():
        pairs = [ours / theirs for ours, theirs in zip(rates["stream"], values, strict=True)]
        ratios[name] = {
            "of_medians": round(medians["stream"] / medians[name], 3),
            "median_of_turns": round(statistics.median(pairs), 3),
            "lowest": round(min(pairs), 3),
            "highest": round(max(pairs), 3),
            "cpu": round(statistics.median(cpu["stream"]) / statistics.median(cpu[name]), 3),
        }
    return {"samples_per_second": medians, "stream_over": ratios}


def decode(sample: RawSample, seed: int) -> np.ndarray:
    """A photograph as a model wants it, (224, 224, 3) uint8; what both sides do."""
    with Image.open(io.BytesIO(sample.image)) as image:
        return np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))


def read_stream(config: Config, index: artifacts.Artifact, folder: Path) -> int:
    shutil.rmtree(folder / "cache", ignore_errors=True)
    source = ShardSource(index, decode, Cache(folder / "cache", 1 << 30))
    stream, batch = Stream([source], 50, window=config.shuffled), 50
    count = 0
    with Ahead(stream, stream.start(), 0, 1, steps=4, readers=config.workers) as ahead:
        for _ in range(len(source) // batch):
            count += len(np.stack([item.value for item in ahead.take().loaded]))
    return count


def read_webdataset(config: Config, urls: list[str], processes: int) -> int:
    import webdataset

    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
        .shuffle(config.shuffled)
        .map(_decode_webdataset)
        .batched(50, collation_fn=np.stack)
    )
    # Batches are put together in the workers, so that whole arrays travel.
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=processes)
    return sum(len(batch) for batch in loader)


def _decode_webdataset(sample: dict[str, Any]) -> np.ndarray:
    record = json.loads(sample["json"])
    return decode(RawSample(sample["__key__"], sample["jpg"], sample["txt"].decode(), record), 0)


def read_grain(config: Config, files: list[Path]) -> int:
    """Row groups in the files' order, by as many threads; what grain has for Parquet."""
    from grain import experimental

    rows = experimental.ParquetIterDataset([str(file) for file in files])
    batches = rows.map(lambda row: decode(RawSample(row["key"], row["jpg"], row["caption"], None), 0)).batch(50)
    return sum(len(batch) for batch in experimental.multithread_prefetch(batches, config.workers, 4))


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server in a process of its own, with a bucket ``shards``."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    endpoint = ours.recv()
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    artifacts.locate("s3://shards")[0].mkdir("shards", acl="public-read")
    try:
        yield endpoint
    finally:
        server.terminate()
        server.join()


def _serve(pipe: Any) -> None:
    from moto.server import ThreadedMotoServer

    logging.disable(logging.INFO)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    pipe.send(f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    while True:
        time.sleep(3600)


def upload(file: Path, bucket: str) -> str:
    filesystem, _ = artifacts.locate(f"s3://{bucket}")
    filesystem.put_file(str(file), f"{bucket}/{file.name}", acl="public-read")
    return f"s3://{bucket}/{file.name}"


# Shards and their index


def jpeg(number: int, size: int) -> bytes:
    """A smooth picture with some grain: compresses like a photograph."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 255, (size // 16, size // 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
    pixels = pixels + generator.integers(-12, 12, pixels.shape, dtype=np.int16)
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=85)
    return content.getvalue()


def write_tar(file: Path, samples: Any) -> None:
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, caption in samples:
            record = json.dumps({"key": key, "caption": caption}).encode()
            for suffix, content in (("jpg", image), ("txt", caption.encode()), ("json", record)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def parquet_of(tar: Path) -> Path:
    """The same samples as img2dataset would write them in Parquet."""
    with tarfile.open(tar) as members:
        contents = {member.name: members.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    keys = sorted({name.partition(".")[0] for name in contents})
    table = pa.table(
        {
            "key": keys,
            "jpg": [contents[f"{key}.jpg"] for key in keys],
            "caption": [contents[f"{key}.txt"].decode() for key in keys],
        }
    )
    pq.write_table(table, tar.with_suffix(".parquet"), row_group_size=100)
    return tar.with_suffix(".parquet")


def write_index(
    url: Path, shards: list[tuple[str, Path]], form: str = "tar", *, same: bool = False
) -> artifacts.Artifact:
    """The index of shards, given by URL and by a local file with the content; ``same``: all are the first one."""

    def produce(writer: artifacts.Writer) -> None:
        rows: list[dict[str, Any]] = []
        (writer.folder / "index").mkdir()
        for number, (place, file) in enumerate(progress.track(shards, "index")):
            target = writer.folder / f"index/{number:05d}.arrow"
            if same and rows:
                target.hardlink_to(writer.folder / "index/00000.arrow")
                rows.append({**rows[0], "shard": number, "url": place})
                continue
            found = index_rows(file, form)
            with pa.ipc.new_file(str(target), INDEX) as sink:
                sink.write_batch(pa.RecordBatch.from_pylist(found, INDEX))
            values = (number, place, form, len(found), file.stat().st_size, sha256_of(file), "")
            rows.append(dict(zip(SHARDS.names, values, strict=True)))
        pq.write_table(pa.Table.from_pylist(rows, SHARDS), writer.folder / "shards.parquet")
        writer.write_json("columns.json", {"image": "jpg", "caption": "caption"})

    return artifacts.ensure(url, produce, kind=IMAGE_TEXT_INDEX, config={"shards": len(shards)})


def index_rows(file: Path, form: str) -> list[dict[str, Any]]:
    nowhere = dict.fromkeys(INDEX.names, -1)
    if form == "tar":
        return [{**nowhere, **found.place, "key": found.key, "length": found.length} for found in read_tar(file)]
    table = pq.read_table(file, columns=["key", "caption"]).to_pylist()
    return [
        {**nowhere, "key": row["key"], "row": number, "length": len(row["caption"])} for number, row in enumerate(table)
    ]


def peak_memory() -> int:
    """The most memory that this process had resident, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(config: Config) -> None:
    if config.proof:
        gc.disable()  # 200M small tuples and no cycle: looking for one takes three quarters of the time
    if config.child:
        restarted(config)
        return
    found = json.loads(config.out.read_text()) if config.out.exists() else {}
    parts: dict[str, Callable[[Path], Any]] = {
        "proof": lambda folder: prove(config),
        "restart": lambda folder: restart(config, folder),
        "throughput": lambda folder: throughput(config, folder),
    }
    for name, measure in parts.items():
        if getattr(config, name):
            with TemporaryDirectory(dir=config.folder) as folder:
                found[name] = measure(Path(folder))
            print(json.dumps({name: found[name]}, indent=1), flush=True)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
