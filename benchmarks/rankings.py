"""Ranked lists from a million comparisons: Palate on Ray Data against a straightforward pandas builder, in one run.

    python benchmarks/rankings.py

The comparisons have Pick-a-Pic's columns without images: captions drawn by Zipf's law, sessions in which the winner
stays and the loser is replaced, some pairs judged again by others, ties and rows without label. The pandas builder is
what a user would write: ``groupby`` the caption, dictionaries of votes, connected parts, ``graphlib`` for cycles,
longest paths, JSON Lines out; it writes less (no models, ties, report). Seconds are from after ``ray.init`` to the end;
memory is the private memory of this process, Ray's and the workers', summed, at its highest.
"""

import graphlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from palate.lpo.preparation import RankingsConfig, prepare

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@dataclass(frozen=True)
class Config:
    """What to measure; see the module's text."""

    comparisons: int = 1_000_000
    captions: int = 200_000
    exponent: float = 0.9  # of Zipf's law; 0.9 gives the first caption 2% of all comparisons
    cpus: int = 2
    pandas: bool = True
    work: Path = Path("benchmarks/out/rankings")
    out: Path = Path("benchmarks/out/rankings.json")
    seed: int = 0


def comparisons(config: Config) -> pa.Table:
    """Pick-a-Pic's columns, without images."""
    generator = np.random.default_rng(config.seed)
    count = config.comparisons
    share = 1 / np.arange(1, config.captions + 1) ** config.exponent
    caption = np.sort(generator.choice(config.captions, count, p=share / share.sum()))
    first, second = np.empty(count, np.int64), np.empty(count, np.int64)
    labels = generator.choice([1.0, 0.0, 0.5], count, p=[0.44, 0.44, 0.12])
    again, fresh = generator.random(count), generator.random(count)
    image, start = 0, 0
    for index in range(count):
        if index == 0 or caption[index] != caption[index - 1]:
            start = index
        if index > start and again[index] < 0.15:  # an earlier pair of the caption, judged again
            other = start + int(fresh[index] * (index - start))
            first[index], second[index] = first[other], second[other]
        elif index > start + 1 and again[index] < 0.2:  # two images that others compared with others
            other = start + int(fresh[index] * (index - start - 1))
            first[index], second[index] = first[other], second[other + 1]
            if first[index] == second[index]:
                second[index] = second[other]
        elif index > start and again[index] < 0.8:  # the session goes on: the loser is replaced
            kept = second[index - 1] if labels[index - 1] == 0 else first[index - 1]
            first[index], second[index], image = kept, image, image + 1
        else:
            first[index], second[index], image = image, image + 1, image + 2
    order = generator.permutation(count)
    moments = np.arange(count) * 1_000_000_000 + 1_690_000_000_000_000_000
    phrases = np.array(
        [f"a painting of scene {n} in the style of the old masters, highly detailed" for n in range(config.captions)]
    )
    names = np.array([f"{n:08x}-0000-4000-8000-{n * 2654435761 % 2**48:012x}" for n in range(image)])
    columns = {
        "caption": phrases[caption],
        "user_id": generator.integers(0, 5000, count),
        "created_at": moments.astype("datetime64[ns]"),
        "image_0_uid": names[first],
        "image_1_uid": names[second],
        "label_0": labels,
        "label_1": 1 - labels,
        "has_label": generator.random(count) > 0.01,
        "are_different": generator.random(count) > 0.005,
        "model_0": np.array(["xl", "sd", "dreamlike"])[generator.integers(0, 3, count)],
        "model_1": np.array(["xl", "sd", "dreamlike"])[generator.integers(0, 3, count)],
        "ranking_id": np.arange(count),
    }
    return pa.table({name: pa.array(values).take(pa.array(order)) for name, values in columns.items()})


def with_pandas(path: Path, out: Path) -> dict[str, Any]:
    """What one writes in an afternoon: same filter, votes, cycles, cover, provenance and splits, a group at a time."""
    import pandas

    frame = pandas.read_parquet(path)
    frame = frame[frame.has_label & frame.are_different & (frame.label_0 != 0.5)].sort_values("created_at")
    first_won = frame.label_0 == 1
    frame["winner"] = frame.image_0_uid.where(first_won, frame.image_1_uid)
    frame["loser"] = frame.image_1_uid.where(first_won, frame.image_0_uid)
    split = splits_of(frame)
    lengths: Counter[int] = Counter()
    with out.open("w") as stream:
        for caption, rows in frame.groupby("caption"):
            sources: dict[tuple[str, str], list[int]] = {}
            for winner, loser, source in zip(rows["winner"], rows["loser"], rows["ranking_id"], strict=True):
                sources.setdefault((winner, loser), []).append(source)
            votes = {edge: len(found) - len(sources.get(edge[::-1], ())) for edge, found in sources.items()}
            for part in parts({edge: count for edge, count in votes.items() if count > 0}):
                for images, edges in cover(acyclic(part)):
                    lengths[len(images)] += 1
                    record = {"caption": caption, "split": split[caption], "items": images}
                    voted = [(*edge, votes[edge], sources[edge]) for edge in edges]
                    stream.write(json.dumps({**record, "edges": voted}) + "\n")
    return {"lists": lengths.total(), "lists longer than 2": lengths.total() - lengths[2]}


Votes = dict[tuple[str, str], int]


class Forest:
    """Union-find."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, node: str) -> str:
        parent = self.parent
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    def join(self, first: str, second: str) -> None:
        self.parent[self.root(first)] = self.root(second)


def splits_of(frame: Any) -> dict[str, str]:
    """The split of each caption, whole components of captions and images together."""
    forest = Forest()
    for caption, winner, loser in zip(frame["caption"], frame["winner"], frame["loser"], strict=True):
        forest.join(winner, caption)
        forest.join(loser, caption)
    return {name: "train" if hash(forest.root(name)) % 10 else "test" for name in frame["caption"].unique()}


def parts(votes: Votes) -> list[Votes]:
    """The connected parts of a graph."""
    forest = Forest()
    for winner, loser in votes:
        forest.join(winner, loser)
    found: dict[str, Votes] = {}
    for edge, count in votes.items():
        found.setdefault(forest.root(edge[0]), {})[edge] = count
    return list(found.values())


def cover(votes: Votes) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
    """Lists of at most eight images, with their edges, until each edge is in one."""
    left = set(votes)
    while left:
        images = longest_path(votes, left)[:8]
        edges = [(a, b) for i, a in enumerate(images) for b in images[i + 1 :] if (a, b) in votes]
        if not left & set(edges):  # what is new lies behind the eighth image
            images = list(min(left))
            edges = [(images[0], images[1])]
        left -= set(edges)
        yield images, edges


def acyclic(votes: Votes) -> Votes:
    """Without the least supported edge of each cycle that graphlib finds."""
    while True:
        try:
            topological(votes)
        except graphlib.CycleError as error:
            cycle = error.args[1]  # each is below the next
            del votes[min(zip(cycle[1:], cycle, strict=False), key=votes.__getitem__)]
        else:
            return votes


def topological(edges: Iterable[tuple[str, str]]) -> list[str]:
    below: dict[str, list[str]] = {}
    for winner, loser in edges:
        below.setdefault(winner, []).append(loser)
    return list(graphlib.TopologicalSorter(below).static_order())  # losers first


def longest_path(votes: Votes, left: set[tuple[str, str]]) -> list[str]:
    """The path with the most edges of ``left``, then the longest."""
    below: dict[str, list[str]] = {}
    for winner, loser in votes:
        below.setdefault(winner, []).append(loser)
    best: dict[str, tuple[int, int, list[str]]] = {}
    for node in topological(votes):
        options = [(best[o][0] + ((node, o) in left), best[o][1] + 1, [node, *best[o][2]]) for o in below.get(node, ())]
        best[node] = max(options, default=(0, 1, [node]))
    return max(best.values())[2]


@contextmanager
def memory() -> Iterator[dict[str, float]]:
    """The highest sum of private memory, in GB, of this process and its children, Ray's daemons included."""
    peak = {"gb": 0.0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            peak["gb"] = max(peak["gb"], sum(map(private, family(os.getpid()))) / 1e9)

    thread = threading.Thread(target=watch)
    thread.start()
    yield peak
    stop.set()
    thread.join()


def family(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for process in found:
        found += parents.get(process, [])
    return found


def private(process: int) -> int:
    """Private bytes of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def main(config: Config) -> None:
    import ray

    from palate.distributed.prepare import run_with_ray

    config.work.mkdir(parents=True, exist_ok=True)
    source = config.work / "comparisons.parquet"
    table = comparisons(config)
    pq.write_table(table, source, row_group_size=100_000)
    del table
    results: dict[str, Any] = {}
    ray.init(address="local", num_cpus=config.cpus, include_dashboard=False, object_store_memory=150 * 2**20)
    for name, runner in (("palate, ray", run_with_ray), ("palate, plain loop", None)):
        out = config.work / "lists"
        prepare_config = RankingsConfig(input=(str(source),), out=str(out), fresh=True)
        with memory() as peak:
            start = time.perf_counter()
            made = prepare(prepare_config, runner) if runner else prepare(prepare_config)
            seconds = time.perf_counter() - start
        results[name] = {"seconds": seconds, "private_gb": peak["gb"], **made.summary}
        if name == "palate, ray":
            ray.shutdown()
    if config.pandas:
        with memory() as peak:
            start = time.perf_counter()
            found = with_pandas(source, config.work / "pandas.jsonl")
            results["pandas"] = {"seconds": time.perf_counter() - start, "private_gb": peak["gb"], **found}
    shutil.rmtree(config.work)
    config.out.write_text(json.dumps(results, indent=2, default=str))
    print(f"{'':20} seconds  private GB    lists")
    for name, one in results.items():
        print(f"{name:20} {one['seconds']:7.1f}  {one['private_gb']:10.2f} {one['lists']:8,}")
    print(json.dumps(results["palate, ray"], indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
