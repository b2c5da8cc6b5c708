"""Errors of the reference, computed once for a fixed number of draws of each list (``DrawConfig.fixed_draws``).

Training then needs neither the reference's pass nor, with full weights, its copy; it sees each list at these draws of
noise and timestep again and again. Shards are artifacts of their own, so a killed run goes on after the finished ones.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from palate import artifacts, progress
from palate.artifacts import Writer, join
from palate.lpo.samples import ListSource
from palate.lpo.training import Denoiser, TuneConfig, images_of, reference_errors, spans_of
from palate.training.parallel import World

SHARD = "lpo-reference-errors"
LISTS = 512  # of a shard

ERRORS = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),  # of the list in its source
        pa.field("draw", pa.int32(), nullable=False),
        pa.field("errors", pa.list_(pa.float32()), nullable=False),  # of its images, in the list's order
    ]
)


def precomputed(
    denoiser: Denoiser, source: ListSource, config: TuneConfig, out: str, world: World, identity: Mapping[str, Any]
) -> ListSource:
    """The source with the reference's errors, which are made at ``out`` unless they are there; every rank calls it.

    Args:
        identity: whatever decides the errors beside the lists, such as the base model.
    """
    draws = source.fixed_draws
    shards = range(0, len(source), LISTS)
    for place, start in enumerate(progress.track(list(shards), "reference")):
        if place % world.size == world.rank:
            described = {**identity, "source": source.fingerprint, "draws": draws, "start": start}
            _ensure(denoiser, source, config, join(out, f"{place:05d}"), start, described, world)
    world.barrier()
    found: dict[tuple[int, int], list[float]] = {}
    for place in range(len(shards)):
        shard = artifacts.open_artifact(join(out, f"{place:05d}"), SHARD)
        for row in pq.read_table(shard.local("errors.parquet")).to_pylist():
            found[row["index"], row["draw"]] = row["errors"]
    return source.with_reference(found)


def _ensure(
    denoiser: Denoiser, source: ListSource, config: TuneConfig, url: str, start: int, described: Any, world: World
) -> None:
    def produce(writer: Writer) -> None:
        rows = []
        pairs = [
            (index, draw)
            for index in range(start, min(start + LISTS, len(source)))
            for draw in range(source.fixed_draws)
        ]
        for first in range(0, len(pairs), config.micro_batch):
            some = pairs[first : first + config.micro_batch]
            samples = [source.draw(index, draw) for index, draw in some]
            images = images_of(samples, world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                errors_N = reference_errors(denoiser, images, spans_of(len(images), config)).float().cpu()
            found = errors_N.split([len(sample) for sample in samples])
            rows += [
                {"index": index, "draw": draw, "errors": errors.tolist()}
                for (index, draw), errors in zip(some, found, strict=True)
            ]
        pq.write_table(pa.Table.from_pylist(rows, schema=ERRORS), writer.folder / "errors.parquet")

    artifacts.ensure(url, produce, kind=SHARD, config=described)
