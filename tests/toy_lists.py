"""Small ranked lists of plain coloured squares: the redder, the better."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from palate import artifacts
from palate.artifacts import Artifact, Writer
from palate.corpora.schema import IMAGES, LISTS, RANKED_LISTS

SIDE = 16
CAPTIONS = ("a small red circle on grey", "a large blue square on black", "a small green cross on white")


def png(red: float, seed: int, side: int = SIDE) -> bytes:
    noise = np.random.default_rng(seed).uniform(0, 0.3, (side, side, 3))
    pixels = (255 * np.clip(noise + np.array([red, 0.3, 0.3]), 0, 1)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def row(number: int, length: int, **changes: Any) -> dict[str, Any]:
    """A list of ``length`` images; images of neighbouring lists are shared."""
    items = [
        {"image_uid": f"i{number}-{place}", "model": None, "score": None, "tie_group": place} for place in range(length)
    ]
    edges = [{"winner": p, "loser": p + 1, "votes": 1.0, "source_ids": [f"{number}-{p}"]} for p in range(length - 1)]
    return {
        "list_id": f"list-{number}",
        "caption": CAPTIONS[number % len(CAPTIONS)],
        "user_id": f"user-{number % 4}",
        "split": "test" if number % 6 == 5 else "train",
        "items": items,
        "edges": edges,
        "kind": "full",
        "top_k": None,
        "source_image": None,
        "instruction": None,
        "weight": 1.0,
        **changes,
    }


def write(folder: Path, rows: list[dict[str, Any]], side: int = SIDE) -> Artifact:
    """An artifact of these lists and their images."""
    uids = sorted(
        {item["image_uid"] for one in rows for item in one["items"]}
        | {one["source_image"] for one in rows if one["source_image"]}
    )
    images = [
        {
            "image_uid": uid,
            "bytes": png(1 - 0.25 * (int(uid.rpartition("-")[2]) % 4), seed, side),
            "path": None,
            "width": side,
            "height": side,
        }
        for seed, uid in enumerate(uids)
    ]

    def produce(writer: Writer) -> None:
        for name, records, schema in (("lists", rows, LISTS), ("images", images, IMAGES)):
            (writer.folder / name).mkdir()
            half = len(records) // 2
            for part, some in enumerate((records[:half], records[half:])):
                pq.write_table(
                    pa.Table.from_pylist(some, schema=schema), writer.folder / name / f"part-{part:05d}.parquet"
                )

    return artifacts.ensure(folder, produce, kind=RANKED_LISTS, config={"toy": len(rows)})


def lists(folder: Path, count: int = 24) -> Artifact:
    """Lists of two to four images."""
    return write(folder, [row(number, 2 + number % 3) for number in range(count)])
