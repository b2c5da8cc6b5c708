"""A corpus of ranked lists from tables at hand, for benchmarks in which what a model drew is ranked."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from palate import artifacts
from palate.artifacts import Artifact, Writer
from palate.corpora.schema import IMAGES, LISTS, RANKED_LISTS


def picture(uid: str, image: Image.Image) -> dict[str, Any]:
    """A record of ``IMAGES``."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"image_uid": uid, "bytes": stream.getvalue(), "path": None, "width": image.width, "height": image.height}


def ranked_list(list_id: str, caption: str, best_first: Sequence[str], user_id: str | None = None) -> dict[str, Any]:
    """A record of ``LISTS`` for training: the images of one caption in full order."""
    items = [{"image_uid": u, "model": None, "score": None, "tie_group": place} for place, u in enumerate(best_first)]
    edges = [
        {"winner": place, "loser": place + 1, "votes": 1.0, "source_ids": [list_id]} for place in range(len(items) - 1)
    ]
    row = {"list_id": list_id, "caption": caption, "user_id": user_id, "split": "train", "kind": "full"}
    nothing = {"top_k": None, "source_image": None, "instruction": None, "weight": 1.0}
    return {**row, **nothing, "items": items, "edges": edges}


def write_corpus(
    folder: str, images: Sequence[Mapping[str, Any]], lists: Sequence[Mapping[str, Any]], others: Mapping[str, pa.Table]
) -> Artifact:
    """The corpus, unless it is there; ``others``: further tables by their file's path."""
    tables = {
        "images/part-00000.parquet": pa.Table.from_pylist(list(images), schema=IMAGES),
        "lists/part-00000.parquet": pa.Table.from_pylist(list(lists), schema=LISTS),
        **others,
    }

    def produce(writer: Writer) -> None:
        for path, table in tables.items():
            (writer.folder / path).parent.mkdir(exist_ok=True)
            pq.write_table(table, writer.folder / path)

    contents = {path: hashlib.sha256(repr(table.to_pydict()).encode()).hexdigest() for path, table in tables.items()}
    return artifacts.ensure(folder, produce, kind=RANKED_LISTS, config=contents)
