"""The images behind annotations: found, decoded once to see that they are whole, and collected."""

import hashlib
import io
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from palate.artifacts import Artifact, is_local, locate
from palate.corpora.rankings import SUFFIXES, Found
from palate.corpora.schema import IMAGES
from palate.corpora.streams import CorpusError

Mode = Literal["reference", "embed", "skip"]

CORRUPT, UNKNOWN = "an image that cannot be decoded", "an unknown image"

# What is decoded: Pillow's other formats are no photographs, and some start other programs.
DECODED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

COLLECTED = pa.schema([*IMAGES, pa.field("row", pa.int64(), nullable=False)])  # where it was met first


def image_size(content: bytes) -> tuple[int, int]:
    """Width and height of an encoded image, of one of ``DECODED``, that decodes whole.

    Raises:
        ValueError: it does not.
    """
    try:
        with Image.open(io.BytesIO(content), formats=DECODED) as image:
            image.load()
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not an image that can be decoded: {error}") from None


def image_bytes(row: Mapping[str, Any]) -> bytes:
    """The encoded image of a row of ``IMAGES``, which holds it or says where it is."""
    if row["bytes"] is not None:
        return bytes(row["bytes"])
    filesystem, path = locate(row["path"])
    return bytes(filesystem.cat_file(path))


def decode_image(content: bytes) -> Image.Image:
    """An encoded image as people see it: upright, in RGB, over white where it is transparent.

    Raises:
        ValueError: the bytes are no image of one of ``DECODED`` that can be decoded whole.
    """
    try:
        with Image.open(io.BytesIO(content), formats=DECODED) as image:
            return as_seen(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not an image that can be decoded: {error}") from None


def as_seen(image: Image.Image) -> Image.Image:
    """An open image, turned as its EXIF data says, in RGB, over white where it is transparent."""
    turned = ImageOps.exif_transpose(image)
    if turned.has_transparency_data:
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned.convert("RGBA"))
    return turned.convert("RGB")


def read_image(row: Mapping[str, Any]) -> Image.Image:
    """The image of a row of ``IMAGES``, in RGB.

    Raises:
        CorpusError: it cannot be decoded; the message names it.
    """
    try:
        return decode_image(image_bytes(row))
    except ValueError as error:
        raise CorpusError(
            f"image {row['image_uid']}: {error}. Prepare the lists again (jobs/prepare.py rankings)"
        ) from None


def read_images(corpus: Artifact, uids: set[str]) -> dict[str, bytes]:
    """Encoded images of a corpus by uid.

    Raises:
        CorpusError: one is not there.
    """
    return {row["image_uid"]: image_bytes(row) for rows in stored_images(corpus, uids, 64) for row in rows}


def stored_images(corpus: Artifact, uids: set[str], batch: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of ``IMAGES`` of these images, ``batch`` or fewer at once, so that no more of them are in memory.

    Raises:
        CorpusError: one is not there; after the others.
    """
    missing, kept = set(uids), []
    for path in corpus.paths("images/", ".parquet"):
        with pq.ParquetFile(corpus.local(path)) as file:
            for part in file.iter_batches(batch):
                wanted = pc.is_in(part["image_uid"], pa.array(sorted(missing), pa.string()))
                kept += part.filter(wanted).to_pylist()
                missing.difference_update(row["image_uid"] for row in kept)
                if len(kept) >= batch:
                    yield kept[:batch]
                    kept = kept[batch:]
    if kept:
        yield kept
    if missing:
        raise CorpusError(
            f"{corpus.url} lacks {len(missing)} images that it names, such as {min(missing)!r}: prepare it again, with "
            "its images"
        )


class Gallery:
    """The images of one unit of input.

    Args:
        root: folder or URL under which a uid is a path, with its suffix or without; "" where images are nowhere but in
            the records.
        mode: ``embed`` keeps the bytes of files, ``reference`` their paths; bytes in records are always kept.
    """

    def __init__(self, root: str, mode: Mode) -> None:
        self._root, self._mode = root, mode
        self._seen: dict[tuple[str, bytes], str | None] = {}
        self._collected: set[str] = set()
        self._rows: list[dict[str, Any]] = []

    def inspect(self, found: Found) -> pa.Table:
        """The annotations, with a reason where an image of theirs is missing or broken."""
        table = found.annotations
        if self._mode == "skip" or (not self._root and found.winner_bytes is None):
            return table
        reasons = table["reason"].to_pylist()
        rows = table["row"].to_pylist()
        sides = [table[name].to_pylist() for name in ("winner", "loser", "source_image")]
        held = [found.winner_bytes, found.loser_bytes, None]
        for index, row in enumerate(rows):
            for uids, contents in zip(sides, held, strict=True):
                if uids[index] is not None and reasons[index] is None:
                    content = None if contents is None else contents[index].as_py()
                    reasons[index] = self._look(uids[index], content, row)
        column = pa.array(reasons, pa.string())
        return table.set_column(table.schema.get_field_index("reason"), table.schema.field("reason"), column)

    def take(self) -> pa.Table:
        """What was collected since the last call, as ``COLLECTED``."""
        table = pa.Table.from_pylist(self._rows, schema=COLLECTED)
        self._rows.clear()
        return table

    @property
    def held(self) -> int:
        """Bytes that wait for ``take``."""
        return sum(len(row["bytes"] or b"") + 200 for row in self._rows)

    def _look(self, uid: str, content: bytes | None, row: int) -> str | None:
        key = uid, b"" if content is None else hashlib.blake2b(content, digest_size=16).digest()
        if key not in self._seen:
            self._seen[key] = self._opened(uid, content, row)
        return self._seen[key]

    def _opened(self, uid: str, content: bytes | None, row: int) -> str | None:
        path = None
        if content is None:
            path = self._path(uid)
            if path is None:
                return UNKNOWN
            filesystem, inside = locate(path)
            content = filesystem.cat_file(inside)
        try:
            width, height = image_size(content)
        except ValueError:
            return CORRUPT
        if uid not in self._collected:
            self._collected.add(uid)
            kept = None if path is not None and self._mode == "reference" else content
            where = path if self._mode == "reference" else None
            size = {"width": width, "height": height}
            self._rows.append({"image_uid": uid, "bytes": kept, "path": where, **size, "row": row})
        return None

    def _path(self, uid: str) -> str | None:
        """Where the image's file is. A uid cannot lead out of the root."""
        if not self._root or ".." in uid.split("/"):
            return None
        filesystem, root = locate(self._root)
        for suffix in ("", *SUFFIXES):
            path = f"{root}/{uid.lstrip('/')}{suffix}"
            if filesystem.isfile(path):
                return path if is_local(filesystem) else str(filesystem.unstrip_protocol(path))
        return None


def first_of_each(units: list[pa.Table], wanted: set[str]) -> list[np.ndarray]:
    """Of collected images by unit (columns ``image_uid`` and ``row``): which rows to keep so that each wanted image is
    there once, as it was met first."""
    best: dict[str, tuple[int, int, int]] = {}
    for number, table in enumerate(units):
        for index, (uid, row) in enumerate(zip(*(table[c].to_pylist() for c in ("image_uid", "row")), strict=True)):
            if uid in wanted:
                best[uid] = min(best.get(uid, (row, number, index)), (row, number, index))
    keep = [np.zeros(table.num_rows, dtype=bool) for table in units]
    for _, number, index in best.values():
        keep[number][index] = True
    return keep


def chosen(batch: pa.RecordBatch, keep: np.ndarray) -> pa.Table:
    """The kept rows of a batch of ``COLLECTED``, as ``IMAGES``."""
    return pa.Table.from_batches([batch]).filter(pa.array(keep)).select(IMAGES.names).cast(IMAGES)
