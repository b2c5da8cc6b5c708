"""Writing samples of any format to new tar shards, with the same bytes whenever it is done."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from palate.artifacts import locate
from palate.corpora.image_text import PARQUET_ROWS, Columns, Shard, cell_bytes
from palate.corpora.pictures import DECODED, as_seen

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
BLOCK = 512


@dataclass(frozen=True)
class Parts:
    """The contents of a sample's members."""

    image: bytes
    text: bytes | None
    record: bytes | None


def fetch(shard: Shard, file: Path, places: Sequence[Mapping[str, Any]], columns: Columns | None) -> Iterator[Parts]:
    """The samples at ``places``, rows of an index, of the shard whose content is in ``file``."""
    if shard.format == "parquet":
        assert columns is not None
        yield from _from_parquet(file, [place["row"] for place in places], columns)
        return
    with file.open("rb") as stream:
        for place in places:
            image, text, record = (_range(stream, place, name) for name in ("image", "text", "json"))
            if shard.format == "llava":
                assert record is not None
                filesystem, root = locate(shard.root)
                image = bytes(filesystem.cat_file(f"{root}/{json.loads(record)['image']}"))
            assert image is not None
            yield Parts(image, text, record)


def _range(stream: IO[bytes], place: Mapping[str, Any], name: str) -> bytes | None:
    if place[f"{name}_size"] < 0:
        return None
    stream.seek(place[f"{name}_offset"])
    return stream.read(place[f"{name}_size"])


def _from_parquet(file: Path, rows: Sequence[int], columns: Columns) -> Iterator[Parts]:
    wanted = set(rows)
    with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
        row = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if wanted.isdisjoint(range(row, row + count)):
                row += count
                continue
            for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=[group]):
                for index in range(batch.num_rows):
                    if row in wanted:
                        yield _parts(batch, index, columns)
                    row += 1


def _parts(batch: pa.RecordBatch, index: int, columns: Columns) -> Parts:
    values = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    image, caption = cell_bytes(values.pop(columns.image)), values.pop(columns.caption)
    assert image is not None
    # NaN is no JSON, and other columns of bytes are no record.
    others = {name: None if value != value else value for name, value in values.items() if not isinstance(value, bytes)}
    text = caption if isinstance(caption, bytes) else caption.encode()
    return Parts(image, text, json.dumps(others, ensure_ascii=False, default=str).encode())


class TarWriter:
    """A tar of samples; no time, owner or machine is written."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def add(self, key: str, parts: Parts) -> dict[str, int]:
        """Append a sample; gives the index's byte ranges."""
        image, suffix = _portable(parts.image)
        places = {}
        for name, ending, content in (
            ("image", suffix, image),
            ("text", "txt", parts.text),
            ("json", "json", parts.record),
        ):
            places[f"{name}_offset"] = -1 if content is None else self._tar.offset + BLOCK
            places[f"{name}_size"] = -1 if content is None else len(content)
            if content is not None:
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                self._tar.addfile(member, io.BytesIO(content))
        self._tar.members.clear()  # type: ignore[attr-defined]  # it would keep all
        return places


def _portable(content: bytes) -> tuple[bytes, str]:
    """An encoded image and its suffix; as PNG where it is none of the formats that tar shards have."""
    with Image.open(io.BytesIO(content), formats=DECODED) as image:
        if image.format in SUFFIXES:
            return content, SUFFIXES[image.format]
        stream = io.BytesIO()
        as_seen(image).save(stream, "PNG")
        return stream.getvalue(), "png"
