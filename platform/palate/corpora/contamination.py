"""Images that models are evaluated on, as hashes, so that samples which show them can be left out.

They are found in folders of images, in Parquet files, and in VLMEvalKit's TSV files, whose column ``image`` holds
Base64, a list of it, or the index of the row that has the image.
"""

import base64
import csv
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from palate.artifacts import is_local, locate
from palate.corpora.duplicates import hamming, look_at
from palate.corpora.image_text import MAX_BYTES, PARQUET_ROWS, Damaged, cell_bytes, image_column, local_file
from palate.corpora.streams import CorpusError, opened

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TABLES = (".parquet", ".tsv")
_TSV_IMAGE = re.compile(r"image(_?\d+)?")
_BASE64 = re.compile(r"[A-Za-z0-9+/=]{65,}")  # shorter ones are indices of rows
_WRAPPED = re.compile(r"\s|\\[nrt]")  # Base64 may be in lines of 76 characters; in a list they are escaped
BLOCK = 256  # samples that are compared with all evaluation images at once

HASHES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # file, and row
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("hash", pa.uint64()),
    ]
)


def expand(inputs: Sequence[str]) -> list[str]:
    """The files that paths, patterns and folders name: tables, and images.

    Raises:
        CorpusError: nothing is there.
    """
    found: list[str] = []
    for given in inputs:
        filesystem, path = locate(given)
        names = filesystem.glob(path) if any(sign in given for sign in "*?[") else [path]
        inside = [
            file
            for name in names
            for file in (filesystem.find(name) if filesystem.isdir(name) else [name])
            if file.lower().endswith(IMAGES + TABLES) and filesystem.isfile(file)
        ]
        if not inside:
            raise CorpusError(f"--evaluation {given}: there is no file of {', '.join(IMAGES + TABLES)}")
        found += inside if is_local(filesystem) else [str(filesystem.unstrip_protocol(name)) for name in inside]
    return sorted(set(found))


def images(url: str) -> Iterator[tuple[str, bytes]]:
    """Id and bytes of the images of a file.

    Raises:
        CorpusError: it holds none.
    """
    suffix = f".{url.rpartition('.')[2].lower()}"
    if suffix == ".tsv":
        yield from _tsv_images(url)
    elif suffix == ".parquet":
        yield from _parquet_images(url)
    else:
        filesystem, path = locate(url)
        yield url, bytes(filesystem.cat_file(path))


def _parquet_images(url: str) -> Iterator[tuple[str, bytes]]:
    try:
        column = image_column(url, "")
    except Damaged as damage:
        raise CorpusError(f"--evaluation {url}: {damage}") from None
    with local_file(url) as file, pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
        row = 0
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=[column]):
            for cell in batch.column(0):
                if content := cell_bytes(cell.as_py()):
                    yield f"{url}:{row}", content
                row += 1


def _tsv_images(url: str) -> Iterator[tuple[str, bytes]]:
    csv.field_size_limit(MAX_BYTES)
    with opened(url) as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8", newline=""), delimiter="\t")
        names = [name for name in reader.fieldnames or [] if _TSV_IMAGE.fullmatch(name)]
        if not names:
            raise CorpusError(
                f"--evaluation {url}: found the columns {', '.join(reader.fieldnames or [])}; expected VLMEvalKit's "
                "column image with Base64. Where images are files, give their folder"
            )
        for row, record in enumerate(reader):
            for name in names:
                for number, text in enumerate(_BASE64.findall(_WRAPPED.sub("", record[name] or ""))):
                    identity = f"{url}:{record.get('index') or row}:{name}:{number}"
                    yield identity, _decoded(text)


def _decoded(text: str) -> bytes:
    """What Base64 stands for; nothing where it is broken."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""


def hashes(url: str, max_pixels: int, most_broken: float) -> tuple[pa.Table, int]:
    """``HASHES`` of the images of a file, and how many could not be decoded.

    Raises:
        CorpusError: none could, or a larger share than ``most_broken`` could not: they would not be kept out.
    """
    rows, broken = [], 0
    for identity, content in images(url):
        try:
            found = look_at(content, max_pixels).hash
        except ValueError:
            broken, found = broken + 1, None
        rows.append({"id": identity, "sha256": hashlib.sha256(content).digest(), "hash": found})
    if broken == len(rows):
        raise CorpusError(f"--evaluation {url}: none of its {broken} images can be decoded: check the file")
    if broken > most_broken * len(rows):
        raise CorpusError(
            f"--evaluation {url}: {broken} of {len(rows)} images cannot be decoded, more than --max-quarantined "
            f"{most_broken:g}: samples that show them would be kept. Check the file, or raise the limit"
        )
    return pa.Table.from_pylist(rows, schema=HASHES), broken


@dataclass(frozen=True)
class Evaluation:
    """The evaluation images to keep out: samples that are equal to one, or within ``distance`` bits of it."""

    equal: dict[bytes, str]
    near: np.ndarray  # (N,) uint64
    near_ids: list[str]
    distance: int

    @classmethod
    def of(cls, table: pa.Table, distance: int) -> "Evaluation":
        equal: dict[bytes, str] = {}
        for identity, digest in zip(table["id"].to_pylist(), table["sha256"].to_pylist(), strict=True):
            equal.setdefault(digest, identity)
        usable = table.filter(pc.is_valid(table["hash"]))
        return cls(equal, usable["hash"].to_numpy().astype(np.uint64), usable["id"].to_pylist(), distance)

    def matches(self, digests: Sequence[bytes], found: Sequence[int | None]) -> list[str | None]:
        """For each sample, by the digest of its bytes and its pHash, the evaluation image that it shows."""
        matched = [self.equal.get(digest) for digest in digests]
        if not len(self.near):
            return matched
        open_rows = [row for row, value in enumerate(found) if value is not None and matched[row] is None]
        for start in range(0, len(open_rows), BLOCK):
            rows = open_rows[start : start + BLOCK]
            distances = hamming(np.array([found[row] for row in rows], dtype=np.uint64), self.near)
            for row, nearest, least in zip(rows, distances.argmin(axis=1), distances.min(axis=1), strict=True):
                if least <= self.distance:
                    matched[row] = self.near_ids[nearest]
        return matched
