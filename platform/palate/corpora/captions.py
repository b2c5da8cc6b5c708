"""Image-text shards as they are published, curated: an index of the samples that are worth training on."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

IMAGE_TEXT_INDEX = "image-text-index"

SHARDS = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("url", pa.string(), nullable=False),  # absolute path or fsspec URL
        pa.field("format", pa.string(), nullable=False),  # tar, parquet or llava
        pa.field("samples", pa.int64(), nullable=False),  # kept
        pa.field("bytes", pa.int64(), nullable=False),  # of the file
        pa.field("sha256", pa.string(), nullable=False),  # of its content
        pa.field("root", pa.string(), nullable=False),  # llava: what image paths are relative to; else ""
    ]
)
INDEX = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        # Byte ranges inside the shard's file; size -1 where there is no such member.
        *(
            pa.field(f"{member}_{what}", pa.int64(), nullable=False)
            for member in ("image", "text", "json")
            for what in ("offset", "size")
        ),
        pa.field("row", pa.int64(), nullable=False),  # parquet: of the whole file; else -1
        pa.field("length", pa.int32(), nullable=False),  # of the caption, in characters
    ]
)


@dataclass(frozen=True)
class RawSample:
    """A sample as its shard holds it: the encoded image, the caption, and the JSON record (LLaVA's conversations, or
    the tar's key.json)."""

    key: str
    image: bytes
    text: str | None
    record: dict[str, Any] | None
