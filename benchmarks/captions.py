"""Samples a second of CPU time of the scan of image-text shards, beside a plain loop over the same tar that reads,
decodes and hashes as little as one can, and the peak memory of either."""

import hashlib
import io
import json
import multiprocessing
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from palate.corpora.captions import CaptionsConfig, prepare


@dataclass(frozen=True)
class Config:
    """What is measured."""

    samples: int = 5000
    side: int = 256
    repeats: int = 3
    out: Path = Path("captions.json")


def write(path: Path, config: Config) -> None:
    """A tar of distinct JPEGs of about 20 KB at 256 pixels, as photographs have, with captions and records."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(config.samples):
            coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image = np.asarray(coarse.resize((config.side, config.side), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = np.clip(image + generator.integers(-20, 20, image.shape, dtype=np.int16), 0, 255)
            stream = io.BytesIO()
            Image.fromarray(noisy.astype(np.uint8)).save(stream, "JPEG", quality=85)
            record = json.dumps({"key": f"{number:09d}", "similarity": 0.3}).encode()
            for suffix, content in (("jpg", stream.getvalue()), ("txt", b"a photograph"), ("json", record)):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def plain(path: Path) -> None:
    """The least that one can do: every member read, every image decoded in RGB, its bytes hashed."""
    seen: set[bytes] = set()
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            opened = tar.extractfile(member)
            assert opened is not None
            content = opened.read()
            if member.name.endswith(".jpg"):
                Image.open(io.BytesIO(content)).convert("RGB")
                seen.add(hashlib.sha256(content).digest())
            elif member.name.endswith(".json"):
                json.loads(content)
            tar.members.clear()  # type: ignore[attr-defined]


def scanned(path: Path) -> None:
    """The whole preparation: the scan takes nearly all of it."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(CaptionsConfig(input=(str(path),), out=f"{folder}/out", min_similarity=0.2))


def nothing(path: Path) -> None:
    """What a process takes before it does anything."""


def measured(work: Callable[[Path], None], path: Path, results: "multiprocessing.Queue[tuple[float, float]]") -> None:
    start = time.process_time()
    work(path)
    results.put((time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def alone(work: Callable[[Path], None], path: Path) -> tuple[float, float]:
    """CPU seconds and peak resident megabytes of ``work`` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[float, float]] = context.Queue()
    process = context.Process(target=measured, args=(work, path, results))
    process.start()
    found = results.get()
    process.join()
    return found


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000.tar"
        write(path, config)
        size = path.stat().st_size
        works = {"nothing": nothing, "plain loop": plain, "palate": scanned}
        # In turn, so that whatever else the machine does meets each alike.
        runs = [{name: alone(work, path) for name, work in works.items()} for _ in range(config.repeats)]
    found = {
        name: {
            "samples_per_second": config.samples / min(run[name][0] for run in runs),
            "peak_mb": max(run[name][1] for run in runs),
        }
        for name in works
    }
    ratio = float(np.median([run["plain loop"][0] / run["palate"][0] for run in runs]))
    print(f"{config.samples} samples of {config.side} pixels, {size / config.samples / 1e3:.1f} KB each")
    for name in ("plain loop", "palate"):
        print(f"{name:12} {found[name]['samples_per_second']:8.0f} samples/s {found[name]['peak_mb']:6.0f} MB")
    print(f"nothing      {'':8} {'':9} {found['nothing']['peak_mb']:6.0f} MB")
    print(f"palate / plain loop: {ratio:.2f}")
    config.out.write_text(json.dumps({"found": found, "ratio": ratio, "samples": config.samples}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
